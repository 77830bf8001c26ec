"""One rank of the real DeepSeek-V3 on one GPU: how long its share of a step takes, beside what the hardware allows.

    python benchmarks/rank_step.py --ranks 8 --output benchmarks/results/rank_step.json     # 85 GB of weights
    python benchmarks/rank_step.py --ranks 16 …                                              # 43 GB
    python benchmarks/rank_step.py --limits                                                  # arithmetic alone
    python benchmarks/rank_step.py --smoke                                                   # no GPU, no timing

All layers and the MTP module, built as the engine builds them, with random FP8 weights drawn on the device. The other
ranks are stood in for by a group that copies each message once and counts it: what it would take on the wire is
modelled beside, from the links that --links describes. A step is the forward, the logits of the sampled rows and their
argmax; its input tensors lie on the device. The limit is the bytes that must be read (weights once, routed experts as
far as tokens choose them, latents) at the speed of a copy measured in the same run, or the operations at the tensor
cores' peak, whichever is longer. The V3 repository's model.py runs the same slice in a process of its own afterwards
(how to get it: kernel_gpu.py).
"""

import argparse
import gc
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lib import CONFIGS, report
from lib.peers import Peer, find_v3
from lib.timing import (
    NO_TIMING,
    Clock,
    DeviceLost,
    GpuClock,
    Refused,
    Timed,
    asks_the_device,
    clock_for,
    lost,
    reason,
)
from lib.weights import fill

from core.batch import DECODE_ROWS, Batch
from core.config import ModelArgs, load_config
from core.numerics import Numerics
from core.run_config import PAGE_SIZE
from engine import rank_memory
from model import MLP, Block, Gate, Linear, MoE, Transformer
from ops.gpu import tiles
from ops.gpu.device import architecture
from parallel.group import Group

# --------------------------------------------------------------------------------------------------------------------
# Ranks that are not there
# --------------------------------------------------------------------------------------------------------------------


class Message(NamedTuple):
    kind: str  # all_reduce, all_gather
    nbytes: int  # that this rank brings


@dataclass(frozen=True)
class Alone(Group):
    """One rank of several without the others: each message is copied once, noted in `sent`, and goes nowhere."""

    sent: list[Message] = field(default_factory=list, compare=False, repr=False)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.sent.append(Message("all_reduce", x.nbytes))
        return x.clone()

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.sent.append(Message("all_gather", x.nbytes))
        return torch.cat([x] * self.size, dim=-1)


@dataclass(frozen=True)
class Links:
    """What ranks are joined by: an assumption, for the modelled times alone. By default NVLink 4 (450 GB/s each way
    to a switch) and, between nodes of 8, one 400 Gb/s adapter to a GPU."""

    node: int = 8  # ranks to a node
    inside: float = 450e9  # bytes a second, each way, a rank
    between: float = 50e9
    inside_start: float = 5e-6  # seconds before the first byte, a collective
    between_start: float = 20e-6

    def seconds(self, message: Message, ranks: int) -> float:
        """Of one collective. A sum: each rank reads a share of everybody's and gives its total to all, in the node
        and then, share by share, between nodes. A gathering: everybody's part reaches everybody."""
        local = min(ranks, self.node)
        nodes = math.ceil(ranks / self.node)
        n = message.nbytes
        if message.kind == "all_reduce":
            took = self.inside_start + 2 * n * (local - 1) / local / self.inside
            if nodes > 1:
                took += self.inside_start + self.between_start + 2 * n / local * (nodes - 1) / nodes / self.between
            return took
        took = self.inside_start + n * (local - 1) / self.inside
        return took + (self.between_start + n * (nodes - 1) / self.between if nodes > 1 else 0.0)


def traffic(sent: list[Message], ranks: int, links: Links) -> dict[str, Any]:
    """Collectives of a step: how many, their bytes, and the time that the links would take for them, one by one."""
    counts = Counter(message.kind for message in sent)
    seconds = sum(links.seconds(message, ranks) for message in sent)
    nbytes = sum(message.nbytes for message in sent)
    return {**{f"{kind}s": n for kind, n in counts.items()}, "bytes": nbytes, "modelled_ms": 1e3 * seconds}


def messages(args: ModelArgs, ranks: int, tokens: int, sampled: int, width: int = 2) -> list[Message]:
    """What a step of so many tokens should send and no more: the embedding, two sums a layer, the sampled logits."""
    reduce = Message("all_reduce", tokens * args.dim * width)
    return [reduce] * (1 + 2 * args.n_layers) + [Message("all_gather", 4 * sampled * args.vocab_size // ranks)]


# --------------------------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Bytes and numbers of a rank's weights that a step reads; routed experts apart, as not all of them are chosen."""

    always: int
    routed: int
    always_numbers: int
    routed_numbers: int
    draft: int  # bytes of the MTP module's own, without routed ones
    draft_routed: int
    head: int


def weights_of(model: Transformer) -> Weights:
    """Of a model that has been prepared; the embedding is left out, of which a step reads a row a token."""
    found: Counter[str] = Counter()
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        part = "draft" if name.startswith("mtp.") else "head" if name.startswith("head.") else "always"
        if not name.startswith(("embed.", "inv_freq")):
            routed = "_routed" if ".experts." in name else ""
            found[part + routed] += t.nbytes
            found[part + routed + "_numbers"] += 0 if name.endswith("scale") else t.numel()
    return Weights(
        found["always"] + found["head"], found["always_routed"], found["always_numbers"],
        found["always_routed_numbers"], found["draft"], found["draft_routed"], found["head"],
    )  # fmt: skip


def chosen(args: ModelArgs, tokens: int) -> float:
    """The fraction of routed experts that so many tokens are expected to choose: 1 - (1 - K/E)^tokens."""
    return 1 - (1 - args.n_activated_experts / args.n_routed_experts) ** tokens


def decode_bytes(model: Transformer, weights: Weights, b: int, context: int, drafts: int = 0) -> float:
    """What a rank reads in a step of b sequences, each with a token and `drafts` drafted ones, after `context` cached;
    with drafts also what the MTP module reads to make as many. With whole experts on a rank: of the average rank."""
    args, tokens = model.args, b * (1 + drafts)
    latents = model.page_bytes / PAGE_SIZE * b * context
    if not drafts:
        latents *= len(model.layers) / (len(model.layers) + len(model.mtp))
    total = weights.always + weights.routed * chosen(args, tokens) + latents
    for draft in range(drafts):
        total += weights.draft + weights.draft_routed * chosen(args, b if draft else tokens) + weights.head
    return total


def prefill_flops(model: Transformer, weights: Weights, n: int) -> tuple[float, float]:
    """Operations of a prompt of n tokens on one rank: in linears, and in attention."""
    args = model.args
    active = weights.always_numbers + weights.routed_numbers * args.n_activated_experts / args.n_routed_experts
    heads = args.n_heads // model.tp.size
    attention = heads * (args.qk_head_dim + args.v_head_dim) * n * (n + 1) * args.n_layers
    return 2.0 * active * n, float(attention)


def limit_ms(nbytes: float, linears: float, attention: float, clock: Clock, gemm: str) -> float:
    return 1e3 * max(nbytes / clock.copy, linears / clock.peaks[gemm] + attention / clock.peaks["bf16"])


class Work(NamedTuple):
    """What a kernel has to do in a step: bytes to read or write at least once, and operations."""

    nbytes: float
    flops: float


def work(model: Transformer, b: int, new: int, context: int, drafts: int, touched: float, arch: str) -> dict[str, Work]:
    """By kernel, of those whose time is not that of a launch alone: a step of b sequences with `new` tokens each after
    `context`; with drafts the MTP module takes as many. `touched`: how many of a layer's routed experts are chosen.
    Products in the libraries (the head, in prefill W^UK and W^UV) are not among them.
    """
    args, t = model.args, b * new
    found: dict[str, Work] = {}
    moved: float

    def add(name: str, nbytes: float, flops: float = 0.0) -> None:
        before = found.get(name, Work(0.0, 0.0))
        found[name] = Work(before.nbytes + nbytes, before.flops + flops)

    width = 1 if model.num.gemm == "fp8" else 2  # bytes of a number that goes into a product
    chosen_rows = t * args.n_activated_experts
    layers = [*model.layers, *(model.mtp if drafts else [])]
    latents = model.page_bytes / PAGE_SIZE / (len(model.layers) + len(model.mtp))
    heads, c, r = args.n_heads // model.tp.size, args.kv_lora_rank, args.qk_rope_head_dim
    for block in layers:
        assert isinstance(block, Block)
        linears = [m for m in block.modules() if isinstance(m, Linear) and m.weight.dim() == 2 and m.scale is not None]
        for m in linears:
            assert m.scale is not None
            n, k = m.weight.shape
            tile = tiles.choose("fp8_gemm" if width == 1 else "w8a16_gemm", arch, n, k, t)
            out = 4 * tile.split if tile.split > 1 else 2
            moved = m.weight.nbytes + m.scale.nbytes + t * (k * width + n * out)
            add("gemm_persistent_kernel" if tile.persistent else "gemm_kernel", moved, 2.0 * t * n * k)
        for mlp in (m for m in block.modules() if isinstance(m, MLP)):
            add("silu_mul_kernel", t * mlp.inner * (2 * 2 + width))
        if isinstance(block.ffn, MoE):
            gate, experts = block.ffn.gate, block.ffn.experts
            rows = chosen_rows * experts.w13.weight.shape[0] // args.n_routed_experts  # of these ranks, the mean one's
            held = [m.weight.nbytes + (0 if m.scale is None else m.scale.nbytes) for m in (experts.w13, experts.w2)]
            moved = sum(held) * touched / args.n_routed_experts + t * args.dim * width
            moved += rows * (experts.inner * (2 * 2 + width) + args.dim * 2)
            in_order = width == 1 and grouped_tile(arch, chosen_rows / args.n_routed_experts).persistent
            kernel = "grouped_persistent_kernel" if in_order else "grouped_gemm_kernel"
            add(kernel, moved, 6.0 * rows * experts.inner * args.dim)
            add("silu_mul_kernel", rows * experts.inner * (2 * 2 + width))
            add("combine_kernel", (rows + 2 * t) * args.dim * 2)
            add("router_kernel", gate.weight.nbytes + t * args.dim * 2, 2.0 * t * gate.weight.numel())
        # two norms: each reads x and what is added, and writes the sum, its norm as the product takes it and, before an
        # FFN in W8A8, as it is
        written = 2 * width + (2 if width == 1 else 0)
        add("norm_kernel", t * args.dim * (2 * 6 + written))
        add("norm_latents_kernel", t * ((args.q_lora_rank or 0) * (2 + width) + 4 * args.latent_dim))
        pairs = t * (context + (new + 1) / 2)  # of a query token and a key that it sees
        if new <= DECODE_ROWS:
            moved = b * (context + new) * latents + t * heads * (2 * (c + r) + 4 * c)
            add("decode_kernel", moved, 2.0 * heads * (2 * c + r) * pairs)
        else:
            sizes = args.qk_head_dim + args.v_head_dim
            moved = 2 * heads * sizes * (t + b * (context + new))
            add("prefill_kernel", moved, 2.0 * heads * sizes * pairs)
    return found


def grouped_tile(arch: str, rows: float) -> tiles.Tile:
    """The tile of experts in W8A8 that have so many rows in the mean."""
    return tiles.tile_for(tiles.GROUPED_W8A8[arch], math.ceil(rows))


def rates(kernels: list[dict[str, Any]], done: dict[str, Work]) -> list[dict[str, Any]]:
    """A breakdown with GB/s and TFLOPS wherever a kernel's work is known and it took time."""
    rows = []
    for row in map(dict, kernels):
        known = done.get(row["kernel"])
        if known and row.get("ms"):
            row["gb_per_s"] = known.nbytes / row["ms"] / 1e6
            row |= {"tflops": known.flops / row["ms"] / 1e9} if known.flops else {}
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------------------
# The slice
# --------------------------------------------------------------------------------------------------------------------


def build(args: ModelArgs, options: argparse.Namespace, device: torch.device | str) -> Transformer:
    """Rank 0 of options.ranks, weights uninitialised."""
    num = Numerics(torch.bfloat16, options.gemm, args.scale_fmt, options.kv_cache_dtype == "fp8", options.experts)
    return Transformer(args, num, Alone(0, options.ranks), device)


class Slice:
    """The rank's model with weights, and the steps that are timed."""

    def __init__(self, args: ModelArgs, options: argparse.Namespace, clock: Clock):
        self.options, self.clock = options, clock
        self.draw = torch.Generator(clock.device).manual_seed(0)
        self.model = build(args, options, clock.device)
        fill(self.model)
        self.model.prepare()
        self.weights = weights_of(self.model)
        self.cache = torch.empty(0)
        assert isinstance(self.model.tp, Alone)
        self.sent = self.model.tp.sent

    def memory(self) -> dict[str, int]:
        found = {"weights_bytes": sum(t.nbytes for t in [*self.model.parameters(), *self.model.buffers()])}
        if self.clock.device.type == "cuda":
            found["allocated_bytes"] = torch.cuda.memory_allocated(self.clock.device)
        return found

    def batch(self, b: int, new: int, context: int) -> Batch:
        """b sequences of `new` tokens each after `context` cached ones; the cache is just their pages, in any order."""
        per = math.ceil((context + new) / PAGE_SIZE)
        self.cache = torch.empty(0)
        self.cache = self.model.new_cache(b * per)
        if self.cache.is_floating_point():
            for layer in self.cache:
                layer.normal_(generator=self.draw)
        pages = torch.randperm(b * per).view(b, per).tolist()
        tokens = torch.randint(self.model.args.vocab_size, (b, new)).tolist()
        sequences = [(tokens[i], context, pages[i]) for i in range(b)]
        return Batch.pack(sequences, self.clock.device)

    def decoding(self, b: int, context: int, drafts: int = 0) -> Callable[[], torch.Tensor]:
        """A step; with drafts, of verification and of drafting anew."""
        batch = self.batch(b, 1 + drafts, context)
        ends = torch.arange(drafts, b * (1 + drafts), 1 + drafts, device=self.clock.device)

        def step() -> torch.Tensor:
            hidden = self.model(batch, self.cache)
            token = self.model.logits(hidden).argmax(-1)
            if drafts:
                states = self.model.draft(replace(batch, tokens=token), hidden, self.cache)
                token = self.model.logits(states[ends]).argmax(-1)
            return token

        return step

    def prefilling(self, n: int) -> Callable[[], torch.Tensor]:
        batch = self.batch(1, n, 0)
        return lambda: self.model.logits(self.model(batch, self.cache)[-1:]).argmax(-1)

    def watched(self, step: Callable[[], Any]) -> tuple[list[Message], float | None]:
        """A step's messages, and how many routed experts its tokens chose, the mean of the layers."""
        seen: list[int] = []
        hooks = [
            module.register_forward_hook(lambda _m, _i, out: seen.append(len(out[1].unique())))
            for module in self.model.layers.modules()
            if isinstance(module, Gate)
        ]
        self.sent.clear()
        step()
        for hook in hooks:
            hook.remove()
        return list(self.sent), sum(seen) / len(seen) if seen else None

    def time(self, step: Callable[[], Any], graph: bool) -> dict[str, Any]:
        """By mode, "eager" and perhaps "graph": the times, or why there are none."""
        found: dict[str, Any] = {"eager": Timed(self.clock, self.options.rounds).of(step)}
        if graph:
            try:
                found["graph"] = Timed(self.clock, 2 * self.options.rounds).of(self._captured(step))
            except Exception as e:
                found["graph"] = {"refused": reason(e)}
        return found

    def _captured(self, step: Callable[[], Any]) -> Callable[[], Any]:
        if self.clock.device.type == "cpu":
            raise Refused("needs a GPU")
        if asks_the_device(step):
            raise Refused("a step waits for the device")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def profiled(step: Callable[[], Any], clock: Clock) -> list[dict[str, Any]]:
    """What an eager step runs on the device, the longest first: name, launches and milliseconds a step, share of them
    all. Without a GPU the operators, and no times."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = clock.device.type == "cuda"
    steps = 3 if on_gpu else 1
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    step()
    with profile(activities=activities) as p:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events = [e for e in p.key_averages() if not on_gpu or e.device_type == DeviceType.CUDA]
    if not on_gpu:
        return [{"kernel": e.key, "launches": e.count / steps} for e in events]
    spent = {e.key: e.self_device_time_total / 1e3 / steps for e in events}  # ms
    total = sum(spent.values()) or 1.0
    rows = [
        {"kernel": e.key, "launches": e.count / steps, "ms": spent[e.key], "share": spent[e.key] / total}
        for e in events
    ]
    return sorted(rows, key=lambda row: -row["ms"])


# --------------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------------


def run(args: ModelArgs, options: argparse.Namespace, clock: Clock, done: Callable[[dict[str, Any]], None]) -> None:
    """Everything of ours; `done` is given what there is so far after each case."""
    links = Links(**json.loads(options.links))
    torch.manual_seed(0)
    began = time.perf_counter()
    rank = Slice(args, options, clock)
    found: dict[str, Any] = {"memory": rank.memory() | planned(args, options), "rows": [], "kernels": {}}
    says = [f"{key.replace('_', ' ')} {n / 1e9:.2f} GB" for key, n in found["memory"].items() if isinstance(n, int)]
    print(f"rank 0 of {options.ranks}: {', '.join(says)}", flush=True)
    kinds: list[tuple[str, int, int, int]] = [("decode", b, c, 0) for c in options.contexts for b in options.batches]
    if len(rank.model.mtp):
        kinds += [("decode + MTP", b, c, 1) for c in options.contexts for b in options.batches]
    kinds += [("prefill", 1, n, 0) for n in options.prefill]
    for kind, b, context, drafts in kinds:
        row: dict[str, Any] = {"what": kind, "b": b, "context": context}
        step: Any = None
        try:
            if options.budget and time.perf_counter() - began > options.budget:
                raise Refused(f"{options.budget:g} s were over")
            prefill = kind == "prefill"
            step = rank.prefilling(context) if prefill else rank.decoding(b, context, drafts)
            sent, row["experts_touched"] = rank.watched(step)
            row["collectives"] = traffic(sent, options.ranks, links)
            row |= rank.time(step, graph=not prefill)
            tokens = context if prefill else b * (1 + drafts)
            nbytes = decode_bytes(rank.model, rank.weights, b, 0 if prefill else context, drafts)
            if prefill:
                nbytes = rank.weights.always + rank.weights.routed * chosen(args, context)
            flops = prefill_flops(rank.model, rank.weights, context) if prefill else (0.0, 0.0)
            row |= {"tokens": tokens, "read_bytes": nbytes, "limit_ms": limit_ms(nbytes, *flops, clock, options.gemm)}
            if options.profile and (clock.timing or not found["kernels"]):
                kernels = profiled(step, clock)
                if clock.timing:
                    new, before = (context, 0) if prefill else (1 + drafts, context)
                    arch = architecture(clock.device)
                    done_by = work(rank.model, b, new, before, drafts, row["experts_touched"] or 0.0, arch)
                    kernels = rates(kernels, done_by)
                found["kernels"][f"{kind} B={b} {context}"] = kernels
        except Exception as e:  # too large for this GPU, say: the others go on
            row["refused"] = reason(e)
        found["rows"].append(row)
        if lost(clock.device):
            done(found)
            raise DeviceLost(f"{kind}, B={b}, {context}: {row.get('refused')}", found["rows"])
        print(shown_row(row, clock), flush=True)
        done(found)
        step = None  # with it goes its batch
        rank.cache = torch.empty(0)
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
    if clock.device.type == "cuda":
        found["memory"]["peak_bytes"] = torch.cuda.max_memory_allocated(clock.device)
        done(found)


def planned(args: ModelArgs, options: argparse.Namespace) -> dict[str, Any]:
    """What engine/rank_memory.py expects the weights to take."""
    num = build(args, options, "meta").num
    rank = rank_memory.RankSpec(args, num, options.ranks, True, bool(args.n_mtp_layers))
    return {"planned_weights_bytes": sum(rank_memory.weight_bytes(rank).values())}


def shown_row(row: dict[str, Any], clock: Clock) -> str:
    name = f"{row['what']:13} B={row['b']:<4} {row['context']:>6}"
    if "refused" in row:
        return f"{name}  refused: {row['refused']}"
    if not clock.timing:
        return f"{name}  (no timing)"
    parts = [name, f"limit {row['limit_ms']:.2f} ms"]
    for mode in ("eager", "graph"):
        if mode in row:
            took = row[mode]
            text = f"refused: {took['refused']}" if "refused" in took else f"{took['ms']:.2f} ms"
            parts.append(f"{mode} {text}")
    return "  ".join(parts)


def run_v3(
    config: dict[str, Any], options: argparse.Namespace, peer: Peer, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The same cases by the V3 repository's model, in both of its gemm modes; the times go into `rows`."""
    said: dict[str, Any] = {}
    longest = max([c + 1 for c in options.contexts] + options.prefill)
    for gemm in options.v3_gemm:
        try:
            said[gemm] = peer.ask(do="slice", config=config, ranks=options.ranks, longest=longest, gemm=gemm)
        except Refused as e:
            said[gemm] = {"refused": str(e)}
            continue
        for row in rows:
            if row["what"] not in ("decode", "prefill"):
                continue
            kind, b, context = row["what"], row["b"], row["context"]
            try:
                row[f"v3_{gemm}"] = peer.ask(do="step", kind=kind, b=b, context=context, rounds=options.rounds)
            except Refused as e:
                row[f"v3_{gemm}"] = {"refused": str(e)}
            took = row[f"v3_{gemm}"]
            says = took.get("refused") or ("(no timing)" if "no_timing" in took else f"{took['ms']:.2f} ms")
            print(f"V3 repository, {gemm}: {kind} B={b} {context}: {says}", flush=True)
    return said


def table(found: dict[str, Any]) -> str:
    """The steps as Markdown: a line each, from the results as they are saved."""
    timing = "no_timing" not in found
    modes = ["eager", "graph", *sorted({key for row in found["rows"] for key in row if key.startswith("v3_")})]

    def cell(row: dict[str, Any], mode: str) -> str:
        took = row.get(mode, {})
        if "ms" not in took:
            return "refused" if "refused" in took or "refused" in row else "–"
        return f"{took['ms']:.2f}" if timing else "(none)"

    lines = []
    for row in found["rows"]:
        best = min((row[m]["ms"] for m in ("eager", "graph") if "ms" in row.get(m, {})), default=None)
        limits = ["–", "–"]
        if best and timing:
            limits = [f"{row['limit_ms']:.2f}", f"{100 * row['limit_ms'] / best:.0f}"]
        sent = row.get("collectives", {})
        lines.append([
            row["what"], str(row["b"]), str(row["context"]), *(cell(row, mode) for mode in modes), *limits,
            str(sent.get("all_reduces", "–")), f"{sent.get('bytes', 0) / 1e6:.2f}", f"{sent.get('modelled_ms', 0):.2f}",
        ])  # fmt: skip
    names = [f"{mode} ms".replace("v3_", "V3 repository, ") for mode in modes]
    header = ["step", "B", "context", *names, "limit ms", "% of limit", "sums", "MB sent", "wire ms (modelled)"]
    return report.table(header, lines)


def breakdowns(found: dict[str, Any], longest: int = 20) -> str:
    """What each profiled step runs, the longest first, as Markdown."""
    text = []
    for name, kernels in found["kernels"].items():
        rows = []
        for k in kernels[:longest]:
            spent = [f"{k['ms']:.3f}", f"{100 * k['share']:.1f}"] if "ms" in k else ["(none)", "(none)"]
            reached = [f"{k[name]:.0f}" if name in k else "–" for name in ("gb_per_s", "tflops")]
            rows.append([k["kernel"][:70], f"{k['launches']:.0f}", *spent, *reached])
        launches = sum(k["launches"] for k in kernels)
        text.append(f"{name}: {launches:.0f} launches a step\n")
        text.append(report.table(["kernel", "launches", "ms", "%", "GB/s", "TFLOPS"], rows) + "\n")
    return "\n".join(text)


def limits(args: ModelArgs, options: argparse.Namespace) -> dict[str, Any]:
    """The arithmetic alone, from the model's shapes: bytes read, time at a given bandwidth, messages and their modelled
    time on 8 and 16 ranks."""
    model = build(args, options, "meta").prepare()
    weights, links = weights_of(model), Links(**json.loads(options.links))
    rows = []
    for context in options.contexts:
        for b in options.batches:
            nbytes = decode_bytes(model, weights, b, context)
            sent = {ranks: traffic(messages(args, ranks, b, b), ranks, links) for ranks in (8, 16)}
            rows.append({
                "b": b, "context": context, "read_bytes": nbytes, "limit_ms": 1e3 * nbytes / (options.bandwidth * 1e9),
                "sums": sent[8]["all_reduces"], "sent_bytes": sent[8]["bytes"],
                "modelled_wire_ms_8": sent[8]["modelled_ms"], "modelled_wire_ms_16": sent[16]["modelled_ms"],
            })  # fmt: skip
    return {"arithmetic_only": True, "bandwidth_gb_per_s": options.bandwidth, "links": vars(links), "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default=str(CONFIGS / "config_671B.json"))
    parser.add_argument("--ranks", type=int, default=8, help="of which the first is built")
    parser.add_argument("--layers", type=int, help="only so many of the model's")
    parser.add_argument("--experts", choices=["split", "whole"], default="split", help="how ranks share the experts")
    parser.add_argument("--gemm", choices=["fp8", "bf16"], default="fp8", help="W8A8 or W8A16")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 128], metavar="B")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 4096], metavar="L")
    parser.add_argument("--prefill", type=int, nargs="*", default=[1024, 4096, 16384], metavar="T")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="what each step runs on the device")
    parser.add_argument("--v3", metavar="DIR", help="the V3 repository's inference folder (default: in .peers)")
    parser.add_argument("--v3-gemm", nargs="*", choices=["fp8", "bf16"], default=["fp8", "bf16"],
                        help="its modes; none leaves it out")  # fmt: skip
    parser.add_argument("--links", default="{}", metavar="JSON", help="fields of Links, for the modelled times")
    parser.add_argument("--peak", type=float, default=1979, help="dense FP8 TFLOPS; default: the H100's and H200's")
    parser.add_argument("--bandwidth", type=float, default=4800, help="GB/s, for --limits alone")
    parser.add_argument("--limits", action="store_true", help="the arithmetic alone; needs no GPU")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="no further case begins after so long")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, no timing")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    if options.smoke:
        options.config, options.ranks, options.rounds = str(CONFIGS / "config_demo.json"), 2, 1
        options.batches, options.contexts, options.prefill, options.profile = [2], [70], [10], True
    config = json.loads(Path(options.config).read_text())
    args = load_config(options.config)
    changed: dict[str, Any] = {}
    if options.smoke:
        config["dtype"] = "bf16"  # of the V3 repository's model alone, which has no FP8 products on a CPU
        changed = {"moe_inter_dim": 128 * options.ranks, "n_layers": 2}  # whole FP8 blocks to a rank
    if options.layers:
        changed |= {"n_layers": options.layers, "n_dense_layers": min(options.layers, args.n_dense_layers)}
    config, args = config | changed, replace(args, **changed)
    if options.limits:
        found = limits(args, options)
        print(report.table(list(found["rows"][0]), [[f"{v:.6g}" for v in row.values()] for row in found["rows"]]))
        report.save(options.output, found)
        print(json.dumps({"benchmark": "rank slice limits", "rows": len(found["rows"])}))
        return 0
    clock = clock_for(options.smoke, options.peak)
    if clock is None:
        return 2
    print(f"{clock.name}, copy {clock.copy / 1e9:.0f} GB/s\n" if clock.timing else NO_TIMING + "\n")
    if clock.timing:
        needed = sum(p.nbytes for p in build(args, options, "meta").parameters()) / 1e9
        free = torch.cuda.mem_get_info(clock.device)[0] / 1e9
        if needed > free:
            print(f"error: a rank of {options.ranks} has {needed:.1f} GB of weights, and {free:.1f} GB are free; "
                  "give --ranks or --layers", file=sys.stderr)  # fmt: skip
            return 2
    about: dict[str, Any] = {"config": Path(options.config).name, "ranks": options.ranks, "layers": args.n_layers,
                             "experts": options.experts, "gemm": options.gemm,
                             "links": vars(Links(**json.loads(options.links)))}  # fmt: skip
    about |= {"copy_gb_per_s": clock.copy / 1e9} if clock.timing else {"no_timing": NO_TIMING}
    last: dict[str, Any] = {}

    def done(found: dict[str, Any]) -> None:
        last.update(found)
        report.save(options.output, about | found)

    try:
        run(args, options, clock, done)
    except DeviceLost as e:
        print(f"error: the device is lost, what was left is not run ({e})", file=sys.stderr)
        return 3
    gc.collect()
    if isinstance(clock, GpuClock):
        torch.cuda.empty_cache()
    peer = find_v3(options.v3, clock.device) if options.v3_gemm else None
    if peer is not None:
        last["v3_repository"] = run_v3(config, options, peer, last["rows"])
        peer.close()
        done(last)
    print(f"\n{table(about | last)}\n\n{breakdowns(last)}")
    refused = sum("refused" in row for row in last["rows"])
    summary = {"benchmark": "rank slice", "rows": len(last["rows"]), "refused": refused}
    print(json.dumps(summary | ({} if clock.timing else {"no_timing": True})))
    return 0


if __name__ == "__main__":
    sys.exit(main())

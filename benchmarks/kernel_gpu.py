"""Every kernel at DeepSeek-V3's shapes on one GPU, beside whatever else can compute the same.

    python benchmarks/kernel_gpu.py dense --output benchmarks/results/kernel_dense.json
    python benchmarks/kernel_gpu.py moe fused router decode prefill --smoke      # no GPU, no timing: the path alone

dense    the nine products of the model at full width and at one rank of eight      moe      routed experts of a rank
fused    norm + quantise, SiLU·mul + quantise, the latent's way into the cache      router   scores and top-k
decode   MLA over cached latents, one query a sequence                              prefill  MLA over a whole prompt
sample   tokens from logits by temperature, top-k and top-p

How it is timed and checked: lib/timing.py and lib/race.py. Peers, each left out or refused where it is not there:
torch's own kernels (cuBLASLt, grouped_mm, FlexAttention, SDPA); DeepGEMM and FlashMLA, if they are installed; and the
V3 repository's kernels, experts and attention, which run from an ignored folder in a process of their own:

    git clone https://github.com/deepseek-ai/DeepSeek-V3 .peers/DeepSeek-V3

Its FP8 product tunes itself at the first M it meets. Here it is tuned twice, at the first M up to 128 and at the first
beyond, which is kinder to it than its own model is. It compiles 36 kernels for a shape, which takes minutes: --shape
takes one shape at a time, --only leaves contestants out, and --quick has the fewest shapes that say something.
"""

import argparse
import faulthandler
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from lib import report
from lib.peers import Peer, find_v3
from lib.race import Case, Contestant, header, race, shown
from lib.timing import NO_TIMING, Clock, DeviceLost, Run, clock_for, cold_sets

from core.config import BLOCK_SIZE
from core.numerics import Gemm
from core.sampling_params import SamplingParams
from ops import formats, reference
from ops.formats import Routing, Weight

# (N, K): wq_a with wkv_a, wq_b, wo, dense w1 with w3, dense w2; then whole: wq_b, wkv_b, wo, an expert's w1 with w3
SHAPES = [
    (2112, 7168), (3072, 1536), (7168, 2048), (4608, 7168), (7168, 2304),
    (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168),
]  # fmt: skip
BLOCK = BLOCK_SIZE
PAGE = 64
V3_RULE = Routing(8, "sigmoid", "noaux_tc", 8, 4, True, 2.5)
Rows = list[dict[str, Any]]
QUANTISED = 2e-2  # where something is rounded to FP8 on the way: a bit's difference before it can move it by an eighth


def sizes(
    options: argparse.Namespace, asked: list[int] | None, smoke: list[int], quick: list[int], full: list[int]
) -> list[int]:
    """Which of a list the options want."""
    return asked or (smoke if options.smoke else quick if options.quick else full)


OURS = {"GpuBackend": "ops.gpu.backend", "ReferenceBackend": "ops.reference_backend",
        "kernel": "ops.gpu.gemm", "kernel_fused": "ops.gpu.fused", "decode": "ops.gpu.decode",
        "attention_tiles": "ops.gpu.attention_tiles", "distributions": "ops.distributions", "sample": "ops.gpu.sample",
        "reference": "ops.reference", "model": "core.batch"}  # fmt: skip


def ours_by_name(module: str) -> Any:
    """A module of inference/ (for "ops" a backend), imported where it is first used: the V3 repository's have the same
    names."""
    if module == "ops":
        name = "GpuBackend" if torch.cuda.is_available() else "ReferenceBackend"
        return getattr(importlib.import_module(OURS[name]), name)()
    return importlib.import_module(OURS[module])


def random(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(draw: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=draw, device=draw.device).to(dtype)


def widened(q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """FP8 activations (M, K) and their scales as float64."""
    return q.float().double() * s.double().repeat_interleave(BLOCK, dim=-1)[..., : q.shape[-1]]


def dequantised(w: torch.Tensor, s: torch.Tensor, block: tuple[int, int] = reference.BLOCK) -> torch.Tensor:
    """Quantised weights (N, K) and the scales of their blocks as float64."""
    values = reference.widened(w, block).float().double()
    rows = s.double().repeat_interleave(block[0], -2)[: values.shape[-2]]
    return values * rows.repeat_interleave(block[1], -1)[:, : values.shape[-1]]


GROUP = 32  # channels of INT4 that share a scale, as Kimi-K2-Thinking's do


def int4(draw: torch.Generator, *shape: int) -> Weight:
    """Random INT4 (…, N, K) with bfloat16 scales, of about K ** -0.5."""
    *stack, n, k = shape
    data = torch.randint(256, (*stack, n, k // 2), generator=draw, dtype=torch.uint8, device=draw.device)
    s = (0.1 + 0.2 * torch.rand(*stack, n, k // GROUP, generator=draw, device=draw.device)) * k**-0.5
    return Weight(data, s.bfloat16(), block=(1, GROUP))


def int8(draw: torch.Generator, n: int, k: int) -> Weight:
    """Random INT8 (N, K) with a scale for each 128 x 128."""
    data = torch.randint(-128, 128, (n, k), generator=draw, dtype=torch.int8, device=draw.device)
    s = 0.01 + 0.01 * torch.rand(math.ceil(n / BLOCK), math.ceil(k / BLOCK), generator=draw, device=draw.device)
    return Weight(data, s)


def fp8_type(device: torch.device) -> torch.dtype:
    return torch.float8_e4m3fnuz if "gfx94" in gpu_architecture(device) else torch.float8_e4m3fn


def gpu_architecture(device: torch.device) -> str:
    return getattr(torch.cuda.get_device_properties(device), "gcnArchName", "") if device.type == "cuda" else ""


# --------------------------------------------------------------------------------------------------------------------
# dense
# --------------------------------------------------------------------------------------------------------------------


class Dense:
    """Activations (M, K) and `sets` weights (N, K), quantised; the same in every process for the same sizes."""

    def __init__(self, m: int, n: int, k: int, sets: int, device: torch.device):
        draw = random(device, m)
        self.q, self.q_s = reference.act_quant(normal(draw, m, k), dtype=fp8_type(device))
        self.ws, self.scales = [], []
        for _ in range(sets):
            w = normal(draw, n, k, dtype=torch.float8_e4m3fn)
            s = 0.01 + 0.01 * torch.rand(math.ceil(n / BLOCK), math.ceil(k / BLOCK), generator=draw, device=device)
            self.ws.append(w)
            self.scales.append(s)

    def exact(self) -> torch.Tensor:
        return widened(self.q, self.q_s) @ dequantised(self.ws[0], self.scales[0]).T


def dense(options: argparse.Namespace, clock: Clock) -> Iterator[Iterable[Case]]:
    shapes = options.shape or ([(192, 320)] if options.smoke else SHAPES)
    tokens = sizes(options, options.tokens, [1, 5], [1, 64, 128, 4096], [2**i for i in range(15)])
    for n, k in shapes:
        sets = cold_sets(n * k, clock)
        yield (dense_case(m, n, k, sets, clock.device) for m in tokens)


def dense_case(m: int, n: int, k: int, sets: int, device: torch.device) -> Case:
    data = Dense(m, n, k, sets, device)
    exact = data.exact()
    rounded = widened(data.q, data.q_s).bfloat16()
    exact_rounded = rounded.double() @ dequantised(data.ws[0], data.scales[0]).T
    forms = {kind: [kind(random(device, m + 1 + i), n, k) for i in range(sets)] for kind in (int8, int4)}

    def by(kind: Callable[..., Weight], name: str) -> Contestant:
        """Our product by weights of another form."""
        first = forms[kind][0]
        assert first.scale is not None
        meant = rounded.double() @ dequantised(first.data, first.scale, first.block).T
        nbytes = 2 * m * k + first.data.nbytes + first.scale.nbytes + m * n * 2

        def build() -> Run:
            ops = ours_by_name("GpuBackend").GpuBackend()

            weights = [ops.pack_weight(w) for w in forms[kind]]
            return lambda i: ops.linear(rounded, weights[i])

        return Contestant(name, build, meant, nbytes, 2.0 * m * n * k)

    def fp8_gemm() -> Run:
        kernel = ours_by_name("kernel")

        pairs = list(zip(data.ws, data.scales, strict=True))
        if data.q.dtype == torch.float8_e4m3fnuz:
            pairs = [reference.to_fnuz(w, s) for w, s in pairs]
        return lambda i: kernel.fp8_gemm(data.q, data.q_s, *pairs[i])

    def w8a16_gemm() -> Run:
        kernel = ours_by_name("kernel")

        return lambda i: kernel.w8a16_gemm(rounded, data.ws[i], data.scales[i])

    def cublas() -> Run:
        one, square = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
        padded = F.pad(data.q.view(torch.uint8), (0, 0, 0, -m % 4)).view(data.q.dtype)
        columns = F.pad(data.q_s, (0, 0, 0, -m % 4)).T.contiguous().T
        scales = [F.pad(s, (0, -s.shape[1] % 4)).T for s in data.scales]  # its rows are multiples of 16 bytes
        bf16 = torch.bfloat16
        return lambda i: F.scaled_mm(padded, data.ws[i].T, columns, one, scales[i], square, output_dtype=bf16)[:m]

    def deep_gemm() -> Run:
        import deep_gemm  # type: ignore[import-not-found]

        align = getattr(deep_gemm, "get_mn_major_tma_aligned_tensor", None)
        align = align or deep_gemm.get_col_major_tma_aligned_tensor
        run = getattr(deep_gemm, "fp8_gemm_nt", None) or deep_gemm.gemm_fp8_fp8_bf16_nt
        scales = align(data.q_s)

        def call(i: int) -> torch.Tensor:
            out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
            run((data.q, scales), (data.ws[i], data.scales[i]), out)
            return out

        return call

    def bf16() -> Run:
        weights = [reference.weight_dequant(w, s) for w, s in zip(data.ws, data.scales, strict=True)]
        return lambda i: rounded @ weights[i].T

    out, weight = m * n * 2, n * k + data.scales[0].nbytes
    fp8 = m * k + data.q_s.nbytes + weight + out
    flops = 2.0 * m * n * k
    request = {"what": "dense", "m": m, "n": n, "k": k}
    return Case({"m": m, "n": n, "k": k}, sets, [
        Contestant("fp8_gemm", fp8_gemm, exact, fp8, flops, "fp8"),
        Contestant("w8a16_gemm", w8a16_gemm, exact_rounded, 2 * m * k + weight + out, flops),
        by(int8, "w8a16_gemm INT8"),
        by(int4, "w4a16_gemm"),
        Contestant("V3 repository", request, exact, fp8, flops, "fp8", gpu=True),
        Contestant("cuBLASLt", cublas, exact, fp8, flops, "fp8", gpu=True),
        Contestant("DeepGEMM", deep_gemm, exact, fp8, flops, "fp8", gpu=True),
        Contestant("torch bf16", bf16, exact_rounded, 2 * (m * k + n * k) + out, flops, tolerance=1e-2),
    ], calls=24 if m <= 128 else 4)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# moe
# --------------------------------------------------------------------------------------------------------------------


class Experts:
    """A rank's experts, stacked and quantised, and `sets` times M tokens with the experts they go to.

    `total` experts there are, the first `local` of them here, of inner width `inter`.
    """

    def __init__(self, m: int, h: int, inter: int, local: int, total: int, top: int, sets: int, device: torch.device):
        draw = random(device, m)
        self.total, self.inter, self.pitch = total, inter, -(-inter // BLOCK) * BLOCK
        self.w13 = torch.empty(local, 2 * self.pitch, h, dtype=torch.float8_e4m3fn, device=device)
        self.w2 = torch.empty(local, h, inter, dtype=torch.float8_e4m3fn, device=device)
        for e in range(local):
            gate_up = normal(draw, 2, self.pitch, h, dtype=torch.float8_e4m3fn)
            gate_up.view(torch.uint8)[:, inter:] = 0
            self.w13[e] = gate_up.flatten(0, 1)
            self.w2[e] = normal(draw, h, inter, dtype=torch.float8_e4m3fn)
        self.s13, self.s2 = (
            (0.5 + torch.rand(local, math.ceil(w.shape[1] / BLOCK), math.ceil(w.shape[2] / BLOCK), generator=draw,
                              device=device)) * w.shape[2] ** -0.5
            for w in (self.w13, self.w2)
        )  # fmt: skip
        self.fp8 = Weight(self.w13, self.s13), Weight(self.w2, self.s2)
        self.xs = [normal(draw, m, h) for _ in range(sets)]
        self.ids = [torch.rand(m, total, generator=draw, device=device).topk(top).indices for _ in range(sets)]
        if not (self.ids[0] < local).any():
            self.ids[0][0, 0] = 0  # there has to be something to compare
        self.weights = [torch.rand(m, top, generator=draw, device=device) + 0.5 for _ in range(sets)]
        self.int4 = int4(draw, local, 2 * self.pitch, h), int4(draw, local, h, inter)

    def touched(self) -> float:
        """Experts of this rank that a call reads, on average."""
        local = len(self.w13)
        return sum(int((ids.unique() < local).sum()) for ids in self.ids) / len(self.ids)

    def assigned(self) -> float:
        """Rows of the grouped product, on average."""
        return sum(int((ids < len(self.w13)).sum()) for ids in self.ids) / len(self.ids)

    def compared(self) -> list[int]:
        """The tokens of set 0 that are compared with float64: some of those that have an expert here."""
        here = (self.ids[0] < len(self.w13)).any(dim=1).nonzero().flatten().tolist()
        return here[:: max(1, len(here) // 4)][:4] + here[-1:]

    def exact(self, rows: list[int], quantise: bool, by: tuple[Weight, Weight] | None = None) -> torch.Tensor:
        """Set 0's result for some of its tokens in float64, by FP8 weights or others, the FP8 roundings of W8A8
        included or not."""
        w13, w2 = by or self.fp8
        x = self.xs[0][rows]
        given = widened(*reference.act_quant(x)) if quantise else x.double()
        out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        for i, token in enumerate(rows):
            for e, weight in zip(self.ids[0][token].tolist(), self.weights[0][token].tolist(), strict=True):
                if e < len(self.w13):
                    up, down = (dequantised(w.data[e], w.scale[e], w.block) for w in (w13, w2) if w.scale is not None)
                    gate_up = up @ given[i]
                    hidden = F.silu(gate_up[: self.inter]) * gate_up[self.pitch : self.pitch + self.inter]
                    if quantise:
                        hidden = widened(*reference.act_quant(hidden[None].float()))[0]
                    out[i] += weight * (down @ hidden)
        return out


def moe(options: argparse.Namespace, clock: Clock) -> Iterator[Iterable[Case]]:
    # layout: (hidden size, inner width here, experts here, experts in all, per token)
    layouts = {"split": (7168, 256, 256, 256, 8), "whole": (7168, 2048, 32, 256, 8)}
    if options.smoke:
        layouts = {"split": (256, 64, 8, 8, 2), "whole": (256, 128, 4, 8, 2)}
    tokens = sizes(options, options.tokens, [1, 5], [1, 32, 128, 4096], [2**i for i in range(13)])
    for layout, widths in layouts.items():
        if not options.layout or layout in options.layout:
            yield (moe_case(m, layout, *widths, clock) for m in tokens)


def moe_case(m: int, layout: str, h: int, inter: int, local: int, total: int, top: int, clock: Clock) -> Case:
    device, sets = clock.device, 24 if m <= 32 and clock.timing else 2
    data = Experts(m, h, inter, local, total, top, sets, device)
    rows = data.compared()
    quantised, plain = data.exact(rows, True), data.exact(rows, False)
    plain_int4 = data.exact(rows, False, data.int4)

    def ours(gemm: Gemm) -> Callable[[], Run]:
        def build() -> Run:
            ops = ours_by_name("ops")

            pairs = (data.w13, data.s13), (data.w2, data.s2)
            if gemm == "fp8" and fp8_type(device) == torch.float8_e4m3fnuz:
                pairs = reference.to_fnuz(*pairs[0]), reference.to_fnuz(*pairs[1])
            w13, w2 = (Weight(*pair, gemm) for pair in pairs)
            return lambda i: ops.experts(data.xs[i], data.weights[i], data.ids[i], 0, w13, w2, inter)

        return build

    def w4a16() -> Run:
        ops = ours_by_name("ops")

        w13, w2 = (ops.pack_weight(w) for w in data.int4)
        return lambda i: ops.experts(data.xs[i], data.weights[i], data.ids[i], 0, w13, w2, inter)

    def grouped() -> Run:
        product = getattr(F, "grouped_mm", None) or torch._grouped_mm
        w13, w2 = (
            torch.stack([reference.weight_dequant(w[e], s[e]) for e in range(local)]).transpose(1, 2)
            for w, s in ((data.w13, data.s13), (data.w2, data.s2))
        )
        experts = torch.arange(local, device=device)

        def call(i: int) -> torch.Tensor:
            order = data.ids[i].flatten().argsort()
            sorted_ids = data.ids[i].flatten()[order]
            ends = torch.searchsorted(sorted_ids, experts, right=True).int()
            gate_up = product(data.xs[i][order // top], w13, offs=ends)
            hidden = F.silu(gate_up[:, :inter]) * gate_up[:, data.pitch : data.pitch + inter]
            y = product(hidden, w2, offs=ends).float() * data.weights[i].flatten()[order, None]
            y = y.masked_fill((sorted_ids >= local)[:, None], 0)
            out = torch.zeros(m, h, device=device).index_add_(0, order // top, y)
            return out.to(torch.bfloat16)

        return call

    assigned = data.assigned()
    expert = data.w13[0].numel() + data.w2[0].numel()
    scales = data.s13[0].nbytes + data.s2[0].nbytes
    ends = m * h * 4 + m * top * 12
    read = data.touched() * (expert + scales) + ends
    flops = 2.0 * assigned * 3 * inter * h
    packed = sum(t[0].nbytes for w in data.int4 for t in (w.data, w.scale) if t is not None)
    read_int4 = data.touched() * packed + ends
    request = {"what": "moe", "m": m, "h": h, "inter": inter, "local": local, "total": total, "top": top}
    pick = lambda y: y[rows]  # noqa: E731
    return Case({"layout": layout, "m": m}, sets, [
        Contestant("experts", ours("fp8"), quantised, read, flops, "fp8", QUANTISED, pick=pick),
        Contestant("experts W8A16", ours("bf16"), plain, read, flops, tolerance=QUANTISED, pick=pick),
        Contestant("experts W4A16", w4a16, plain_int4, read_int4, flops, tolerance=QUANTISED, pick=pick),
        Contestant("V3 repository", request, quantised, read, flops, "fp8", 2 * QUANTISED, gpu=True),
        Contestant("grouped_mm bf16", grouped, plain, data.touched() * 2 * expert + ends, flops, tolerance=QUANTISED,
                   gpu=True, pick=pick),
    ], calls=24 if m <= 32 else 4)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# router
# --------------------------------------------------------------------------------------------------------------------


def router(options: argparse.Namespace, clock: Clock) -> Iterator[Iterable[Case]]:
    h = 256 if options.smoke else 7168
    tokens = sizes(options, options.tokens, [1, 5], [1, 128], [1, 8, 32, 128, 512, 2048, 8192])
    yield (router_case(m, h, clock) for m in tokens)


def router_case(m: int, h: int, clock: Clock, experts: int = 256) -> Case:
    draw = random(clock.device, m)
    sets = cold_sets(2 * h * (m + experts), clock, at_most=64)
    xs = [normal(draw, m, h) for _ in range(sets)]
    w = [(normal(draw, experts, h, dtype=torch.float32) * h**-0.5).bfloat16() for _ in range(sets)]
    bias = normal(draw, experts, dtype=torch.float32) * 0.1

    def scattered(chosen: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        weights, ids = chosen
        return torch.zeros(m, experts, dtype=weights.dtype, device=weights.device).scatter_(1, ids.long(), weights)

    exact = scattered(reference.route(xs[0].double() @ w[0].double().T, bias.double(), V3_RULE))

    def ours() -> Run:
        ops = ours_by_name("ops")

        return lambda i: ops.router(xs[i], w[i], bias, V3_RULE)

    def plain() -> Run:
        return lambda i: reference.route(reference.project_float32(xs[i], w[i]), bias, V3_RULE)

    nbytes, flops = 2 * h * (m + experts) + m * 8 * 12, 2.0 * m * h * experts
    return Case({"m": m}, sets, [
        Contestant("router", ours, exact, nbytes, flops, tolerance=QUANTISED, pick=scattered),  # a near tie may flip
        Contestant("torch", plain, exact, nbytes, flops, tolerance=QUANTISED, pick=scattered),
    ])  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# fused
# --------------------------------------------------------------------------------------------------------------------


def fused(options: argparse.Namespace, clock: Clock) -> Iterator[Iterable[Case]]:
    tokens = sizes(options, options.tokens, [1, 5], [1, 128, 4096], [1, 8, 32, 128, 1024, 4096, 16384])
    h, inters, q_rank = (256, [192], 96) if options.smoke else (7168, [256, 2304], 1536)
    yield (norm_case(m, h, clock) for m in tokens)
    for inter in inters:
        yield (silu_case(m, inter, clock) for m in tokens)
    yield (latent_case(m, q_rank, clock) for m in tokens)


def norm_case(m: int, h: int, clock: Clock) -> Case:
    data = Residual(m, h, cold_sets(9 * m * h, clock), clock.device)
    exact = data.exact()

    def by(side: str) -> Callable[[], Run]:
        def build() -> Run:
            norm = ours_by_name(side).norm
            return lambda i: norm(data.xs[i], data.weight, 1e-6, data.deltas[i], "float32", keep=False)[0]

        return build

    nbytes = m * h * (2 * 3 + 1) + 4 * m * math.ceil(h / BLOCK) + 2 * h
    request = {"what": "norm", "m": m, "h": h}
    return Case({"op": "norm + quantise", "m": m, "width": h}, len(data.xs), [
        Contestant("fused", by("ops"), exact, nbytes, 0.0, tolerance=QUANTISED, pick=unpacked),
        Contestant("torch", by("reference"), exact, nbytes, 0.0, tolerance=QUANTISED, pick=unpacked),
        Contestant("V3 repository", request, exact, nbytes, 0.0, tolerance=QUANTISED, gpu=True),
    ])  # fmt: skip


class Residual:
    """`sets` times a residual (M, H) and what is added to it, and a norm's weight."""

    def __init__(self, m: int, h: int, sets: int, device: torch.device):
        draw = random(device, m)
        self.xs, self.deltas = ([normal(draw, m, h) for _ in range(sets)] for _ in range(2))
        self.weight = 1 + 0.2 * normal(draw, h, dtype=torch.float32)

    def exact(self) -> torch.Tensor:
        total = (self.xs[0] + self.deltas[0]).double()
        y = F.rms_norm(total, self.weight.shape, self.weight.double(), 1e-6)
        return widened(*reference.act_quant(y.bfloat16()))


def unpacked(y: Any) -> torch.Tensor:
    """A Quantised as float64."""
    return widened(y.q, y.s)


class GateUp:
    """`sets` times gate and up, stacked, (M, 2 I); the halves are rounded up to a block where I is no multiple."""

    def __init__(self, m: int, inter: int, sets: int, device: torch.device):
        self.inter, pitch = inter, -(-inter // BLOCK) * BLOCK
        draw = random(device, m)
        self.xs = [normal(draw, m, 2 * pitch) for _ in range(sets)]

    def exact(self) -> torch.Tensor:
        gate, up = self.xs[0].double().chunk(2, dim=-1)
        return widened(*reference.act_quant((F.silu(gate) * up)[:, : self.inter].bfloat16()))


def silu_case(m: int, inter: int, clock: Clock) -> Case:
    data = GateUp(m, inter, cold_sets(5 * m * inter, clock), clock.device)
    exact = data.exact()

    def by(side: str) -> Callable[[], Run]:
        def build() -> Run:
            silu_mul = ours_by_name(side).silu_mul
            return lambda i: silu_mul(data.xs[i], inter, "float32")

        return build

    nbytes = m * inter * (2 * 2 + 1) + 4 * m * math.ceil(inter / BLOCK)
    request = {"what": "silu", "m": m, "inter": inter}
    peers = [] if inter % BLOCK else [
        Contestant("V3 repository", request, exact, nbytes, 0.0, tolerance=QUANTISED, gpu=True)
    ]  # fmt: skip
    return Case({"op": "SiLU·mul + quantise", "m": m, "width": inter}, len(data.xs), [
        Contestant("fused", by("ops"), exact, nbytes, 0.0, tolerance=QUANTISED, pick=unpacked),
        Contestant("torch", by("reference"), exact, nbytes, 0.0, tolerance=QUANTISED, pick=unpacked),
        *peers,
    ])  # fmt: skip


def latent_case(m: int, q_rank: int, clock: Clock, c: int = 512, rope: int = 64) -> Case:
    """The norms of both latents, the key's rotation, and the write into the cache."""
    draw, device = random(clock.device, m), clock.device
    sets = cold_sets(2 * m * (2 * (c + rope) + 2 * q_rank), clock)
    kvs, queries = [normal(draw, m, c + rope) for _ in range(sets)], [normal(draw, m, q_rank) for _ in range(sets)]
    weight, q_weight = (1 + 0.2 * normal(draw, n, dtype=torch.float32) for n in (c, q_rank))
    angles = torch.rand(m, rope // 2, generator=draw, device=device) * 6
    pages = math.ceil(m / PAGE) + 1
    slots = [torch.randperm(pages * PAGE, generator=draw, device=device)[:m] for _ in range(sets)]

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.double(), x.shape[1:], weight.double(), 1e-6)

    c_kv, k_pe = kvs[0].split([c, rope], dim=-1)
    pairs = torch.view_as_complex(k_pe.double().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones_like(angles).double(), angles.double())
    exact = (normed(c_kv, weight), torch.view_as_real(pairs * turn).flatten(-2), normed(queries[0], q_weight))

    def by(side: str) -> Contestant:
        pool = torch.zeros(pages, PAGE, c + rope, dtype=torch.bfloat16, device=device)

        def build() -> Run:
            write = ours_by_name("ops" if side == "fused" else "reference").norm_latents
            cos, sin = angles.cos(), angles.sin()
            return lambda i: write(kvs[i], weight, 1e-6, cos, sin, slots[i], pool, queries[i], q_weight)

        def written(y: torch.Tensor) -> torch.Tensor:
            return torch.cat((pool.flatten(0, 1)[slots[0]], y), dim=-1)

        nbytes = 2 * 2 * m * (c + rope + q_rank) + m * (8 + 4 * rope)
        return Contestant(side, build, torch.cat(exact, dim=-1), nbytes, 0.0, pick=written)

    keys = {"op": "latents' norms", "m": m, "width": q_rank}
    return Case(keys, sets, [by("fused"), by("torch")])


# --------------------------------------------------------------------------------------------------------------------
# decode and prefill
# --------------------------------------------------------------------------------------------------------------------

C, ROPE, NOPE, V = 512, 64, 128, 128
SCALE = (NOPE + ROPE) ** -0.5


def unrotated(q_nope: torch.Tensor, q_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (T, N, dn) and (T, N, R) as the backend's mla takes them: (T, N (dn + R)), and cos and sin that turn
    nothing."""
    cos = torch.ones(len(q_pe), q_pe.shape[-1] // 2, device=q_pe.device)
    return torch.cat((q_nope, q_pe), dim=-1).flatten(1), cos, torch.zeros_like(cos)


class Cached:
    """`sets` times B queries, each over a sequence of `length` latents that lie in pages of one pool, in any order."""

    def __init__(self, heads: int, b: int, length: int, sets: int, device: torch.device):
        draw = random(device, b)
        self.b, self.length = b, length
        per = math.ceil(length / PAGE)
        n_pages = sets * b * per
        self.pool = torch.empty(n_pages, PAGE, C + ROPE, dtype=torch.bfloat16, device=device)
        for part in self.pool.split(4096):
            part.copy_(normal(draw, *part.shape))
        self.tables = torch.randperm(n_pages, generator=draw, device=device).view(sets, b, per)
        self.q_nope, self.q_pe = ([normal(draw, b, heads, d) for _ in range(sets)] for d in (NOPE, ROPE))
        self.w_uk = (normal(draw, heads, NOPE, C, dtype=torch.float32) * C**-0.5).bfloat16()
        self.w_uv = (normal(draw, heads, V, C, dtype=torch.float32) * C**-0.5).bfloat16()

    def latents(self, i: int, sequence: int) -> torch.Tensor:
        return self.pool[self.tables[i, sequence]].flatten(0, 1)[: self.length]

    def rows(self) -> list[int]:
        """The sequences of set 0 that are compared with float64."""
        return sorted({0, self.b // 2, self.b - 1})

    def exact(self, through: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> torch.Tensor:
        """(len(rows), N, V) float64; `through` is what happened to the latents on their way into the cache."""
        out = []
        for row in self.rows():
            latents = through(self.latents(0, row)).double()  # (L, C + R)
            q = torch.einsum("hd,hdc->hc", self.q_nope[0][row].double(), self.w_uk.double())
            q = torch.cat((q, self.q_pe[0][row].double()), dim=-1)  # (N, C + R)
            p = (q @ latents.T * SCALE).softmax(dim=-1)
            out.append(torch.einsum("hc,hvc->hv", p @ latents[:, :C], self.w_uv.double()))
        return torch.stack(out)


def decode(options: argparse.Namespace, clock: Clock) -> Iterator[Iterable[Case]]:
    heads = sizes(options, options.heads, [2], [16, 128], [16, 128])
    batches = sizes(options, options.batches, [1, 3], [1, 128], [1, 8, 32, 128])
    contexts = sizes(options, options.contexts, [100], [4096, 65536], [1024, 4096, 16384, 65536])
    for n in heads:
        yield (decode_case(n, b, length, clock) for b in batches for length in contexts)


def decode_case(heads: int, b: int, length: int, clock: Clock) -> Case:
    latent_bytes = 2 * b * length * (C + ROPE)
    sets = cold_sets(latent_bytes, clock)
    data, device = Cached(heads, b, length, sets, clock.device), clock.device
    rows, exact = data.rows(), data.exact()

    def batch_of(i: int) -> Any:
        batch_type = ours_by_name("model").Batch

        return batch_type.pack([([0], length - 1, pages) for pages in data.tables[i].tolist()], device)

    def ours(pool: torch.Tensor) -> Run:
        ops = ours_by_name("ops")

        batches = [batch_of(i) for i in range(sets)]
        queries = [unrotated(data.q_nope[i], data.q_pe[i]) for i in range(sets)]

        def call(i: int) -> torch.Tensor:
            return ops.mla(*queries[i], pool, batches[i], data.w_uk, data.w_uv, SCALE).view(b, heads, -1)

        return call

    def by_tile(*sizes: Any, **options: Any) -> Callable[[], Run]:
        """Ours by a tile of the caller's choice: rows, keys, warps, stages."""

        def build() -> Run:
            tile = ours_by_name("attention_tiles").AttentionTile(math.inf, *sizes, **options)
            decode, batches = ours_by_name("decode").decode, [batch_of(i) for i in range(sets)]

            def call(i: int) -> torch.Tensor:
                q = torch.einsum("bhd,hdc->bhc", data.q_nope[i], data.w_uk)
                o = decode(q, data.q_pe[i], data.pool, batches[i], batches[i].decode, SCALE, tile=tile)
                return torch.einsum("bhc,hvc->bhv", o, data.w_uv)

            return call

        return build

    def fp8() -> Run:
        packed = [reference.pack_latents(part.flatten(0, 1), C) for part in data.pool.split(4096)]
        return ours(torch.cat(packed).unflatten(0, (-1, PAGE)))

    def plain() -> Run:
        batches = [batch_of(i) for i in range(sets)]
        return lambda i: reference.mla(data.q_nope[i], data.q_pe[i], data.pool, batches[i], data.w_uk, data.w_uv, SCALE)

    def flash_mla() -> Run:
        import flash_mla as library  # type: ignore[import-not-found]

        lengths = torch.full((b,), length, dtype=torch.int32, device=device)
        tables, pool = data.tables.int(), data.pool[:, :, None]
        plan, splits = library.get_mla_metadata(lengths, heads, 1)

        def call(i: int) -> torch.Tensor:
            q = torch.cat((torch.einsum("bhd,hdc->bhc", data.q_nope[i], data.w_uk), data.q_pe[i]), dim=-1)[:, None]
            o, _ = library.flash_mla_with_kvcache(
                q, pool, tables[i], lengths, C, plan, splits, softmax_scale=SCALE, causal=True
            )
            return torch.einsum("bhc,hvc->bhv", o[:, 0], data.w_uv)

        return call

    few = b * length <= 1 << 16  # it goes from tile to tile and from sequence to sequence on the host
    read_once = data.w_uk.nbytes + data.w_uv.nbytes + 2 * b * heads * (NOPE + ROPE + V)
    flops = 2.0 * b * heads * (length * (2 * C + ROPE) + C * (NOPE + V))
    fp8_bytes = b * length * formats.packed_latent_bytes(C, ROPE) + read_once
    nbytes = latent_bytes + read_once
    request = {"what": "decode", "heads": heads, "b": b, "length": length}
    exact_fp8 = data.exact(lambda x: reference.unpack_latents(reference.pack_latents(x, C), C, torch.bfloat16))
    pick = lambda y: y[rows]  # noqa: E731
    candidates = {
        "16x64, pointers": by_tile(16, 64, 4, 1, True, programs=2),
        "16x64, descriptor": by_tile(16, 64, 4, 1, True, programs=2, descriptor=True),
        "64x32, 8 stages": by_tile(64, 32, 8, 8),
        "64x64, descriptor": by_tile(64, 64, 8, 2, descriptor=True),
    }  # of which the table has one for up to 16 rows and one for more; any that does not fit is refused
    return Case({"heads": heads, "b": b, "context": length}, sets, [
        Contestant("mla", lambda: ours(data.pool), exact, nbytes, flops, tolerance=QUANTISED, pick=pick),
        Contestant("mla, FP8 latents", fp8, exact_fp8, fp8_bytes, flops, tolerance=QUANTISED, pick=pick),
        *(Contestant(name, build, exact, nbytes, flops, tolerance=QUANTISED, gpu=True, pick=pick)
          for name, build in candidates.items()),
        Contestant("V3 repository", request, exact, nbytes, flops, tolerance=QUANTISED),
        Contestant("FlashMLA", flash_mla, exact, nbytes, flops, tolerance=QUANTISED, gpu=True, pick=pick),
        *([Contestant("torch", plain, exact, nbytes, flops, tolerance=QUANTISED, pick=pick)] if few else []),
    ], calls=24 if latent_bytes < 64e6 else 4)  # fmt: skip


def prefill(options: argparse.Namespace, clock: Clock) -> Iterator[Iterable[Case]]:
    heads = sizes(options, options.heads, [2], [16], [16])
    lengths = sizes(options, options.contexts, [80], [4096, 16384], [2048, 4096, 8192, 16384, 32768])
    for n in heads:
        yield (prefill_case(n, length, clock) for length in lengths)


def prefill_case(heads: int, length: int, clock: Clock) -> Case:
    """One prompt from the beginning. Ours expands keys and values from the latents; the others are given them."""
    device, draw = clock.device, random(clock.device, length)
    latents = normal(draw, math.ceil(length / PAGE), PAGE, C + ROPE)
    q_nope, q_pe = (normal(draw, length, heads, d) for d in (NOPE, ROPE))
    w_uk, w_uv = ((normal(draw, heads, d, C, dtype=torch.float32) * C**-0.5).bfloat16() for d in (NOPE, V))
    rows = sorted({round(i * (length - 1) / 31) for i in range(32)})
    c_kv, k_pe = latents.flatten(0, 1)[:length].split([C, ROPE], dim=-1)
    q = torch.cat((q_nope, q_pe), dim=-1).transpose(0, 1)  # (N, L, 192)
    k = torch.cat((c_kv @ w_uk.mT, k_pe.expand(heads, -1, -1)), dim=-1)  # (N, L, 192)
    v = c_kv @ w_uv.mT  # (N, L, 128)
    exact = []
    for head in range(heads):
        scores = q[head, rows].double() @ k[head].double().T * SCALE  # (rows, L)
        later = torch.arange(length, device=device) > torch.tensor(rows, device=device)[:, None]
        exact.append(scores.masked_fill(later, -math.inf).softmax(dim=-1) @ v[head].double())
    meant = torch.stack(exact, dim=1)  # (rows, N, 128)

    def ours(side: str) -> Callable[[], Run]:
        def build() -> Run:
            batch_type = ours_by_name("model").Batch
            mla = ours_by_name(side).mla
            batch = batch_type.pack([([0] * length, 0, list(range(len(latents))))], device)
            if side == "ops":
                queries = unrotated(q_nope, q_pe)
                return lambda _: mla(*queries, latents, batch, w_uk, w_uv, SCALE).unflatten(1, (len(w_uv), -1))
            return lambda _: mla(q_nope, q_pe, latents, batch, w_uk, w_uv, SCALE)

        return build

    def flex() -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=str(device))
        torch.compiler.reset()  # or it would compile for any length from the second on
        attend: Any = torch.compile(flex_attention)
        return lambda _: attend(q[None], k[None], v[None], block_mask=mask, scale=SCALE)[0].transpose(0, 1)

    def sdpa(backend: str) -> Callable[[], Run]:
        def build() -> Run:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            padded = F.pad(v, (0, NOPE + ROPE - V)) if backend == "FLASH_ATTENTION" else v  # one width for all three

            def call(_: int) -> torch.Tensor:
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    o = F.scaled_dot_product_attention(q[None], k[None], padded[None], is_causal=True, scale=SCALE)
                return o[0, ..., :V].transpose(0, 1)

            return call

        return build

    flops = float(heads) * length * (length + 1) * (NOPE + ROPE + V)
    nbytes = latents.nbytes + w_uk.nbytes + w_uv.nbytes + 2 * length * heads * (NOPE + ROPE + V)
    pick = lambda y: y[rows]  # noqa: E731
    peers = [("FlexAttention", flex), ("SDPA cuDNN", sdpa("CUDNN_ATTENTION")), ("SDPA flash", sdpa("FLASH_ATTENTION"))]
    return Case({"heads": heads, "length": length}, 2, [
        Contestant("mla", ours("ops"), meant, nbytes, flops, tolerance=QUANTISED, pick=pick),
        *(Contestant(name, build, meant, nbytes, flops, tolerance=QUANTISED, gpu=True, pick=pick)
          for name, build in peers),
        Contestant("torch", ours("reference"), meant, nbytes, flops, tolerance=QUANTISED, pick=pick),
    ], calls=2)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# sample
# --------------------------------------------------------------------------------------------------------------------

CUTS: dict[str, dict[str, Any]] = {"top-p": {"top_p": 0.95}, "top-k, top-p": {"top_k": 50, "top_p": 0.95}, "none": {}}


def sample(options: argparse.Namespace, clock: Clock) -> Iterator[Iterable[Case]]:
    rows = sizes(options, options.tokens, [1, 5], [1, 128], [1, 8, 32, 128, 256])
    vocab = 300 if options.smoke else 129_280
    for cut in list(CUTS)[:1] if options.quick else CUTS:
        yield (sample_case(m, vocab, cut, clock) for m in rows)


def sample_case(m: int, vocab: int, cut: str, clock: Clock) -> Case:
    distributions, draw = ours_by_name("distributions"), random(clock.device, m)
    params = [SamplingParams(temperature=0.7, **CUTS[cut])] * m
    sets = cold_sets(4 * m * vocab, clock)
    xs = [2.5 * normal(draw, m, vocab, dtype=torch.float32) for _ in range(sets)]
    choices = [torch.stack((torch.ones_like(best), best)) for best in (x.argmax(-1) for x in xs)]
    columns = distributions.Columns.of(params, vocab, clock.device, torch.rand(m).tolist())
    table = torch.zeros(len(distributions.Field), m, dtype=torch.float64, device=clock.device)
    table[0], table[1:6] = torch.arange(m), torch.cat((*columns[:4], *columns.more), dim=1).T

    def plain() -> Run:
        return lambda i: distributions.draw(distributions.probabilities(xs[i], params, columns), columns.more[0])

    def ours() -> Run:
        if clock.device.type == "cpu":
            metadata = distributions.SamplingMetadata(table.numpy(), params)
            return lambda i: distributions.sample(xs[i], choices[i], metadata)[0][2]
        kernel = ours_by_name("sample")
        return lambda i: kernel.launch(xs[i], choices[i], table)[2]

    exact, nbytes = plain()(0).double(), 4.0 * m * vocab
    return Case({"cut": cut, "m": m}, sets, [
        Contestant("sample", ours, exact, nbytes, 0.0),
        Contestant("torch", plain, exact, nbytes, 0.0),
    ])  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------


BENCHES: dict[str, Callable[[argparse.Namespace, Clock], Iterator[Iterable[Case]]]] = {
    "dense": dense, "moe": moe, "fused": fused, "router": router, "decode": decode, "prefill": prefill,
    "sample": sample,
}  # fmt: skip


def run_bench(
    name: str, options: argparse.Namespace, clock: Clock, peer: Peer | None, done: Callable[[Rows], None]
) -> None:
    """Runs one bench, printing a table for each group of shapes; `done` is given the rows of each case as it ends.

    Raises DeviceLost. A case that takes longer than options.patience, for a kernel that hangs, ends the process.
    """
    for group in BENCHES[name](options, clock):
        raced = []
        for case in group:
            if options.until and time.perf_counter() > options.until:
                return
            print(f"{name} {case.keys}", file=sys.stderr, flush=True)
            if clock.timing:
                faulthandler.dump_traceback_later(options.patience, exit=True)
            keys = list(case.keys)
            try:
                rows = race(case, clock, peer, options.only)
            except DeviceLost as e:
                done([{"bench": name, **row} for row in e.rows])
                raise
            finally:
                faulthandler.cancel_dump_traceback_later()
            raced += [rows] if rows else []
            done([{"bench": name, **row} for row in rows])
            del case  # its tensors make room for the next one's
            if clock.device.type == "cuda":
                torch.cuda.empty_cache()
        if raced:
            names = list(dict.fromkeys(row["contestant"] for rows in raced for row in rows))
            lines = [shown(rows, keys, names) for rows in raced]
            print(f"{report.table(header(keys, names), lines)}\n", flush=True)
        refused = [row for rows in raced for row in rows if "refused" in row]
        refusals = {f"{row['contestant']} refused: {row['refused']}" for row in refused}
        print(*sorted(refusals), sep="\n", end="\n\n" if refusals else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="bench", help=f"default: all ({', '.join(BENCHES)})")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M", help="dense, moe, fused, router, sample")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"), help="dense")
    parser.add_argument("--layout", nargs="+", choices=["split", "whole"], help="moe")
    parser.add_argument("--heads", type=int, nargs="+", help="decode, prefill")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="decode")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="L", help="decode, prefill")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contestants by their column's name")
    parser.add_argument("--v3", metavar="DIR", help="the V3 repository's inference folder (default: in .peers)")
    parser.add_argument("--peak", type=float, default=1979, help="dense FP8 TFLOPS; default: the H100's and H200's")
    parser.add_argument("--patience", type=float, default=400, metavar="SECONDS", help="for one case, at most")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="no further case begins after so long")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, no timing")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHES]
    if unknown:
        parser.error(f"no bench {unknown[0]!r} (there are {', '.join(BENCHES)})")
    options.until = time.perf_counter() + options.budget if options.budget else None
    clock = clock_for(options.smoke, options.peak)
    if clock is None:
        return 2
    print(f"{clock.name}, copy {clock.copy / 1e9:.0f} GB/s\n" if clock.timing else NO_TIMING + "\n")
    peer = find_v3(options.v3, clock.device)
    found: dict[str, Any] = {"copy_gb_per_s": clock.copy / 1e9, "peak_fp8_tflops": options.peak, "rows": []}
    if not clock.timing:
        found = {"no_timing": NO_TIMING, "rows": []}

    def done(rows: Rows) -> None:
        found["rows"] += rows
        report.save(options.output, found)  # at once, so that a run that is cut short leaves what it has

    try:
        for name in options.names or BENCHES:
            print(f"## {name}\n")
            run_bench(name, options, clock, peer, done)
    except DeviceLost as e:
        print(f"error: the device is lost, what was left is not run ({e})", file=sys.stderr)
        return 3
    finally:
        if peer is not None:
            peer.close()
    wrong = [row for row in found["rows"] if row.get("wrong")]
    refused = sum("refused" in row for row in found["rows"])
    for row in wrong:
        print("WRONG:", {key: value for key, value in row.items() if key != "wrong"})
    summary = {"benchmark": "kernel", "rows": len(found["rows"]), "wrong": len(wrong), "refused": refused}
    print(json.dumps(summary | ({} if clock.timing else {"no_timing": True})))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

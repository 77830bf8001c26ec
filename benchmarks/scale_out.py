"""DeepSeek-V3 on 8 to 320 GPUs by count: what each rank holds and exchanges, and how fast it could be at most.

    python benchmarks/scale_out.py --output benchmarks/results/scale_out.json             # layouts
    python benchmarks/scale_out.py --overlap --output benchmarks/results/overlap.json     # two batches that overlap

The arithmetic is plan.py's (engine/layouts.py). Layouts that the engine does not have are counted with it:

* Beyond 16 GPUs FP8 blocks cannot be split further: there each rank has whole experts (some of them twice, where the
  GPUs do not divide 256), and dense MLPs and shared experts belong to a lane.
* "dispatch" in place of gather and scatter-sum: a token crosses once to every other node that has one of its experts,
  and within a node once to every such rank; sums come back the same way. How many these are is simulated: V3's routing
  (4 of 8 groups, 8 experts) of uniform scores.

Two overlapping batches exchange one half of a step's tokens while they compute the other. Each half reads the weights
again, so that a step takes at least twice a half's reading and computing. Beside them: a scatter-sum that adds a node's
parts before they leave it.
"""

import argparse
import functools
import json
import math
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lib import CONFIGS, report

from core.config import ModelArgs, load_config
from core.numerics import Numerics
from core.run_config import RunConfig
from engine import layouts, memory, rank_memory
from engine.layouts import Bound, Chip, Layout, Links
from engine.rank_memory import ROUTED, RankSpec

V3 = "config_671B.json"
CONTEXT = 4989  # tokens of a sequence: the mean length of the latent cache that DeepSeek reports
GPUS = (8, 16, 32, 64, 128, 144, 256, 320)
LARGEST_SPLIT = 16  # ranks that share FP8 blocks of V3's widths
PREFILL_TOKENS = 2048  # of each lane in a step
TOKENS = 20_000  # of which the routing is simulated
NUM = Numerics(torch.bfloat16, "fp8")


class System(NamedTuple):
    name: str
    gb: int
    chip: Chip
    links: Links


# dense FP8 and BF16, NVLink and one 400 Gb/s port a GPU, each in one direction
H200 = System("H200", 141, Chip(4.8e12, 1979e12, 989e12), Links(450e9, 50e9, 8))
H800 = System("H800", 80, Chip(3.35e12, 1979e12, 989e12), Links(200e9, 50e9, 8))
# DeepSeek-V3/R1 Inference System Overview, tokens/s of a node of 8 H800 on average:
# https://github.com/deepseek-ai/open-infra-index/blob/main/202502OpenSourceWeek/day_6_one_more_thing_deepseekV3R1_inference_overview.md
PUBLISHED = {("H800", 32): {"prefill": 73_700, "cached": 0.563}, ("H800", 144): {"decode": 14_800}}


@functools.cache
def copies(args: ModelArgs, gpus: int, per_node: int = 8, tokens: int = TOKENS) -> tuple[float, float]:
    """Of a token of a random rank: the other nodes that have one of its experts, and the other ranks of all nodes that
    have one or pass on to one of their node; simulated."""
    generator = torch.Generator().manual_seed(0)
    e, groups = args.n_routed_experts, args.n_expert_groups
    scores = torch.rand(tokens, e, generator=generator)
    of_groups = scores.view(tokens, groups, -1).topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(of_groups).scatter_(1, of_groups.topk(args.n_limited_groups).indices, 1.0)
    chosen = (scores * kept.repeat_interleave(e // groups, 1)).topk(args.n_activated_experts).indices
    ranks = torch.zeros(tokens, gpus, dtype=torch.bool).scatter_(1, chosen * gpus // e, True)
    nodes = ranks.view(tokens, -1, per_node).any(-1)
    own = torch.randint(gpus, (tokens, 1), generator=generator)
    others = nodes.sum() - nodes.gather(1, own // per_node).sum()
    # within a node: from where a token arrives, or starts, to all other ranks there
    here = torch.zeros_like(ranks).scatter_(1, own, True)
    same_place = torch.zeros_like(ranks).view(tokens, -1, per_node)
    same_place.scatter_(2, (own % per_node).unsqueeze(-1).expand(-1, same_place.shape[1], 1), True)
    spread = (ranks & ~here & ~same_place.view(tokens, -1)).sum()
    return float(others) / tokens, float(spread) / tokens


def whole(rank: RankSpec, gpus: int, tp: int) -> Layout:
    """A layout of whole experts with MLPs in lanes, see above."""
    num = replace(rank.num, experts="whole", mlps_in_lane=True)
    lane = rank_memory.weight_bytes(replace(rank, num=num, ranks=tp))
    every = rank_memory.weight_bytes(replace(rank, num=num, ranks=1))
    held = -(-rank.args.n_routed_experts // gpus)
    parts = {key: every[key] * held // rank.args.n_routed_experts if key[1] == ROUTED else n for key, n in lane.items()}
    return Layout(replace(rank, num=num, ranks=gpus, lanes=gpus // tp), parts)


def candidates(rank: RankSpec, gpus: int, how: str) -> list[Layout]:
    if gpus <= LARGEST_SPLIT and how == "gather":
        return [found for found in layouts.layouts(rank, gpus, "split") if isinstance(found, Layout)]
    return [whole(rank, gpus, tp) for tp in (1, 2, 4, 8)]


def with_dispatch(layout: Layout, bound: Bound, system: System) -> Bound:
    """The same step with dispatch in place of gather and scatter-sum."""
    rank, args = layout.rank, layout.rank.args
    rows = math.ceil(bound.tokens / rank.lanes)
    nodes, spread = copies(args, rank.ranks, system.links.ranks_per_node)
    moved = rows / rank.tp * (layouts.row_bytes(rank, True) + args.dim * rank.num.dtype.itemsize)  # there and back
    one = moved * (nodes / system.links.network + spread / system.links.nvlink)
    of_lanes = [m for m in layouts.messages(layout, rows, 0) if m.group == "dp"]
    gathered = sum(layouts.seconds(rank, m, system.links) for m in of_lanes)
    in_layers = (args.n_layers - args.n_dense_layers) * one
    if rank.lanes == 1:
        return bound
    sent = bound.sent - sum(layouts.sent(rank, m) for m in of_lanes)
    sent += (args.n_layers - args.n_dense_layers) * moved * (nodes + spread)
    return bound._replace(exchange=bound.exchange - gathered + in_layers, sent=sent)


def decode(layout: Layout, system: System) -> Bound | None:
    """A step of as many sequences as fit beside a step that only decodes."""
    rank = layout.rank
    free = system.gb * 10**9 - sum(layout.weights.values())
    run = RunConfig(max_num_batched_tokens=1, max_model_len=CONTEXT)
    lane = memory.sequences_that_fit(rank, run, free)
    return layouts.decode_bound(layout, lane * rank.lanes, CONTEXT, 0, system.chip, system.links) if lane else None


def prefill(layout: Layout, system: System) -> Bound | None:
    """A step of PREFILL_TOKENS tokens in each lane; None if memory does not hold it beside the prompts' latents."""
    rank = layout.rank
    free = system.gb * 10**9 - sum(layout.weights.values())
    run = RunConfig(max_num_batched_tokens=PREFILL_TOKENS, max_model_len=CONTEXT, max_num_seqs=8, eager=True)
    if memory.sequences_that_fit(rank, run, free, 8) == 0:
        return None
    return layouts.prefill_bound(layout, PREFILL_TOKENS, CONTEXT, system.chip, system.links)


def figures(layout: Layout, bound: Bound) -> dict[str, Any]:
    rank = layout.rank
    return {
        "dp": rank.lanes, "tp": rank.tp, "experts": rank.experts, "weights": sum(layout.weights.values()),
        "sequences": bound.sequences, "tokens_per_second_node": bound.tokens / bound.seconds * 8 / rank.ranks,
        "ms": bound.seconds * 1e3, "exchange_ms": bound.exchange * 1e3, "mb_sent": bound.sent / 1e6,
    }  # fmt: skip


def best(found: list[tuple[Layout, Bound | None]]) -> tuple[Layout, Bound] | None:
    fit = [(layout, bound) for layout, bound in found if bound is not None]
    return max(fit, key=lambda pair: pair[1].tokens / pair[1].seconds) if fit else None


def tabulate(rank: RankSpec) -> list[dict[str, Any]]:
    rows = []
    for system in (H200, H800):
        for gpus in GPUS:
            row: dict[str, Any] = {"gpu": system.name, "gpus": gpus, "published": PUBLISHED.get((system.name, gpus))}
            for how in ("gather", "dispatch"):
                found = candidates(rank, gpus, how)
                for kind, bound_of in (("decode", decode), ("prefill", prefill)):
                    pairs = [(layout, bound_of(layout, system)) for layout in found]
                    if how == "dispatch":
                        pairs = [(x, b and with_dispatch(x, b, system)) for x, b in pairs]
                    chosen = best(pairs)
                    row[f"{kind}_{how}"] = chosen and figures(*chosen)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return rows


def node_first(layout: Layout, bound: Bound, system: System) -> float:
    """Seconds of exchange if scatter-sums add within a node first: they then send as much as gathers do."""
    rows = math.ceil(bound.tokens / layout.rank.lanes)
    found = [m for m in layouts.messages(layout, rows, 0) if m.collective == "scatter_sum"]
    less = (layouts.seconds(layout.rank, m, system.links) for m in found)
    more = (layouts.seconds(layout.rank, m._replace(collective="gather"), system.links) for m in found)
    return bound.exchange - sum(less) + sum(more)


def overlap(rank: RankSpec) -> list[dict[str, Any]]:
    """Exchange beside everything else in steps of several sizes, and what two overlapping halves would take."""
    slow = H800._replace(name="H800, 200 Gb/s", links=H800.links._replace(network=25e9))
    rows = []
    for system, gpus, lanes in ((H200, 8, 8), (H200, 8, 1), (H800, 16, 16), (H800, 16, 2), (slow, 16, 16)):
        split = replace(rank, ranks=gpus, lanes=lanes, num=replace(rank.num, experts="split"))
        layout = Layout(split, rank_memory.weight_bytes(split))
        for kind, sizes in (("decode", (8, 32, 64)), ("prefill", (256, 2048))):
            for rows_of_lane in sizes if lanes > 1 or kind == "prefill" else (n * 2 for n in sizes):

                def bound(n: int, kind: str = kind, layout: Layout = layout, system: System = system) -> Bound:
                    if kind == "decode":
                        return layouts.decode_bound(layout, n * layout.rank.lanes, 4096, 0, system.chip, system.links)
                    return layouts.prefill_bound(layout, n, 4096, system.chip, system.links)

                step, half = bound(rows_of_lane), bound(rows_of_lane // 2)
                busy, of_halves = step.linear + step.attention, 2 * (half.linear + half.attention)
                rows.append({
                    "system": system.name, "gpus": gpus, "dp": lanes, "tp": gpus // lanes, "kind": kind,
                    "rows": rows_of_lane, "mb_sent": step.sent / 1e6, "exchange_ms": step.exchange * 1e3,
                    "busy_ms": busy * 1e3, "halves_busy_ms": of_halves * 1e3,
                    "node_first_exchange_ms": node_first(layout, step, system) * 1e3,
                    "overlapped_ms": max(of_halves, 2 * half.exchange) * 1e3,
                    "gain": step.seconds / max(of_halves, 2 * half.exchange),
                })  # fmt: skip
    return rows


def layouts_table(results: dict[str, Any]) -> str:
    """A line to each number of GPUs, figures of a node."""

    def cell(found: dict[str, Any] | None) -> str:
        if found is None:
            return "–"
        return f"{found['tokens_per_second_node'] / 1e3:,.1f}"

    lines = []
    for row in results["rows"]:
        step = row["decode_dispatch"] or row["decode_gather"]
        name = f"{row['gpus']} × {row['gpu']}"
        if step is None:
            lines.append([name, "the weights do not fit", *["–"] * 8])
            continue
        gathered, published = row["decode_gather"], row["published"] or {}
        said = "–"
        if "prefill" in published:
            said = f"{published['prefill'] / 1e3:.1f} in, {100 * published['cached']:.1f} % of it cached"
        elif published:
            said = f"{published['decode'] / 1e3:.1f} out"
        lines.append([
            name, f"{gathered['dp']} × {gathered['tp']}, {gathered['experts']}", f"{gathered['weights'] / 1e9:.1f}",
            f"{gathered['sequences']:,}", f"{gathered['mb_sent'] / 1e3:.2f} / {step['mb_sent'] / 1e3:.2f}",
            f"{gathered['ms']:.0f} / {step['ms']:.0f}", cell(gathered), cell(row["decode_dispatch"]),
            f"{cell(row['prefill_gather'])} / {cell(row['prefill_dispatch'])}", said,
        ])  # fmt: skip
    header = ["GPUs", "dp × tp, experts", "weights a rank, GB", f"sequences of {results['context']:,}",
              "a rank sends a step, GB, gather / dispatch", "a step, ms", "decode, gather", "decode, dispatch",
              "prefill, gather / dispatch", "DeepSeek publishes"]  # fmt: skip
    return report.table(header, lines)


def overlap_table(results: dict[str, Any]) -> str:
    lines = [
        [
            f"{row['gpus']} × {row['system']}, {row['dp']} × {row['tp']}", f"{row['kind']}, {row['rows']:,}",
            f"{row['mb_sent'] / 1e3:.2f}", f"{row['exchange_ms']:.1f}", f"{row['busy_ms']:.1f}",
            f"{row['halves_busy_ms']:.1f}", f"{row['gain']:.2f}",
            f"{(row['busy_ms'] + row['exchange_ms']) / (row['busy_ms'] + row['node_first_exchange_ms']):.2f}",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    header = ["GPUs, dp × tp", "a step, tokens of a lane", "a rank sends, GB", "exchange, ms", "all else, ms",
              "all else in two halves, ms", "two batches, × at most", "a node's sum first, × at most"]  # fmt: skip
    return report.table(header, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--overlap", action="store_true", help="two overlapping batches instead of layouts")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    rank = RankSpec(load_config(CONFIGS / V3), NUM, mtp=True)
    if options.overlap:
        rows = overlap(rank)
        report.save(options.output, {"rows": rows}, kind="counted")
    else:
        routed = {gpus: copies(rank.args, gpus) for gpus in GPUS}
        rows = tabulate(rank)
        results = {"rows": rows, "context": CONTEXT, "prefill_tokens": PREFILL_TOKENS, "copies": routed}
        report.save(options.output, results, kind="simulated")
    print(json.dumps({"benchmark": "scale-out", "rows": len(rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

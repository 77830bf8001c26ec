"""Says what a run would take, before anything is loaded: memory of each rank, what fits on which GPU, how fast decoding
can be at most; and which layout of ranks is the best for a load. Only the config, and a checkpoint's headers, are read.

  python plan.py --config configs/config_671B.json --tp 8 --max-model-len 32768 --max-num-seqs 32
  python plan.py --ckpt-path CKPT --tp 2 --device cpu --json
  python plan.py --config configs/config_671B.json --world-size 16 --concurrency 500 --context 4096
  python plan.py --config configs/config_671B.json --world-size 16 --pp 2 --concurrency 500 --network 1.25

Exit status: 0; 2 wrong use, or a model or checkpoint that cannot be run so.
"""

if __name__ == "__main__":
    from cli.interrupts import end_process_on_interrupt

    end_process_on_interrupt()

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cli.flags import Parser, add_run_flags, device, output_errors, positive, positive_number, run_config
from cli.main import run_command
from core.errors import UserError, warn
from core.run_config import PAGE_SIZE, RunConfig

if TYPE_CHECKING:  # torch takes seconds to import: a mistyped flag is answered without it
    from checkpoint.partition import Partition
    from engine import layouts as counted
    from engine import memory as budget
    from engine import rank_memory

GPUS = (80, 96, 141, 192)  # GB a card is sold with; its driver may report more
GPU_BANDWIDTHS = [3.35, 4.8]  # TB/s: H100 and H200
GPU_TFLOPS = [1979.0, 989.0]  # FP8 and BF16, dense: H100, H200, H800
GPU_MEMORY = 141.0  # GB of the ranks in a table of layouts: H200
SEQUENCES = (1, 8, 32, 128)
RUN_FLAGS = (
    "pp", "pp_layers", "max_num_seqs", "max_num_batched_tokens", "mtp", "dtype", "gemm", "kv_cache_dtype", "experts",
    "eager",
)  # fmt: skip
RANKS = (*range(1, 17), 24, 32, 48, 64, 128)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises UserError for wrong use."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt-path", metavar="DIR", help="a checkpoint; or only")
    add("--config", metavar="FILE", help="the model's config")
    add("--tp", type=positive, metavar="N", help="ranks of a lane or a stage, tensor parallel (default: 1)")
    add("--dp", type=positive, metavar="N", help="data-parallel lanes of so many ranks (default: 1)")
    add("--world-size", type=positive, metavar="N",
        help="tabulate every layout of N ranks: dp x tp, experts; with --pp this pipeline too (with --concurrency "
             "default: dp x tp, or pp x tp)")  # fmt: skip
    add("--concurrency", type=positive, metavar="N",
        help="recommend a layout for N sequences of --context tokens at a time")  # fmt: skip
    add("--device", type=device, default="cuda", metavar="DEVICE", help="what the ranks run on (default: GPUs)")
    add("--max-model-len", type=positive, metavar="N", help="tokens of a sequence (default: as the model allows)")
    add_run_flags(parser, RUN_FLAGS)
    add("--context", type=positive, metavar="N", help="tokens of each sequence while decoding (default: 4096 at most)")
    add("--bandwidth", type=positive_number("TB/s", 1000), nargs="+", metavar="TB/S",
        help="of a rank's memory, for the decode limit (default: on GPUs 3.35 4.8, else none shown)")  # fmt: skip
    add("--memory", type=positive_number(), metavar="GB", help="of a rank, for layouts (default: 141, an H200's)")
    add("--tflops", type=positive_number(), nargs=2, metavar=("FP8", "BF16"),
        help="of a rank, for layouts (default: 1979 989, an H100's, H200's or H800's)")  # fmt: skip
    add("--nvlink", type=positive_number(), default=450.0, metavar="GB/S",
        help="a rank sends to others of its node, for layouts (default: 450; H800: 200)")  # fmt: skip
    add("--network", type=positive_number(), default=50.0, metavar="GB/S",
        help="a rank sends to other nodes, for layouts (default: 50, InfiniBand NDR)")  # fmt: skip
    add("--ranks-per-node", type=positive, default=8, metavar="N", help="ranks of a node, for layouts (default: 8)")
    add("--json", action="store_true", help="one JSON object; sizes in bytes, times in seconds")
    options = parser.parse_args(arguments)
    if options.ckpt_path is None and options.config is None:
        parser.error("give --config or --ckpt-path")
    world = options.world_size
    options.any_dp = world is not None and options.tp is None and options.dp is None and options.pp == 1
    options.dp = options.dp or 1
    run_config(options)  # raises for values that no run can have
    divided, parts = ("--pp", options.pp) if options.pp > 1 else ("--dp", options.dp)
    if world is not None and world % parts:
        parser.error(f"{divided} {parts} does not divide {world} ranks")
    if options.tp is None:
        options.tp = 1 if world is None else world // parts
    if world not in (None, parts * options.tp):
        parser.error(f"{divided} {parts} times --tp {options.tp} are {parts * options.tp} ranks, "
                     f"--world-size says {world}")  # fmt: skip
    lists_layouts = world is not None or options.concurrency is not None
    if lists_layouts and options.device != "cuda" and not (options.bandwidth and options.tflops and options.memory):
        parser.error(f"layouts on {options.device} need --memory, --bandwidth and --tflops")
    return options


def describe(options: argparse.Namespace) -> tuple[list["rank_memory.RankSpec"], RunConfig, str]:
    """The rank asked for, or one of each stage, and the run, and a line about the numerics. Raises UserError for a bad
    config, a checkpoint that is incomplete or contradicts it, and numbers of ranks or stages that do not divide the
    model."""
    import torch

    from checkpoint.directory import Checkpoint, choose_args
    from checkpoint.partition import Partition
    from checkpoint.table import expected_tensors, quantised_rows
    from core import devices
    from core.config import load_config
    from core.stages import divide as divide_layers
    from engine import rank_memory, setup, stage_layouts
    from engine.choose_numerics import choose_numerics, describe_rounding

    on = devices.parse(options.device) if options.device != "cuda" else torch.device("cuda")  # GPUs need not be here
    checkpoint = None if options.ckpt_path is None else Checkpoint(options.ckpt_path)
    specs, world = None, options.dp * options.tp
    if checkpoint is None:
        args = load_config(options.config)
        has_mtp = args.n_mtp_layers > 0
    else:
        args = choose_args(checkpoint, options.config)
        has_mtp = args.n_mtp_layers > 0 and checkpoint.has_mtp
        specs = checkpoint.expected(args)
    gpu = on.type == "cuda"
    num, says = choose_numerics(args, on, options.dtype, options.gemm, True if gpu else None, specs)
    for text in args.warnings:
        warn(text)
    for text in describe_rounding(specs or {}, num):
        warn(text)
    rows = quantised_rows(specs or expected_tensors(args, args.is_quantised), num)

    def divide(lanes: int) -> Partition:
        if checkpoint is None:
            return Partition.choose(args, world, options.experts, quantised=rows, lanes=lanes)
        return checkpoint.partition(args, world, options.experts, rows, lanes, options.pp)

    partition = first_that_works(divide, world) if options.any_dp else divide(options.dp)
    if checkpoint is not None:
        checkpoint.match(checkpoint.partition_of_files(partition))
    num = replace(num, fp8_latents=options.kv_cache_dtype == "fp8", experts=partition.experts,
                  mlps_in_lane=partition.mlps_in_lane)  # fmt: skip
    rank = rank_memory.RankSpec(args, num, world, gpu, has_mtp, not gpu and on.type != "cpu", partition.lanes)
    config = setup.check_limits(run_config(options), args, has_mtp)
    converted = None if checkpoint is None else checkpoint.layers_of_stages(args, world, options.pp)
    stages = divide_layers(args, options.pp, options.pp_layers or converted, has_mtp)
    return stage_layouts.on_stages(rank, stages), config, says


def first_that_works(divide: Callable[[int], "Partition"], world: int) -> "Partition":
    """That with the fewest lanes. Raises the UserError of one lane if there is none."""
    error: UserError | None = None
    for lanes in (n for n in range(1, world + 1) if world % n == 0):
        try:
            return divide(lanes)
        except UserError as e:
            error = error or e
    assert error is not None
    raise error


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """All that is printed, as plain data: sizes in bytes, times in seconds. Raises UserError as `describe` does."""
    stages, config, says = describe(options)
    from core import devices
    from engine import memory, rank_memory, setup

    pages = config.pp * config.seqs_per_microbatch * config.pages_per_sequence
    needs = [memory.need(stage, config, cache=pages * rank_memory.page_bytes(stage)) for stage in stages]
    wanted = max(needs, key=lambda need: need.total)
    rank = stages[needs.index(wanted)]
    parts: dict[str, int] = {}
    for (mtp, part), n in rank_memory.weight_bytes(rank).items():
        name = rank_memory.MTP if mtp else part
        parts[name] = parts.get(name, 0) + n
    sizes = {f"{n} GB": n * 10**9 for n in GPUS}
    if not rank.gpu and (free := setup.free_memory(devices.parse(options.device))):
        sizes = {"free here": free}
    bandwidths = options.bandwidth or (GPU_BANDWIDTHS if rank.gpu else [])
    context = min(options.context or 4096, config.max_model_len or rank.args.max_seq_len)
    return {
        "model": {
            "parameters": rank_memory.parameters(replace(rank, stage=None)),
            "mtp_parameters": rank_memory.parameters(replace(rank, stage=None), mtp=True),
        },
        "run": {
            "ranks": config.pp * rank.ranks, "dp": rank.lanes, "tp": rank.tp, "pp": config.pp,
            "device": options.device, "numerics": says,
            "experts": rank.experts,
            "max_model_len": config.max_model_len, "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_step_tokens, "mtp": config.mtp,
            "kv_cache_dtype": options.kv_cache_dtype,
        },
        "stages": stage_rows(stages, needs, config) if config.pp > 1 else None,
        "rank": {
            "weights": {part: parts[part] for part in (*rank_memory.PARTS, rank_memory.MTP) if part in parts},
            "packing": wanted.packing,
            "latents": {"of_a_token": rank_memory.latent_bytes(rank), "pages": pages, "bytes": wanted.cache},
            "activations": wanted.step,
            "graphs": wanted.graphs,
            "total": wanted.total,
        },
        "fits": {name: room(stages, config, size) for name, size in sizes.items()},
        "ranks": list(other_ranks(stages, config, sizes, options.experts)),
        "decode": [decode(stages, config, sequences, context, bandwidths) for sequences in SEQUENCES],
        "layouts": layouts(options, stages, config, context) if options.world_size or options.concurrency else None,
    }  # fmt: skip


def stage_rows(
    stages: list["rank_memory.RankSpec"], needs: list["budget.MemoryBudget"], config: RunConfig
) -> list[dict[str, Any]]:
    """What each stage of a pipeline costs, holds and gives to the next."""
    from core.stages import stage_costs
    from engine import rank_memory, stage_layouts

    args = stages[0].args
    costs = stage_costs(args, [stage.layers for stage in stages], stages[0].mtp)
    rows = config.seqs_per_microbatch * (1 + config.mtp)
    return [
        {
            "layers": [stage.layers.layers.start, stage.layers.layers.stop - 1],
            "cost": cost / sum(costs),
            "weights": need.weights,
            "latents": {"of_a_token": rank_memory.latent_bytes(stage), "bytes": need.cache},
            "total": need.total,
            "sends": {
                "a_token": stage_layouts.boundary_bytes(stage, 1),
                "decode_step": stage_layouts.boundary_bytes(stage, rows),
                "largest_step": stage_layouts.boundary_bytes(stage, config.max_step_tokens),
            },
        }
        for stage, need, cost in zip(stages, needs, costs, strict=True)
    ]


def room(stages: list["rank_memory.RankSpec"], config: RunConfig, size: int) -> dict[str, Any]:
    """What so much memory of each rank has room for beside the weights and the largest step, in all lanes, or in the
    microbatches of a pipeline, as far as every stage has the room."""
    from engine import memory, rank_memory

    lanes, free = stages[0].lanes, [size - sum(rank_memory.weight_bytes(stage).values()) for stage in stages]
    pages = min(memory.pages_that_fit(stage, config, n) for stage, n in zip(stages, free, strict=True)) // config.pp
    return {
        "memory": size,
        "weights_fit": min(free) >= 0,
        "tokens": lanes * config.pp * pages * PAGE_SIZE,
        "sequences": lanes * config.pp * (pages // config.pages_per_sequence),
    }


def other_ranks(
    stages: list["rank_memory.RankSpec"], config: RunConfig, sizes: dict[str, int], experts: Any
) -> Iterator[dict[str, Any]]:
    """Numbers of ranks in as many lanes or stages, with the most weights of one and the tokens that memories have room
    for, or why they do not do."""
    from engine import memory, rank_memory

    lanes = stages[0].lanes
    for ranks in sorted({*(n * lanes for n in RANKS if n * lanes <= RANKS[-1]), stages[0].ranks}):
        others = [memory.with_ranks(stage, ranks, experts) for stage in stages]
        if problem := memory.partition_error(others[0]):
            yield {"ranks": config.pp * ranks, "problem": problem}
            continue
        yield {
            "ranks": config.pp * ranks,
            "experts": others[0].experts,
            "weights": max(sum(rank_memory.weight_bytes(other).values()) for other in others),
            "tokens": {name: room(others, config, size)["tokens"] for name, size in sizes.items()},
        }


def decode(
    stages: list["rank_memory.RankSpec"], config: RunConfig, sequences: int, context: int, bandwidths: list[float]
) -> dict[str, Any]:
    """What a decode step reads, and how many steps a second that allows. In a pipeline a stage reads it for each
    microbatch; shown is the stage that reads the most."""
    from engine import rank_memory

    microbatches = min(sequences, config.pp)
    rows = -(-sequences // config.pp)
    reads = [rank_memory.decode_reads(stage, rows, context, config.mtp) for stage in stages]
    read = max(reads, key=lambda read: read.weights + read.latents)
    total = max(microbatches * (read.weights + read.latents), sum(read.weights + read.latents for read in reads))
    return {
        "sequences": sequences,
        "experts": read.experts,
        "weights": read.weights,
        "context": context,
        "latents": read.latents,
        "seconds": {str(tb): total / (tb * 1e12) for tb in bandwidths},
    }


def layouts(
    options: argparse.Namespace, stages: list["rank_memory.RankSpec"], config: RunConfig, context: int
) -> dict[str, Any]:
    """Every layout of as many ranks, what it holds and how fast it is at most; and which is the best for the load. A
    pipeline that was asked for comes last."""
    from engine import layouts as counted
    from engine import stage_layouts

    memory, bandwidth = options.memory or GPU_MEMORY, (options.bandwidth or GPU_BANDWIDTHS)[-1]
    flops = options.tflops or GPU_TFLOPS
    chip = counted.Chip(bandwidth * 1e12, *(t * 1e12 for t in flops))
    links = counted.Links(options.nvlink * 1e9, options.network * 1e9, options.ranks_per_node)
    rows, problems = [], []
    one = replace(stages[0], stage=None)
    load = int(memory * 1e9), context, options.concurrency, chip, links
    without = replace(config, pp=1, pp_layers=None)
    for layout in counted.layouts(one, config.pp * one.ranks, options.experts):
        if isinstance(layout, tuple):
            problems.append({"dp": layout[0], "problem": layout[1]})
            continue
        rows.append(counted.evaluate(layout, without, *load))
    for layout in counted.layouts(one, one.ranks, options.experts) if config.pp > 1 else ():
        if not isinstance(layout, tuple) and layout.rank.lanes == 1:
            ranks = stage_layouts.on_stages(layout.rank, [stage.layers for stage in stages])
            rows.append(stage_layouts.evaluate(ranks, config, *load))
    best = counted.recommend(rows, options.concurrency) if options.concurrency else None
    return {
        "ranks": config.pp * one.ranks, "context": context, "concurrency": options.concurrency,
        "max_num_batched_tokens": config.max_num_batched_tokens, "memory": int(memory * 1e9),
        "bandwidth": chip.bandwidth, "flops": {"fp8": chip.fp8, "bf16": chip.bf16},
        "links": {"nvlink": links.nvlink, "network": links.network, "ranks_per_node": links.ranks_per_node},
        "rows": [row_of(row) for row in rows],
        "problems": problems,
        "recommended": best and {"dp": best[0].layout.rank.lanes, "tp": best[0].layout.rank.tp, "pp": best[0].stages,
                                 "experts": best[0].layout.rank.experts, "why": best[1]},
    }  # fmt: skip


def row_of(row: "counted.Row") -> dict[str, Any]:
    """What is printed of a layout; times, bytes and operations are a rank's."""
    rank = row.layout.rank
    found: dict[str, Any] = {
        "dp": rank.lanes, "tp": rank.tp, "pp": row.stages, "experts": rank.experts, "weights": row.weights,
        "tokens": row.tokens, "most_sequences": row.most_sequences,
    }  # fmt: skip
    for name, bound in (("decode", row.decode), ("prefill", row.prefill)):
        found[name] = bound and bound._asdict() | {
            "seconds": bound.seconds,
            "tokens_per_second": (bound.sequences if name == "decode" else bound.tokens) / bound.seconds,
        }
    return found


# --------------------------------------------------------------------------------------------------------------------
# As text
# --------------------------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The plan for people. GB are 10^9 bytes."""
    model, run, rank = found["model"], found["run"], found["rank"]
    more = f", {model['mtp_parameters'] / 1e9:.1f} billion in the MTP module" if model["mtp_parameters"] else ""
    yield f"{model['parameters'] / 1e9:.1f} billion parameters{more}; {run['numerics']}"
    shared = "" if run["ranks"] == 1 else {"whole": ", experts whole", "split": ", experts split on their inner width"}[
        run["experts"]]  # fmt: skip
    lanes = "" if run["dp"] == 1 else f" in {run['dp']} lanes of {run['tp']}"
    lanes = lanes if run["pp"] == 1 else f" in {run['pp']} pipeline stages of {run['tp']}"
    yield f"{run['ranks']} rank{'s' * (run['ranks'] > 1)}{lanes}{shared}; GB are 10^9 bytes"
    yield ""
    if found["stages"]:
        yield from stage_lines(found["stages"], run)
        yield ""
    which = "one rank" if run["pp"] == 1 else "a rank of the stage that needs the most"
    yield f"{which + ' holds':<60}{'GB':>8}"
    for part, n in rank["weights"].items():
        yield f"  {part:<58}{n / 1e9:8.2f}"
    yield f"{'weights':<60}{sum(rank['weights'].values()) / 1e9:8.2f}"
    if rank["packing"]:
        yield f"{'  while they are packed, before there are latents':<60}{rank['packing'] / 1e9:8.2f}"
    latents = rank["latents"]
    of_a_lane = "" if run["dp"] == 1 else ", a lane's"
    text = f"latents of {run['max_num_seqs']} x {run['max_model_len']:,} tokens, {latents['of_a_token']:,} bytes each"
    yield f"{text:<60}{latents['bytes'] / 1e9:8.2f}"
    text = f"tensors of the largest step, {run['max_num_batched_tokens']:,} tokens{of_a_lane}"
    yield f"{text:<60}{rank['activations'] / 1e9:8.2f}"
    if rank["graphs"]:
        yield f"{'CUDA graphs: tensors of the largest step, and more':<60}{rank['graphs'] / 1e9:8.2f}"
    yield f"{'together':<60}{rank['total'] / 1e9:8.2f}"
    yield ""
    if run["dp"] > 1 or run["pp"] > 1:
        yield f"all {'lanes' if run['pp'] == 1 else 'microbatches'} together:"
    yield f"{'memory of a rank':<22}{'tokens of cache':>16}{'sequences of ' + format(run['max_model_len'], ','):>26}"
    for name, fit in found["fits"].items():
        size = f"{fit['memory'] / 1e9:.1f} GB {name}" if name == "free here" else name
        why = "" if fit["tokens"] else "no room for latents" if fit["weights_fit"] else "the weights do not fit"
        yield f"{size:<22}{fit['tokens']:>16,}{fit['sequences']:>26,}   {why}".rstrip()
    yield ""
    yield "ranks  experts  weights, GB" + "".join(f"{'tokens, ' + name:>18}" for name in found["fits"])
    problems: dict[str, list[str]] = {}
    for other in found["ranks"]:
        if "problem" in other:
            of = other["ranks"] // run["pp"]
            said = other["problem"].replace(f" {of} ranks", " so many ranks" if run["pp"] == 1 else " a stage's ranks")
            said = said.replace(f"a lane's {other['ranks'] // run['dp']} ranks", "a lane's ranks")
            problems.setdefault(said, []).append(str(other["ranks"]))
            continue
        held = "".join(f"{n:>18,}" if n else f"{'-':>18}" for n in other["tokens"].values())
        yield f"{other['ranks']:5}  {other['experts']:<7}{other['weights'] / 1e9:13.2f}{held}"
    for said, counts in problems.items():
        yield f"not {', '.join(counts)}: {said}"
    yield ""
    context = found["decode"][0]["context"]
    if found["decode"][0]["seconds"]:
        yield f"decode at most, {context:,} tokens of context a sequence; communication left out"
    else:
        yield f"a decode step reads, {context:,} tokens of context a sequence (--bandwidth says how fast that can be)"
    times = "".join(f"{'ms at ' + tb + ' TB/s':>18}{'tokens/s':>10}" for tb in found["decode"][0]["seconds"])
    yield f"sequences  experts read  weights, GB  latents, GB{times}"
    for step in found["decode"]:
        times = "".join(f"{s * 1e3:18.2f}{step['sequences'] / s:10,.0f}" for s in step["seconds"].values())
        yield (f"{step['sequences']:9}{step['experts']:14.1f}{step['weights'] / 1e9:13.2f}"
               f"{step['latents'] / 1e9:13.2f}{times}")  # fmt: skip
    if run["pp"] > 1:
        yield "(in a step every stage runs each microbatch once; GB are of one, in the stage that reads the most)"
    if run["mtp"]:
        yield f"(a step verifies {run['mtp']} drafted and makes as many; tokens/s times the tokens a step then gives)"
    if run["experts"] == "whole" and run["ranks"] > 1:
        yield "(of the mean rank: with whole experts a step waits for the one whose experts are chosen most)"
    if found["layouts"]:
        yield ""
        yield from layout_lines(found["layouts"])


def stage_lines(stages: list[dict[str, Any]], run: dict[str, Any]) -> Iterator[str]:
    yield "stage  layers   cost of a token  weights, GB  latents, GB  together, GB"
    for i, stage in enumerate(stages):
        layers = "{}-{}".format(*stage["layers"])
        yield (f"{i:5}  {layers:<7}{stage['cost']:16.1%}{stage['weights'] / 1e9:13.2f}"
               f"{stage['latents']['bytes'] / 1e9:13.2f}{stage['total'] / 1e9:14.2f}")  # fmt: skip
    sends = stages[0]["sends"]
    yield (f"each rank gives the next stage {sends['a_token']:,} bytes a token, {sends['decode_step'] / 1e6:.3f} MB of "
           f"a microbatch that decodes,")  # fmt: skip
    yield f"{sends['largest_step'] / 1e6:.1f} MB of the largest step, {run['max_num_batched_tokens']:,} tokens"


def layout_lines(found: dict[str, Any]) -> Iterator[str]:
    links, flops = found["links"], found["flops"]
    yield (f"layouts of {found['ranks']} ranks for sequences of {found['context']:,} tokens; a rank has "
           f"{found['memory'] / 1e9:g} GB, {found['bandwidth'] / 1e12:g} TB/s,")  # fmt: skip
    within, beyond = (f"{links[name] / 1e9:g}" for name in ("nvlink", "network"))
    speeds = f"{within} GB/s in a node of {links['ranks_per_node']}, {beyond} to others"
    yield f"{flops['fp8'] / 1e12:g} TFLOPS in FP8 and {flops['bf16'] / 1e12:g} in BF16, and sends {speeds}"
    yield f"{'':46}{'':18}{'a step that decodes':>33}{'prefill':>11}"
    yield (f"{'dp':>4}{'tp':>4}  experts{'weights, GB':>13}{'tokens of cache':>17}{'most':>7}"
           f"{'sequences':>11}{'MB a layer':>12}{'MB sent':>9}{'ms':>8}{'tokens/s':>10}{'tokens/s':>11}")  # fmt: skip
    for row in found["rows"]:
        dp = row["dp"] if row["pp"] == 1 else f"pp{row['pp']:>2}"
        held = f"{dp:>4}{row['tp']:4}  {row['experts']:<7}{row['weights'] / 1e9:13.1f}"
        if not (step := row["decode"]):
            yield f"{held}{'no room for a sequence':>24}"
            continue
        yield (f"{held}{row['tokens']:>17,}{row['most_sequences']:>7,}{step['sequences']:>11,}"
               f"{step['sent_layer'] / 1e6:12.2f}{step['sent'] / 1e6:9.0f}{step['seconds'] * 1e3:8.2f}"
               f"{step['tokens_per_second']:10,.0f}{row['prefill']['tokens_per_second']:11,.0f}")  # fmt: skip
    for text in dict.fromkeys(other["problem"] for other in found["problems"]):
        lanes = ", ".join(str(other["dp"]) for other in found["problems"] if other["problem"] == text)
        yield f"not --dp {lanes}: {text}"
    tokens = f"{found['max_num_batched_tokens']:,} tokens of a lane"
    yield f"(bounds, latencies left out; MB are what a rank sends; prefill is counted for steps of {tokens})"
    if found["recommended"]:
        best = found["recommended"]
        divided = f"--dp {best['dp']}" if best["pp"] == 1 else f"--pp {best['pp']}"
        name = f"{divided} --tp {best['tp']}, experts {best['experts']}"
        yield f"for {found['concurrency']:,} sequences at a time: {name}"
        yield f"  {best['why']}"
    elif found["concurrency"]:
        yield f"no layout holds a sequence of {found['context']:,} tokens: more ranks, or more memory"


def main() -> int:
    def run(options: argparse.Namespace) -> int:
        found = plan(options)
        with output_errors():
            print(json.dumps(found, indent=2) if options.json else "\n".join(lines(found)), flush=True)
        return 0

    return run_command(parse, run)


if __name__ == "__main__":
    sys.exit(main())

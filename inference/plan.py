"""Says what a run would take, before anything is loaded: memory of each rank, what fits on which GPU, how fast decoding
can be at most. Only the config, and a checkpoint's headers, are read.

  python plan.py --config configs/config_671B.json --tp 8 --max-model-len 32768 --max-num-seqs 32
  python plan.py --ckpt-path CKPT --tp 2 --device cpu --json

Exit status: 0; 2 wrong use, or a model or checkpoint that cannot be run so.
"""

if __name__ == "__main__":
    from cli.interrupts import end_process_on_interrupt

    end_process_on_interrupt()

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cli.flags import Parser, add_run_flags, device, output_errors, positive, run_config
from cli.main import run_command
from core.errors import warn
from core.run_config import PAGE_SIZE, RunConfig

if TYPE_CHECKING:  # torch takes seconds to import: a mistyped flag is answered without it
    from engine import rank_memory

GPUS = (80, 96, 141, 192)  # GB a card is sold with; its driver may report more
GPU_BANDWIDTHS = [3.35, 4.8]  # TB/s: H100 and H200
SEQUENCES = (1, 8, 32, 128)
RUN_FLAGS = ("max_num_seqs", "max_num_batched_tokens", "mtp", "dtype", "gemm", "kv_cache_dtype", "experts", "eager")
RANKS = (*range(1, 17), 24, 32, 48, 64, 128)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises UserError for wrong use."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt-path", metavar="DIR", help="a checkpoint; or only")
    add("--config", metavar="FILE", help="the model's config")
    add("--tp", type=positive, default=1, metavar="N", help="ranks (default: 1)")
    add("--device", type=device, default="cuda", metavar="DEVICE", help="what the ranks run on (default: GPUs)")
    add("--max-model-len", type=positive, metavar="N", help="tokens of a sequence (default: as the model allows)")
    add_run_flags(parser, RUN_FLAGS)
    add("--context", type=positive, metavar="N", help="tokens of each sequence while decoding (default: 4096 at most)")
    add("--bandwidth", type=bandwidth, nargs="+", metavar="TB/S",
        help="of a rank's memory, for the decode limit (default: on GPUs 3.35 4.8, else none shown)")  # fmt: skip
    add("--json", action="store_true", help="one JSON object; sizes in bytes, times in seconds")
    options = parser.parse_args(arguments)
    if options.ckpt_path is None and options.config is None:
        parser.error("give --config or --ckpt-path")
    run_config(options)  # raises for values that no run can have
    return options


def bandwidth(text: str) -> float:
    if not 0 < (value := float(text)) < 1000:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of TB/s")
    return value


def describe(options: argparse.Namespace) -> tuple["rank_memory.RankSpec", RunConfig, str]:
    """The rank and the run asked for, and a line about the numerics. Raises UserError for a bad config, a checkpoint
    that is incomplete or contradicts it, and numbers of ranks that do not divide the model."""
    import torch

    from checkpoint.directory import Checkpoint, choose_args
    from checkpoint.partition import Partition
    from checkpoint.table import expected_tensors, quantised_rows
    from core import devices
    from core.config import load_config
    from engine import rank_memory, setup

    on = devices.parse(options.device) if options.device != "cuda" else torch.device("cuda")  # GPUs need not be here
    checkpoint = None if options.ckpt_path is None else Checkpoint(options.ckpt_path)
    specs = None
    if checkpoint is None:
        args = load_config(options.config)
        has_mtp = args.n_mtp_layers > 0
    else:
        args = choose_args(checkpoint, options.config)
        has_mtp = args.n_mtp_layers > 0 and checkpoint.has_mtp
        specs = checkpoint.expected(args)
    gpu = on.type == "cuda"
    num, says = setup.choose_numerics(args, on, options.dtype, options.gemm, True if gpu else None, specs)
    for text in args.warnings:
        warn(text)
    for text in setup.describe_rounding(specs or {}, num):
        warn(text)
    if checkpoint is None or specs is None:
        rows = quantised_rows(expected_tensors(args, args.is_quantised), num)
        partition = Partition.choose(args, options.tp, options.experts, quantised=rows)
    else:
        partition = checkpoint.partition(args, options.tp, options.experts, quantised_rows(specs, num))
        checkpoint.match(partition)
    num = replace(num, fp8_latents=options.kv_cache_dtype == "fp8", experts=partition.experts)
    rank = rank_memory.RankSpec(args, num, options.tp, gpu, has_mtp, not gpu and on.type != "cpu")
    config = setup.check_limits(run_config(options), args, has_mtp)
    return rank, config, says


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """All that is printed, as plain data: sizes in bytes, times in seconds. Raises UserError as `describe` does."""
    rank, config, says = describe(options)
    from core import devices
    from engine import memory, rank_memory, setup

    pages = config.max_num_seqs * config.pages_per_sequence
    wanted = memory.need(rank, config, cache=pages * rank_memory.page_bytes(rank))
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
            "parameters": rank_memory.parameters(rank),
            "mtp_parameters": rank_memory.parameters(rank, mtp=True),
        },
        "run": {
            "ranks": rank.ranks, "device": options.device, "numerics": says, "experts": rank.experts,
            "max_model_len": config.max_model_len, "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_step_tokens, "mtp": config.mtp,
            "kv_cache_dtype": options.kv_cache_dtype,
        },
        "rank": {
            "weights": {part: parts[part] for part in (*rank_memory.PARTS, rank_memory.MTP) if part in parts},
            "packing": wanted.packing,
            "latents": {"of_a_token": rank_memory.latent_bytes(rank), "pages": pages, "bytes": wanted.cache},
            "activations": wanted.step,
            "graphs": wanted.graphs,
            "total": wanted.total,
        },
        "fits": {name: room(rank, config, size) for name, size in sizes.items()},
        "ranks": list(other_ranks(rank, config, sizes, options.experts)),
        "decode": [decode(rank, config, sequences, context, bandwidths) for sequences in SEQUENCES],
    }  # fmt: skip


def room(rank: "rank_memory.RankSpec", config: RunConfig, size: int) -> dict[str, Any]:
    """What so much memory has room for beside the weights and the largest step."""
    from engine import memory, rank_memory

    free = size - sum(rank_memory.weight_bytes(rank).values())
    pages = memory.pages_that_fit(rank, config, free)
    return {
        "memory": size,
        "weights_fit": free >= 0,
        "tokens": pages * PAGE_SIZE,
        "sequences": pages // config.pages_per_sequence,
    }


def other_ranks(
    rank: "rank_memory.RankSpec", config: RunConfig, sizes: dict[str, int], experts: Any
) -> Iterator[dict[str, Any]]:
    """Numbers of ranks, with the weights of each and the tokens that memories have room for, or why they do not do."""
    from engine import memory, rank_memory

    for ranks in sorted({*RANKS, rank.ranks}):
        other = memory.with_ranks(rank, ranks, experts)
        if problem := memory.partition_error(other):
            yield {"ranks": ranks, "problem": problem}
            continue
        yield {
            "ranks": ranks,
            "experts": other.experts,
            "weights": sum(rank_memory.weight_bytes(other).values()),
            "tokens": {name: room(other, config, size)["tokens"] for name, size in sizes.items()},
        }


def decode(
    rank: "rank_memory.RankSpec", config: RunConfig, sequences: int, context: int, bandwidths: list[float]
) -> dict[str, Any]:
    """What a decode step reads, and how many steps a second that allows."""
    from engine import rank_memory

    read = rank_memory.decode_reads(rank, sequences, context, config.mtp)
    return {
        "sequences": sequences,
        "experts": read.experts,
        "weights": read.weights,
        "context": context,
        "latents": read.latents,
        "seconds": {str(tb): (read.weights + read.latents) / (tb * 1e12) for tb in bandwidths},
    }


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
    yield f"{run['ranks']} rank{'s' * (run['ranks'] > 1)}{shared}; GB are 10^9 bytes"
    yield ""
    yield f"{'one rank holds':<60}{'GB':>8}"
    for part, n in rank["weights"].items():
        yield f"  {part:<58}{n / 1e9:8.2f}"
    yield f"{'weights':<60}{sum(rank['weights'].values()) / 1e9:8.2f}"
    if rank["packing"]:
        yield f"{'  while they are packed, before there are latents':<60}{rank['packing'] / 1e9:8.2f}"
    latents = rank["latents"]
    text = f"latents of {run['max_num_seqs']} x {run['max_model_len']:,} tokens, {latents['of_a_token']:,} bytes each"
    yield f"{text:<60}{latents['bytes'] / 1e9:8.2f}"
    text = f"tensors of the largest step, {run['max_num_batched_tokens']:,} tokens"
    yield f"{text:<60}{rank['activations'] / 1e9:8.2f}"
    if rank["graphs"]:
        yield f"{'CUDA graphs: tensors of the largest decode step and more':<60}{rank['graphs'] / 1e9:8.2f}"
    yield f"{'together':<60}{rank['total'] / 1e9:8.2f}"
    yield ""
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
            said = other["problem"].replace(f" {other['ranks']} ranks", " so many ranks")
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
    if run["mtp"]:
        yield f"(a step verifies {run['mtp']} drafted and makes as many; tokens/s times the tokens a step then gives)"
    if run["experts"] == "whole" and run["ranks"] > 1:
        yield "(of the mean rank: with whole experts a step waits for the one whose experts are chosen most)"


def main() -> int:
    def run(options: argparse.Namespace) -> int:
        found = plan(options)
        with output_errors():
            print(json.dumps(found, indent=2) if options.json else "\n".join(lines(found)), flush=True)
        return 0

    return run_command(parse, run)


if __name__ == "__main__":
    sys.exit(main())

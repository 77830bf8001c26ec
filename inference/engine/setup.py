"""Sets an engine up: chooses numerics, refuses what cannot run before anything is loaded, loads, sizes the cache.

All ranks call these functions together; an error on one of them is raised on all.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.directory import Checkpoint, choose_args
from checkpoint.load import load_into
from checkpoint.table import (
    quantised_rows,
)  # fmt: skip
from core import devices
from core.config import ModelArgs
from core.errors import UserError, warn
from core.numerics import Numerics
from core.run_config import PAGE_SIZE, RunConfig
from core.sampling_params import SamplingParams, params_from_generation_config
from core.stages import Stage, describe_stages, divide, single_stage
from engine import host_memory, memory, rank_memory
from engine.choose_numerics import choose_numerics, choose_virtual_ranks, describe_rounding
from model import Transformer
from ops.backend import why_reference
from ops.cpu import kernels as kernel_cpu
from parallel import startup
from parallel.group import SOLO, Group
from text.tokenizer import Tokenizer


class _Plan(NamedTuple):
    """What is known of a run before its weights are loaded."""

    checkpoint: Checkpoint
    args: ModelArgs
    num: Numerics
    has_mtp: bool
    stage: Stage
    default_params: SamplingParams


def load(
    ckpt_path: str | Path,
    run: RunConfig,
    *,
    config: str | Path | None,
    device: torch.device | str | None,
    world: Group,
    progress: bool,
    chat: bool,
    thinking: bool | None,
) -> tuple[Transformer, Tokenizer | None, SamplingParams, Group]:
    """The loaded model, on the first rank of a lane the tokenizer, the checkpoint's sampling defaults, and the ranks
    with this one's place in other stages. For arguments and errors see Engine.from_pretrained."""
    target = world.run_on_all_ranks(lambda: resolve_device(device, run))
    # free memory is measured before any rank takes of it
    plan = world.run_on_all_ranks(lambda: _choose(ckpt_path, run, config, target, world, progress))
    tp, others = startup.lanes(world, run.dp * run.pp, target)  # of which one is 1
    dp, pp = (others, SOLO) if run.pp == 1 else (SOLO, others)

    def load_weights() -> tuple[Transformer, Tokenizer | None]:
        tokenizer = Tokenizer(ckpt_path, plan.args.vocab_size) if tp.rank == 0 else None
        if chat and tokenizer is not None:
            tokenizer.encode_chat([{"role": "user", "content": "Hello"}], thinking=thinking)
        group = replace(tp, ordered=plan.num.batch_invariant)
        model = Transformer(plan.args, plan.num, group, target, mtp=plan.has_mtp, dp=dp, stage=plan.stage)
        load_into(model, plan.checkpoint, progress)
        return model.prepare(), tokenizer

    model, tokenizer = world.run_on_all_ranks(load_weights)
    _check_agreement((model.args, model.num, plan.has_mtp), world)
    return model, tokenizer, plan.default_params, pp


def _choose(
    ckpt_path: str | Path, run: RunConfig, config: str | Path | None, device: torch.device, world: Group, progress: bool
) -> _Plan:
    if world.size % (run.dp * run.pp):
        flag, what = (f"--dp {run.dp}", "lanes") if run.pp == 1 else (f"--pp {run.pp}", "stages")
        count = f"{world.size} rank{'s' * (world.size > 1)}"
        raise UserError(f"{flag}: {count} cannot make so many equal {what}; start a multiple (torchrun)")
    checkpoint = Checkpoint(ckpt_path)
    args = choose_args(checkpoint, config)
    specs = checkpoint.expected(args)
    num, says = choose_numerics(args, device, run.dtype, run.gemm, specs=specs, deterministic=run.deterministic)
    ranks = world.size // run.pp  # of a stage, if there are several
    partition = checkpoint.partition(args, ranks, run.experts, quantised_rows(specs, num), run.dp, run.pp)
    fp8_latents = run.kv_cache_dtype == "fp8"
    if fp8_latents and not devices.holds(device, torch.float8_e4m3fn):
        raise UserError(f"--kv-cache-dtype fp8: {device.type} has no such type in torch; leave it out")
    num = replace(num, fp8_latents=fp8_latents, experts=partition.experts, batch_invariant=run.deterministic,
                  mlps_in_lane=partition.mlps_in_lane)  # fmt: skip
    if run.deterministic:
        held = checkpoint.experts(checkpoint.made_for(ranks, run.dp)) or run.experts
        num = replace(num, **choose_virtual_ranks(partition, ("split", "whole") if held == "auto" else (held,)))
    for text in args.warnings if world.rank == 0 else ():
        warn(text)
    for text in describe_rounding(specs, num) if world.rank == 0 else ():
        warn(text)
    if progress and world.rank == 0:
        print(says, file=sys.stderr)
        if why := why_reference(device):
            print(f"note: the reference computes, in plain torch ({why})", file=sys.stderr)
        if device.type == "cpu" and num.dtype == torch.bfloat16 and (slower := kernel_cpu.why_not()):
            print(f"note: on this CPU bfloat16 is slower than it could be ({slower})", file=sys.stderr)
        if run.pp == 1 < world.size:
            print(describe_lanes(world.size, run.dp), file=sys.stderr)
        if ranks > 1:
            reason = partition.reason
            if num.experts != partition.experts:
                reason = f"experts: {num.experts}, as --deterministic divides them for any number of ranks"
            print(reason, file=sys.stderr)
    has_mtp = bool(args.n_mtp_layers) and checkpoint.has_mtp
    stages = divide(args, run.pp, run.pp_layers or checkpoint.layers_of_stages(args, ranks, run.pp), has_mtp)
    if progress and world.rank == 0 and run.pp > 1:
        print(describe_stages(stages, ranks), file=sys.stderr)
    stage = stages[run.pp - 1 - world.rank // ranks]
    check_start(_rank_on(device, args, num, ranks, has_mtp, run.dp, stage), device, run)
    return _Plan(checkpoint, args, num, has_mtp, stage, params_from_generation_config(Path(ckpt_path)))


def describe_lanes(ranks: int, lanes: int) -> str:
    """A line that says how ranks share the sequences, and why."""
    if lanes == 1:
        return f"lanes: one of {ranks} ranks, which answers a few sequences soonest; --dp {ranks} holds more of them"
    each = "1 rank" if ranks == lanes else f"{ranks // lanes} ranks"
    return f"lanes: {lanes} of {each} each, as asked; each keeps the latents of its own sequences"


def _check_agreement(computes: tuple[ModelArgs, Numerics, bool], world: Group) -> None:
    """Raises UserError on all ranks if one of them would compute something else than rank 0, because its GPU differs or
    its path leads to another checkpoint."""
    mine = repr(computes)
    first = bytes(world.broadcast_ints(list(mine.encode()))).decode()

    def check() -> None:
        if mine != first:
            raise UserError(f"this host would compute {mine}, rank 0 {first}: give --gemm, and check --ckpt-path")

    world.run_on_all_ranks(check)


def resolve_device(device: torch.device | str | None, run: RunConfig) -> torch.device:
    """The device to load on: the one given, else the one `run` names, which becomes the current one. Raises
    UserError."""
    if device is None:
        _, _, local_rank, local_size = startup.environment()
        return startup.choose_device(run.device, local_rank, local_size)
    target = devices.parse(str(device))
    devices.make_current(target)
    return target


def _rank_on(
    device: torch.device, args: ModelArgs, num: Numerics, ranks: int, mtp: bool, lanes: int, stage: Stage | None = None
) -> rank_memory.RankSpec:
    """A rank with the forms of weights and ops that its device has."""
    reference = bool(why_reference(device))
    gpu = device.type == "cuda" and not reference
    part = None if stage in (None, single_stage(args)) else stage
    return rank_memory.RankSpec(args, num, ranks, gpu, mtp, reference, lanes=lanes, stage=part)


def rank_of(model: Transformer) -> rank_memory.RankSpec:
    ranks, lanes = model.tp.size * model.dp.size, model.dp.size
    return _rank_on(model.device, model.args, model.num, ranks, len(model.mtp) > 0, lanes, model.stage)


def check_limits(run: RunConfig, args: ModelArgs, has_mtp: bool) -> RunConfig:
    """`run` with max_model_len filled in, by default what the model was made for. Raises UserError for what this model
    cannot do, whatever memory there is."""
    if run.mtp and not has_mtp:
        raise UserError("--mtp needs an MTP module, and this checkpoint has none")
    length, most = run.max_model_len, args.max_seq_len
    if length is not None and not 1 < length <= most:
        raise UserError(f"--max-model-len is {length}, expected from 2 to this model's {most}")
    return replace(run, max_model_len=most if length is None else length)


def length_that_fits(run: RunConfig, n_pages: int, shrink: bool) -> int:
    """The max_model_len that a pool of so many pages holds: the one asked for, or with `shrink` a smaller one. Raises
    UserError."""
    assert run.max_model_len is not None
    if n_pages >= run.pages_per_sequence:
        return run.max_model_len
    holds = max(n_pages * PAGE_SIZE - run.mtp, 0)
    if not shrink or holds < 2:
        raise UserError(f"--max-model-len {run.max_model_len} needs {run.pages_per_sequence} pages of cache and "
                        f"memory holds {n_pages}; ask for at most {holds}")  # fmt: skip
    return holds


def check_start(rank: rank_memory.RankSpec, device: torch.device, run: RunConfig) -> None:
    """Raises UserError, before anything is loaded, for what the model cannot do and what this rank's memory cannot
    hold."""
    shrink = run.max_model_len is None
    run = check_limits(run, rank.args, rank.mtp)
    cache = None
    if run.n_pages is not None:
        cache = run.n_pages * rank_memory.page_bytes(rank)
    elif run.kv_cache_gib is not None:
        cache = int(run.kv_cache_gib * 2**30)
    if cache is not None:
        length_that_fits(run, cache // rank_memory.page_bytes(rank) // run.pp, shrink)
    free = free_memory(device)
    if free is None and cache is None:
        raise UserError(f"{device.type} does not say how much memory is free: give --kv-cache-gib")
    if free is not None:
        memory.check_fits(rank, run, free, cache, shrink)


def size_cache(run: RunConfig, model: Transformer, recorded: bool, pp: Group = SOLO) -> RunConfig:
    """`run` with n_pages and max_model_len filled in, the same on all ranks: as asked, else as this memory holds, at
    most max_num_seqs sequences of full length. `recorded`: decode steps are recorded; `pp`: the ranks with this one's
    place in other stages; each microbatch gets as many pages. Raises UserError."""
    shrink = run.max_model_len is None
    has_mtp = len(model.mtp) > 0 or not model.stage.is_last  # the last stage knows
    run = check_limits(run, model.args, has_mtp)
    n_pages = run.n_pages
    if n_pages is None:
        if run.kv_cache_gib is None:
            free, as_run = free_memory(model.device), replace(run, eager=not recorded)
            assert free is not None, "check_start refuses a device that does not say"
            fit = memory.pages_that_fit(rank_of(model), as_run, free, shrink=shrink)
            fit = min(fit, run.seqs_per_microbatch * run.pp * run.pages_per_sequence)
        else:
            fit = int(run.kv_cache_gib * 2**30) // model.page_bytes
        n_pages = pp.min_int(model.dp.min_int(model.tp.min_int(fit)))
    return replace(run, n_pages=n_pages, max_model_len=length_that_fits(run, n_pages // run.pp, shrink))


def free_memory(device: torch.device) -> int | None:
    """Bytes this rank may take now: what its device has (None: it does not say), or an equal part of what its host has,
    by the kernel's estimate, or its container, if that is less."""
    if device.type != "cpu":
        return devices.free_memory(device)
    return min([host_memory.host_memory(), *host_memory.container_memory()]) // startup.environment()[3]

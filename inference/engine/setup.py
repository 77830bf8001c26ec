"""Sets an engine up: chooses numerics, refuses what cannot run before anything is loaded, loads, sizes the cache.

All ranks call these functions together; an error on one of them is raised on all.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint.directory import Checkpoint, choose_args
from checkpoint.load import load_into
from checkpoint.partition import Partition
from checkpoint.table import (
    PLAIN,
    Spec,
    exceptions,
    expected_tensors,
    is_rounded,
    module_of,
    quantised_form,
    quantised_rows,
)  # fmt: skip
from core import devices
from core.config import ModelArgs
from core.errors import UserError, warn
from core.numerics import PLAIN as PLAIN_FORM
from core.numerics import Form, Numerics
from core.run_config import PAGE_SIZE, ExpertLayout, RunConfig
from core.sampling_params import SamplingParams, params_from_generation_config
from core.stages import Stage, divide, whole
from engine import host_memory, memory, rank_memory
from model import Transformer
from ops.backend import has_fp8 as device_has_fp8
from ops.backend import why_reference
from ops.cpu import kernels as kernel_cpu
from parallel import startup
from parallel.group import SOLO, Group
from text.tokenizer import Tokenizer

VIRTUAL_RANKS = (16, 8, 4, 2)  # of a deterministic run, the first that the model divides over


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
    pp = SOLO
    if run.pp > 1:
        (tp, pp), dp = startup.stages(world, run.pp, target), SOLO
    else:
        tp, dp = startup.lanes(world, run.dp, target)

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
    checkpoint = Checkpoint(ckpt_path)
    args = choose_args(checkpoint, config)
    specs = checkpoint.expected(args)
    num, says = choose_numerics(args, device, run.dtype, run.gemm, specs=specs)
    ranks = world.size // run.pp  # of a stage, if there are several
    partition = checkpoint.partition(args, ranks, run.experts, quantised_rows(specs, num), run.dp)
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
    stages = divide(args, run.pp, run.pp_layers, has_mtp)
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


def describe_stages(stages: Sequence[Stage], ranks: int) -> str:
    """A line that says which layers each stage has."""
    each = "1 rank" if ranks == 1 else f"{ranks} ranks"
    layers = ", ".join(f"{s.layers.start}-{s.layers.stop - 1}" for s in stages)
    return f"pipeline: {len(stages)} stages of {each}, the last with rank 0 and the head: layers {layers}"


def choose_virtual_ranks(partition: Partition, layouts: Sequence[ExpertLayout]) -> dict[str, Any]:
    """The fields of Numerics that make a deterministic run compute the same bits on any number of ranks: the most
    virtual ranks, up to 16, that the model divides over with its experts in one of these layouts, the first if it
    does. Raises UserError for ranks that cannot share them evenly."""
    args, rows, ranks = partition.args, partition.quantised, partition.ranks
    for n, experts in product(VIRTUAL_RANKS, layouts):
        with contextlib.suppress(UserError):
            Partition(args, n, experts, rows)
            break
    else:
        n, experts = 1, partition.experts
    if n % ranks:
        counts = " or ".join(str(k) for k in range(1, n + 1) if n % k == 0)
        parts = f"{n} part{'s' * (n > 1)}"
        raise UserError(f"--deterministic sums in {parts}, which {ranks} ranks cannot share: start {counts}")
    return {"virtual_ranks": n, "experts": experts if n > 1 else partition.experts}


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


def choose_numerics(
    args: ModelArgs,
    device: torch.device,
    dtype: str,
    gemm: str,
    has_fp8: bool | None = None,
    specs: Mapping[str, Spec] | None = None,
) -> tuple[Numerics, str]:
    """What to compute in, and a line that says so. `dtype` and `gemm` are RunConfig's; `has_fp8` answers for a GPU that
    is not here; `specs` are a checkpoint's tensors as they are stored (None: as `args` says). Raises UserError for what
    the device cannot compute."""
    specs = expected_tensors(args, args.is_quantised) if specs is None else specs
    wide = args.dtype in ("fp32", "fp16")  # bfloat16 does not hold them
    plain = torch.float32 if dtype == "float32" or (dtype == "auto" and wide) else torch.bfloat16
    on = f"on {device.type}"
    if plain == torch.bfloat16 and not devices.holds(device, plain):
        if dtype == "bfloat16":
            raise UserError(f"--dtype bfloat16: {device.type} has no such type in torch; --dtype float32 has")
        plain, on = torch.float32, f"on {device.type}, which has no bfloat16"
    name = str(plain).removeprefix("torch.")
    if gemm == "fp8" and args.dtype != "fp8":
        raise UserError(f"--gemm fp8 needs FP8 weights, and this checkpoint's are {args.dtype}")
    if gemm == "fp8" and plain == torch.float32:
        raise UserError("--gemm fp8 and --dtype float32 contradict each other; leave one out")
    if not args.is_quantised:
        return _numerics(Numerics(plain), specs, f"{name} weights and activations {on}")
    kind = args.dtype.upper()
    if plain == torch.float32:
        return _numerics(Numerics(plain), specs, f"float32 throughout, {kind} weights dequantised exactly, {on}")
    kernels = _multiplies_quantised(device, has_fp8)
    on_gpu = kernels and device.type == "cuda"
    if on_gpu and args.dtype == "fp8" and gemm in ("auto", "fp8"):
        has_fp8 = device_has_fp8(device) if has_fp8 is None else has_fp8
        if gemm == "fp8" and not has_fp8:
            name = torch.cuda.get_device_name(device)
            raise UserError(f"--gemm fp8 needs FP8 tensor cores, and {name} has none; use bf16")
        gemm = "fp8" if has_fp8 else "bf16"
    if gemm == "auto":
        gemm = "bf16" if kernels else "dequantised"
    if gemm == "dequantised":
        return _numerics(Numerics(plain), specs, f"{name}, {kind} weights dequantised once at load, {on}")
    if not kernels and not devices.holds(device, quantised_form(args).dtype):
        why = f"{device.type} has no {kind} in torch"
        raise UserError(f"--gemm {gemm}: {why}; without it they are dequantised at load")
    if gemm == "fp8":
        says = "W8A8 (FP8 weights and activations)"
        if not on_gpu:
            says = "W8A8, FP8 products emulated by the reference (slow, for comparison),"
    else:
        says = f"W{4 if args.dtype == 'int4' else 8}A16 ({kind} weights widened in the product)"
        if not kernels:
            says += ", computed by the reference (slow, for comparison),"
    num = Numerics(plain, "fp8" if gemm == "fp8" else "bf16", args.scale_fmt)
    if args.dtype != "fp8":  # of weights in groups, those of the routed experts are, and so few modules
        num = replace(num, projections=PLAIN_FORM if args.group_size else quantised_form(args))
    return _numerics(num, specs, f"{says} {on}")


def _numerics(num: Numerics, specs: Mapping[str, Spec], says: str) -> tuple[Numerics, str]:
    num = replace(num, exceptions=exceptions(specs, num))
    return num, f"numerics: {says}{_plain_projections(specs, num)}"


def _multiplies_quantised(device: torch.device, has_fp8: bool | None) -> bool:
    """Whether there are kernels that multiply by quantised weights as they are stored. `has_fp8` answers for a GPU that
    is not here."""
    if device.type == "cpu":
        return kernel_cpu.serve(torch.bfloat16)
    return device.type == "cuda" and (has_fp8 is not None or not why_reference(device))


def _plain_projections(specs: Mapping[str, Spec], num: Numerics) -> str:
    """What a line about the numerics says of projections that are plain though others are quantised; empty without
    them."""
    if num.gemm is None:
        return ""
    forms: dict[str, set[Form]] = {}
    for name, spec in specs.items():
        if spec.form is not None:
            forms.setdefault(module_of(name), set()).add(spec.form)
    others = dict(num.exceptions)
    plain = {name for name in forms if not others.get(name, num.projections).is_quantised}
    if not plain:
        return ""
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in plain}))
    said = f"; {len(plain)} projections in bfloat16, as they are stored ({kinds})"
    mixed = [name for name in plain if any(form.is_quantised for form in forms[name])]
    kind = next(form for some in forms.values() for form in some if form.is_quantised).kind.upper()
    return said + (f", the {kind} parts of {len(mixed)} of them dequantised" if mixed else "")


def describe_rounding(specs: Mapping[str, Spec], num: Numerics) -> Iterator[str]:
    """A sentence about what is lost of a checkpoint's weights in a bfloat16 run; none if nothing is."""
    rounded = {spec.dtype for name, spec in specs.items() if spec.dtype in PLAIN[1:] and is_rounded(name, spec)}
    if num.dtype == torch.bfloat16 and rounded:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in rounded))
        yield f"weights stored in {names} are rounded to bfloat16; --dtype float32 computes exactly"


def _rank_on(
    device: torch.device, args: ModelArgs, num: Numerics, ranks: int, mtp: bool, lanes: int, stage: Stage | None = None
) -> rank_memory.RankSpec:
    """A rank with the forms of weights and ops that its device has."""
    reference = bool(why_reference(device))
    gpu = device.type == "cuda" and not reference
    part = None if stage in (None, whole(args)) else stage
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
    place in other stages, of whose turns each has an equal share of the pages. Raises UserError."""
    shrink = run.max_model_len is None
    has_mtp = len(model.mtp) > 0 or not model.stage.is_last  # the last stage knows
    run = check_limits(run, model.args, has_mtp)
    n_pages = run.n_pages
    if n_pages is None:
        if run.kv_cache_gib is None:
            free, as_run = free_memory(model.device), replace(run, eager=not recorded)
            assert free is not None, "check_start refuses a device that does not say"
            fit = memory.pages_that_fit(rank_of(model), as_run, free, shrink=shrink)
            fit = min(fit, run.sequences_of_turn * run.pp * run.pages_per_sequence)
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

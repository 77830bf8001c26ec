"""What a run computes in: chosen from the checkpoint, the device and the flags."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from checkpoint.partition import Partition
from checkpoint.table import PLAIN, Spec, exceptions, expected_tensors, is_rounded, module_of, quantised_form
from core import devices
from core.config import ModelArgs
from core.errors import UserError
from core.numerics import PLAIN as PLAIN_FORM
from core.numerics import Form, Numerics
from core.run_config import ExpertLayout
from ops.backend import has_fp8 as device_has_fp8
from ops.backend import why_reference
from ops.cpu import kernels as kernel_cpu

VIRTUAL_RANKS = (16, 8, 4, 2)  # of a deterministic run, the first that the model divides over


def choose_numerics(
    args: ModelArgs,
    device: torch.device,
    dtype: str,
    gemm: str,
    has_fp8: bool | None = None,
    specs: Mapping[str, Spec] | None = None,
    deterministic: bool = False,
) -> tuple[Numerics, str]:
    """What to compute in, and a line that says so. `dtype`, `gemm` and `deterministic` are RunConfig's; `has_fp8`
    answers for a GPU that is not here; `specs` are a checkpoint's tensors as they are stored (None: as `args` says).
    Raises UserError for what the device cannot compute."""
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
    fixed_point = gemm == "auto" and kernels and not on_gpu and not deterministic
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
        if fixed_point and kernel_cpu.may_use_fixed():
            says += ", more than a few tokens at once in 13-bit fixed point (--gemm bf16: in bfloat16),"
    num = Numerics(plain, "fp8" if gemm == "fp8" else "bf16", args.scale_fmt, fixed_point=fixed_point)
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

"""What a GPU is: its row in the tables of tiles, and the FP8 type that it multiplies or converts. No Triton here."""

import os
from functools import cache

import torch

from core.errors import UserError
from ops.gpu.tiles import W8A8, W8A16


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def architecture(device: torch.device) -> str:
    """The row of the tables that serves a device; "sm_90" for a CPU, that is for the interpreter.

    Raises UserError for a GPU that no row serves.
    """
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip:
        found = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        if major in (9, 10):
            found = f"sm_{major}0"
        elif (major, minor) >= (8, 9):
            found = "sm_89"  # and consumer Blackwell, sm_120, which has no more shared memory
        else:
            found = "sm_80" if major == 8 else f"sm_{major}{minor}"
    if found not in W8A16:
        raise UserError(
            f"{torch.cuda.get_device_name(device)} ({found}) is none of the GPUs served: {', '.join(W8A16)}"
        )
    return found


def has_fp8(device: torch.device) -> bool:
    """Whether the device has FP8 tensor cores, and fp8_gemm a table for them."""
    return architecture(device) in W8A8


def fp8_dtype(device: torch.device) -> torch.dtype:
    """The FP8 type that the device multiplies; weights for float8_e4m3fnuz must go through reference.to_fnuz."""
    return torch.float8_e4m3fnuz if architecture(device) == "gfx942" else torch.float8_e4m3fn


def converts_fp8(dtype: torch.dtype, arch: str) -> bool:
    """Whether compiled code can convert to and from an FP8 type by itself; otherwise it gets the bytes."""
    if dtype == torch.float8_e4m3fnuz:
        return arch == "gfx942"
    return arch not in ("sm_80", "gfx942")  # gfx942 could, in thousands of instructions


def kernel_view(t: torch.Tensor) -> torch.Tensor:
    """A tensor as the kernels take it: itself, but of an FP8 tensor its bytes where the target cannot convert it."""
    if not (t.is_floating_point() and t.element_size() == 1):
        return t
    if interpreted() or not converts_fp8(t.dtype, architecture(t.device)):
        return t.view(torch.uint8)
    return t

"""The choice of a backend, made once for a model: the only place that asks what the device can do."""

import importlib.util

import torch

from core.errors import UserError
from core.numerics import Numerics
from ops.cpu import kernels
from ops.cpu.backend import CompiledCpuBackend, CpuBackend
from ops.gpu.device import architecture
from ops.gpu.device import has_fp8 as gpu_has_fp8
from ops.reference_backend import ReferenceBackend

__all__ = ["ReferenceBackend", "choose_backend", "has_fp8", "why_reference"]


def choose_backend(device: torch.device, num: Numerics) -> ReferenceBackend:
    """The fastest backend for a device: Triton kernels on a GPU that they serve; on a CPU compiled C in bfloat16 where
    there is a compiler, otherwise torch's own ops; the reference on any other device."""
    if why_reference(device):
        return ReferenceBackend(num.batch_invariant)
    if device.type == "cuda":
        from ops.gpu.backend import GpuBackend  # imports Triton, which a machine without a GPU may lack

        return GpuBackend(num.batch_invariant)
    if kernels.serve(num.dtype):
        return CompiledCpuBackend(num.batch_invariant, num.fixed_point)
    return CpuBackend(num.batch_invariant)


def why_reference(device: torch.device) -> str:
    """Why the reference computes on a device; empty where there are kernels for it."""
    if device.type not in ("cpu", "cuda"):  # among them tensors without memory ("meta")
        return f"there are no kernels for {device.type}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and torch.cuda.is_available():
        try:
            architecture(device)
        except UserError as e:
            return str(e)
    return ""


def has_fp8(device: torch.device) -> bool:
    """Whether products of FP8 by FP8 run on the device's own FP8 units."""
    return device.type == "cuda" and not why_reference(device) and gpu_has_fp8(device)

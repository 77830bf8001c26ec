"""The choice of a backend, made once for a model: the only place that asks what the device can do."""

import torch

from core.numerics import Numerics
from ops.cpu import kernels
from ops.cpu.backend import CompiledCpuBackend, CpuBackend
from ops.gpu.device import has_fp8
from ops.reference_backend import ReferenceBackend

__all__ = ["ReferenceBackend", "choose_backend", "has_fp8"]


def choose_backend(device: torch.device, num: Numerics) -> ReferenceBackend:
    """The fastest backend for a device: Triton kernels on a GPU; on a CPU compiled C in bfloat16 where there is a
    compiler, otherwise torch's own ops; the reference on any other device."""
    if device.type == "cuda":
        from ops.gpu.backend import GpuBackend  # imports Triton, which a machine without a GPU may lack

        return GpuBackend(num.batch_invariant)
    if device.type != "cpu":  # any other that torch knows, and tensors without memory ("meta")
        return ReferenceBackend(num.batch_invariant)
    compiled = num.dtype == torch.bfloat16 and kernels.library() is not None
    return (CompiledCpuBackend if compiled else CpuBackend)(num.batch_invariant)

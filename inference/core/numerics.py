"""The types a run computes in, and the promises it makes about bits."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from core.run_config import ExpertLayout

Gemm = Literal["fp8", "bf16"]


@dataclass(frozen=True)
class Numerics:
    """How this engine computes, as opposed to what the model is.

    `dtype` is that of activations and plain weights. `gemm` None: all weights are plain (FP8 ones were dequantised
    when loaded); "fp8" or "bf16": FP8 weights stay FP8 in memory, and the products are W8A8 or W8A16. Norm weights, the
    router's bias and scales are float32 in every case.

    `exceptions` are the modules, by their names in the model, whose weights lie otherwise because a checkpoint stores
    them otherwise: projections that are plain, though `gemm` keeps FP8 ("layers.3.attn.wo", or "layers.3.ffn.experts"
    for all of a layer), and routers and a head that are float32, though `dtype` is bfloat16. See table.exceptions.
    """

    dtype: torch.dtype = torch.bfloat16
    gemm: Gemm | None = None
    scale_fmt: str | None = None
    fp8_latents: bool = False  # the cache holds the compressed key/value in e4m3, see reference.pack_latents
    experts: ExpertLayout = "whole"  # how ranks share the routed experts, see checkpoint/partition.py
    batch_invariant: bool = False  # a token's result does not depend on the rest of its batch, to the bit
    exceptions: tuple[str, ...] = ()

    def inside(self, module: str) -> "Numerics":
        """The numerics of a submodule: its exceptions, by their names within it."""
        if not self.exceptions:
            return self
        names = (name for name in self.exceptions if f"{name}.".startswith(f"{module}."))
        return replace(self, exceptions=tuple(name[len(module) + 1 :] for name in names))

    @property
    def is_exception(self) -> bool:
        """Whether the weights of this module itself are stored otherwise than those of the rest."""
        return "" in self.exceptions

    @property
    def exact_dtype(self) -> torch.dtype:
        """The dtype of a router's or a head's weights in memory, which holds every stored value exactly."""
        return torch.float32 if self.is_exception else self.dtype

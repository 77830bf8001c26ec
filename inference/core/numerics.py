"""The types a run computes in, and the promises it makes about bits."""

from dataclasses import dataclass
from typing import Literal

import torch

from core.run_config import ExpertLayout

Gemm = Literal["fp8", "bf16"]


@dataclass(frozen=True)
class Numerics:
    """How this engine computes, as opposed to what the model is.

    `dtype` is that of activations and plain weights. `gemm` None: all weights are plain (FP8 ones were dequantised
    when loaded); "fp8" or "bf16": FP8 weights stay FP8 in memory, and the products are W8A8 or W8A16.
    """

    dtype: torch.dtype = torch.bfloat16
    gemm: Gemm | None = None
    scale_fmt: str | None = None
    fp8_latents: bool = False  # the cache holds the compressed key/value in e4m3, see reference.pack_latents
    experts: ExpertLayout = "whole"  # how ranks share the routed experts, see checkpoint/partition.py
    batch_invariant: bool = False  # a token's result does not depend on the rest of its batch, to the bit

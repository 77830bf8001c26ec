"""The forms that ops take numbers in: weights with scales, quantised activations, packed latents, routing rules."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from core.config import BLOCK_SIZE
from core.numerics import Gemm

Scales = Literal["float32", "ue8m0"]  # of quantised activations: any float32, or powers of two


class Weight(NamedTuple):
    """What a linear multiplies by: (N, K), or experts stacked (E, N, K), with block scales when it is e4m3."""

    data: Any  # a tensor, or what a backend's pack_weight made of it
    scale: torch.Tensor | None = None
    gemm: Gemm = "bf16"
    scale_fmt: str | None = None

    @property
    def fp8(self) -> Scales | None:
        """The format of the scales with which this weight's input is quantised (W8A8); None: it takes plain input."""
        if self.scale is None or self.gemm != "fp8":
            return None
        return "ue8m0" if self.scale_fmt == "ue8m0" else "float32"

    def expert(self, e: int) -> "Weight":
        """Expert e's own weight, a view."""
        return self._replace(data=self.data[e], scale=None if self.scale is None else self.scale[e])


class Quantised(NamedTuple):
    """Activations ready for a W8A8 product, as act_quant makes them."""

    q: torch.Tensor  # (T, K) FP8
    s: torch.Tensor  # (T, ceil(K/128)) float32
    x: torch.Tensor | None = None  # (T, K) what was quantised, where somebody still needs it (the router)
    dtype: torch.dtype = torch.bfloat16  # of what was quantised, and so of a product


@dataclass(frozen=True)
class Routing:
    """How a router's scores become a choice; the fields are ModelArgs'."""

    top_k: int
    score_func: str
    topk_method: str
    n_groups: int
    n_limited_groups: int
    normalise: bool
    route_scale: float


def packed_latent_bytes(c: int, rope: int) -> int:
    return c + 4 * -(-c // BLOCK_SIZE) + 2 * rope

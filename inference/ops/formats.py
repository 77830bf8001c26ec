"""The forms that ops take numbers in: weights with scales, quantised activations, packed latents, routing rules."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from core.config import BLOCK_SIZE
from core.numerics import Gemm

Scales = Literal["float32", "ue8m0"]  # of quantised activations: any float32, or powers of two


class Weight(NamedTuple):
    """What a linear multiplies by: (N, K), or experts stacked (E, N, K), with block scales when it is quantised.

    Quantised data is float8_e4m3fn, int8, or of INT4 uint8 (…, N, K / 2); core.numerics.Form says how it lies there.
    """

    data: Any  # a tensor, or what a backend's pack_weight made of it
    scale: torch.Tensor | None = None  # (…, ceil(N / block[0]), ceil(K / block[1]))
    gemm: Gemm = "bf16"
    scale_fmt: str | None = None
    block: tuple[int, int] = (BLOCK_SIZE, BLOCK_SIZE)  # rows and columns that share a scale
    zero: torch.Tensor | None = None  # of INT4, uint8, one for each scale; None: 8

    @property
    def fp8(self) -> Scales | None:
        """The format of the scales with which this weight's input is quantised (W8A8); None: it takes plain input."""
        if self.scale is None or self.gemm != "fp8":
            return None
        return "ue8m0" if self.scale_fmt == "ue8m0" else "float32"

    def expert(self, e: int) -> "Weight":
        """Expert e's own weight, a view."""
        scale, zero = (None if t is None else t[e] for t in (self.scale, self.zero))
        return self._replace(data=self.data[e], scale=scale, zero=zero)


class Quantised(NamedTuple):
    """Activations ready for a W8A8 product, as act_quant makes them."""

    q: torch.Tensor  # (T, K) FP8
    s: torch.Tensor  # (T, ceil(K/128)) float32
    x: torch.Tensor | None = None  # (T, K) what was quantised, where somebody still needs it (the router)
    dtype: torch.dtype = torch.bfloat16  # of what was quantised, and so of a product

    def take(self, rows: torch.Tensor) -> "Quantised":
        """The tokens of these numbers, only quantised."""
        return Quantised(self.q[rows], self.s[rows], None, self.dtype)


class PartialSums(NamedTuple):
    """A product (T, N) whose sums over parts of K are still to be added up: in their order, in float32, rounded once.
    The op that takes it does so, which saves a pass over it (split K)."""

    parts: torch.Tensor  # (parts, T, N) float32
    dtype: torch.dtype  # of the product

    def columns(self, start: int, n: int) -> "PartialSums":
        return self._replace(parts=self.parts[..., start : start + n])


def columns(y: torch.Tensor | PartialSums, start: int, n: int) -> torch.Tensor | PartialSums:
    """n columns of a product (T, N), a view."""
    return y.columns(start, n) if isinstance(y, PartialSums) else y[..., start : start + n]


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

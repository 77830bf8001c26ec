"""The rotary embedding of `exact_network.Network`, with YaRN, in float64."""

import math
from typing import Any

import torch
from torch import Tensor

import exact_math
from exact_math import Arithmetic


class Rope:
    """Frequencies, angles and rotations, and the softmax's scale, which YaRN changes too. R is qk_rope_head_dim."""

    config: dict[str, Any]
    math: Arithmetic
    rope: dict[str, Any]  # the config's rope_scaling
    theta: float
    factor: float
    nope: int
    rope_dim: int

    def frequencies(self) -> Tensor:
        """(R/2,), stretched by YaRN (arXiv 2309.00071, section 3.2) if the config has it."""
        plain = [1 / exact_math.raised(self.theta, 2 * i, self.rope_dim) for i in range(self.rope_dim // 2)]
        freqs = torch.tensor(plain, dtype=torch.float64)
        if not self.stretches():
            return freqs
        slowed = self.ramp()
        return freqs / self.factor * slowed + freqs * (1 - slowed)

    def stretches(self) -> bool:
        return self.factor != 1

    def ramp(self) -> Tensor:
        """How far each pair is slowed: 0 for those that turn more than beta_fast times within the original length, 1
        for those that turn less than beta_slow times."""
        low, high = self.ramp_bounds()
        width = high - low if high > low else 0.001
        return ((torch.arange(self.rope_dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)

    def ramp_bounds(self) -> tuple[float, float]:
        low, high = math.floor(self.pair_turning("beta_fast")), math.ceil(self.pair_turning("beta_slow"))
        return max(low, 0), min(high, self.rope_dim - 1)

    def pair_turning(self, beta: str) -> float:
        """The pair, a fraction, that turns so many times within the original length."""
        turns = self.rope["original_max_position_embeddings"] / (self.rope[beta] * 2 * math.pi)
        return self.rope_dim * exact_math.log(turns) / (2 * exact_math.log(self.theta))

    def mscale(self, name: str) -> float:
        return 0.1 * self.rope[name] * exact_math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def softmax_scale(self) -> float:
        return (self.nope + self.rope_dim) ** -0.5 * self.mscale("mscale_all_dim") ** 2

    def rope_multiplier(self) -> float:
        return self.mscale("mscale") / self.mscale("mscale_all_dim")

    def positions(self, at: Tensor) -> Tensor:
        return at.double()

    def angles(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (T, R/2)."""
        cos, sin = self.math.cos_sin(self.positions(at)[:, None] * self.frequencies())
        return cos * self.rope_multiplier(), sin * self.rope_multiplier()

    def pairs(self, x: Tensor) -> Tensor:
        """(..., R) as (..., R/2, 2): the numbers that are rotated together, neighbours."""
        return x.unflatten(-1, (-1, 2))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = self.pairs(x).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    def rotate_key(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.rotate(x, cos, sin)

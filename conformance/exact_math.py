"""Sums, products and functions of float64 numbers whose every bit is the same on any machine.

Each result is made of additions, subtractions, multiplications, divisions and square roots of IEEE 754, which round
alike everywhere, in an order that is written here. No library's exp, sin or matrix product is called: they differ by
instruction set, thread and version. Logarithms and powers of single numbers are Python's decimal, which rounds
correctly. `FAST` computes the same with torch's own functions, to about 1e-14.
"""

import decimal
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

LN2_HIGH, LN2_LOW = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")
HALF_PI = (float.fromhex("0x1.921fb544p+0"), float.fromhex("0x1.0b4611a6p-34"), float.fromhex("0x1.3198a2e037073p-69"))
DIGITS = decimal.Context(prec=50)


def ordered_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (T, K) times w (N, K) transposed: (T, N), summed in the order of k."""
    out = x.new_zeros(len(x), len(w))
    columns = w.mT.contiguous()
    for k in range(x.shape[1]):
        out += x[:, k : k + 1] * columns[k]
    return out


def ordered_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension (..., 1): filled up with zeros to a power of two, halves added until one is
    left."""
    n = x.shape[-1]
    x = torch.nn.functional.pad(x, (0, (1 << (n - 1).bit_length()) - n))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent for int64 exponents from -1022 to 1023, by bits."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def ordered_exp(x: torch.Tensor) -> torch.Tensor:
    """exp(x) by 2^k times the series of the rest, 16 terms; below -700 it is 0."""
    k = torch.round(x.clamp(min=-700.0) / math.log(2))
    r = (x.clamp(min=-700.0) - k * LN2_HIGH) - k * LN2_LOW
    y = torch.ones_like(r)
    for n in range(16, 0, -1):
        y = y * r / n + 1.0
    return torch.where(x < -700.0, 0.0, y * power_of_two(k))


def ordered_cos_sin(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos(x) and sin(x) for |x| up to some thousands, by quarter turns and the series of the rest."""
    turns = torch.round(x / (math.pi / 2))
    r = ((x - turns * HALF_PI[0]) - turns * HALF_PI[1]) - turns * HALF_PI[2]
    square = r * r
    c, s = torch.ones_like(r), torch.ones_like(r)
    for n in range(20, 0, -2):
        c = 1.0 - c * square / (n * (n - 1))
        s = 1.0 - s * square / (n * (n + 1))
    s = s * r
    quarter = turns.long() % 4
    cos = torch.where(quarter % 2 == 0, c, s)
    sin = torch.where(quarter % 2 == 0, s, c)
    return torch.where((quarter == 1) | (quarter == 2), -cos, cos), torch.where(quarter >= 2, -sin, sin)


def fast_cos_sin(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.cos(), x.sin()


class Arithmetic(NamedTuple):
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    sum: Callable[[torch.Tensor], torch.Tensor]
    exp: Callable[[torch.Tensor], torch.Tensor]
    cos_sin: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


ORDERED = Arithmetic(ordered_product, ordered_sum, ordered_exp, ordered_cos_sin)
FAST = Arithmetic(lambda x, w: x @ w.mT, lambda x: x.sum(-1, keepdim=True), torch.exp, fast_cos_sin)


def log(x: float) -> float:
    return float(DIGITS.ln(decimal.Decimal(x)))


def raised(base: float, numerator: int, denominator: int) -> float:
    """base^(numerator / denominator), correctly rounded."""
    exponent = DIGITS.divide(decimal.Decimal(numerator), decimal.Decimal(denominator))
    return float(DIGITS.exp(DIGITS.multiply(DIGITS.ln(decimal.Decimal(base)), exponent)))


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """x rounded to the nearest number that e4m3 has, ties to even; beyond 448 to 448."""
    size = x.abs()
    exponent = torch.frexp(size).exponent  # size < 2^exponent
    step = power_of_two((exponent - 4).clamp(min=-9))
    return (torch.round(size / step) * step).clamp(max=448.0) * x.sign()


def to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).to(x.dtype)

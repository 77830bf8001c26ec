"""Random weights in every form that a checkpoint has them in, and what they stand for, in float64."""

import math

import torch

from core.numerics import Form
from ops.formats import Weight

FORMS = {
    "fp8": Form("fp8"),
    "int8 blocks": Form("int8"),
    "int8 groups of 128": Form("int8", (1, 128), torch.bfloat16),
    "int8 groups of 32": Form("int8", (1, 32), torch.float32),
    "int4 groups of 32": Form("int4", (1, 32), torch.bfloat16),
    "int4 groups of 128": Form("int4", (1, 128), torch.float16),
    "int4 groups of 32, zero points": Form("int4", (1, 32), torch.float16, True),
    "int4 groups of 128, zero points": Form("int4", (1, 128), torch.float32, True),
}


def random_weight(form: Form, *shape: int, seed: int = 0) -> Weight:
    """Every value that the form can hold is as likely; scales from 0.5 to 1.5, of about a weight's size."""
    made = torch.Generator().manual_seed(seed)
    *stack, n, k = shape
    bytes_ = torch.randint(256, (*stack, n, k // form.packing), generator=made, dtype=torch.uint8)
    if form.kind == "fp8":
        bytes_[(bytes_ & 0x7F) == 0x7F] = 0x7E  # no NaN
    blocks = (*stack, math.ceil(n / form.block[0]), math.ceil(k / form.block[1]))
    size = {"fp8": 2**-12, "int8": 2**-12, "int4": 2**-8}[form.kind]
    scale = ((torch.rand(blocks, generator=made) + 0.5) * size).to(form.scale)
    zero = torch.randint(16, blocks, generator=made, dtype=torch.uint8) if form.zeros else None
    return Weight(bytes_.view(form.dtype), scale, "bf16", None, form.block, zero)


def every_byte(form: Form) -> Weight:
    """Of 8 bits, (256, 256): each number but NaN in each row and each place of it. Scales are 1/8."""
    place = torch.arange(256)
    bytes_ = (place[:, None] * 3 + place).to(torch.uint8)
    if form.kind == "fp8":
        bytes_[(bytes_ & 0x7F) == 0x7F] = 0x7E  # no NaN
    return Weight(bytes_.view(form.dtype), torch.full((2, 2), 2.0**-3))


def every_nibble(zeros: bool) -> Weight:
    """INT4 (256, 512): each number in each row, and with zero points each of them. Scales are 1/8."""
    place = torch.arange(256)
    bytes_ = (place[:, None] * 3 + place).to(torch.uint8)
    zero = (torch.arange(256)[:, None] + torch.arange(16)).remainder(16).to(torch.uint8) if zeros else None
    return Weight(bytes_, torch.full((256, 16), 2.0**-3, dtype=torch.bfloat16), block=(1, 32), zero=zero)


def exact(w: Weight) -> torch.Tensor:
    """What a quantised weight stands for, float64 (…, N, K), value by value."""
    assert w.scale is not None
    data = w.data
    if data.dtype == torch.uint8:
        zero = torch.full(w.scale.shape, 8.0) if w.zero is None else w.zero
        values = torch.empty(*data.shape[:-1], 2 * data.shape[-1], dtype=torch.float64)
        values[..., 0::2], values[..., 1::2] = (data % 16).double(), (data // 16).double()
        values -= _spread(zero.double(), values.shape, w.block)
    else:
        values = data.float().double()
    return values * _spread(w.scale.double(), values.shape, w.block)


def _spread(s: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    rows, columns = torch.arange(shape[-2]) // block[0], torch.arange(shape[-1]) // block[1]
    return s[..., rows, :][..., columns]

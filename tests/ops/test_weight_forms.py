"""Weights of 8 and 4 bits as the reference has them: against float64 products of what their bits stand for."""

import pytest
import torch

from ops import reference
from ops.reference_backend import ReferenceBackend
from support.model_pairs import relative_error
from support.quantised_weights import FORMS, exact, random_weight

OPS = ReferenceBackend()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 128), (200, 256), (3, 130, 384)])
def test_dequantised(form, shape):
    w = random_weight(FORMS[form], *shape)
    got = OPS.weight_dequant(w.data, w.scale, torch.float32, w.block, w.zero)
    assert torch.equal(got, exact(w).float())
    rounded = OPS.weight_dequant(w.data, w.scale, torch.bfloat16, w.block, w.zero)
    assert torch.equal(rounded, got.bfloat16())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 128), (200, 384)])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_product(form, shape, rows):
    w = random_weight(FORMS[form], *shape)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1))
    assert relative_error(OPS.linear(x, w), x.double() @ exact(w).T) < 1e-6
    rounded = x.bfloat16()
    wanted = rounded.double() @ exact(w).T
    assert relative_error(OPS.linear(rounded, w), wanted.bfloat16()) < 3e-3


def test_every_nibble_and_every_byte():
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 256)
    nibbles = reference.widened(bytes_, (1, 32))
    assert nibbles[0, 0::2].tolist() == [byte % 16 - 8 for byte in range(256)]
    assert nibbles[0, 1::2].tolist() == [byte // 16 - 8 for byte in range(256)]
    zeros = torch.arange(16, dtype=torch.uint8).view(1, 16)
    shifted = reference.widened(bytes_, (1, 32), zeros)
    assert shifted[0].tolist() == [v + 8 - zeros[0, k // 32].item() for k, v in enumerate(nibbles[0].tolist())]

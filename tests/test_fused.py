"""The fused ops as the model sees them: a quantised input, and each fusion against the ops it is composed of."""

import pytest
import torch

import ops
import reference


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def fp8_weight(n: int, k: int, scale_fmt: str | None) -> ops.Weight:
    scale = torch.rand(-(-n // 128), -(-k // 128)) + 0.5
    return ops.Weight(torch.randn(n, k).to(torch.float8_e4m3fn), scale, "fp8", scale_fmt)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_takes_its_input_quantised(dtype: torch.dtype, scale_fmt: str | None, invariant: bool) -> None:
    w = fp8_weight(200, 320, scale_fmt)
    x = torch.randn(37, 320).to(dtype)
    with ops.batch_invariant(invariant):
        y = ops.linear(reference.quantised(x, w.fp8), w)
        assert y.dtype == dtype and torch.equal(y, ops.linear(x, w))


def test_only_a_w8a8_weight_wants_quantised_input() -> None:
    w = fp8_weight(128, 128, "ue8m0")
    assert w.fp8 == "ue8m0" and w._replace(scale_fmt=None).fp8 == "float32"
    for plain in (w._replace(gemm="bf16"), ops.Weight(torch.randn(128, 128))):
        assert plain.fp8 is None
        with pytest.raises(AssertionError):
            ops.linear(reference.quantised(torch.randn(3, 128), "ue8m0"), plain)

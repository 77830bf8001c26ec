"""The fused kernels against their references, and against exact numbers where the order of a sum may differ.

Inputs are slices of wider tensors full of NaN, as they are in the model, with NaN behind; see test_kernel.py. Small
integers have exact sums of squares, so with them whole results are compared bit for bit; with any others the norm is
compared with float64, and what follows it with what the composed ops make of the kernel's own norm.
"""

import math
from typing import Any

import pytest
import torch

from ops import reference
from ops.formats import PartialSums, Quantised
from ops.reference_backend import ReferenceBackend
from support.kernel_launches import only_listed_launches

pytest.importorskip("triton")
from test_kernel import DEVICE, E4M3, INTERPRETED, guarded, poisoned, same
from test_kernel import seeded as seeded

from ops.gpu import fused
from ops.gpu.backend import GpuBackend

__all__ = ["poisoned", "seeded"]  # fixtures, for every test here

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes in numpy
FNUZ = torch.float8_e4m3fnuz
EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float32]
FORMATS = [None, "float32", "ue8m0"]


def slice_of_nan(x: torch.Tensor, before: int = 16, after: int = 16) -> torch.Tensor:
    """x on the device as the middle columns of a wider tensor, NaN in the others."""
    wide = torch.full((*x.shape[:-1], before + x.shape[-1] + after), math.nan, dtype=x.dtype)
    wide[..., before : before + x.shape[-1]] = x
    return guarded(wide)[..., before : before + x.shape[-1]]


def norm_weight(h: int) -> torch.Tensor:
    return 1 + 0.2 * torch.randn(h)


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).float()


def spread(*shape: int) -> torch.Tensor:
    """Rows and blocks of many sizes."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-8, 8, (*shape[:-1], 1)))
    return x * torch.exp2(torch.arange(shape[-1]) // 128 % 8)


def near(y: torch.Tensor, exact: torch.Tensor, ulps: float) -> bool:
    return bool(((y.cpu().double() - exact).abs() <= ulps * torch.finfo(y.dtype).eps * exact.abs()).all())


def same_quantised(a: Quantised, y: torch.Tensor, fp8: str, dtype: torch.dtype = E4M3) -> bool:
    """Whether a is what act_quant makes of y."""
    q, s = reference.act_quant(y.cpu(), scale_fmt=None if fp8 == "float32" else fp8, dtype=dtype)
    return a.dtype == y.dtype and a.q.is_contiguous() and a.s.is_contiguous() and same(a.q, q) and same(a.s, s)


# norm


@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("t, h", [(1, 7168), (3, 576), (5, 100), (70, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_the_reference(dtype: torch.dtype, t: int, h: int, add: bool, fp8: Any) -> None:
    x, weight = integers(t, h).to(dtype), norm_weight(h)
    delta = integers(t, h).to(dtype) if add else None
    arguments = slice_of_nan(x), guarded(weight), EPS, None if delta is None else guarded(delta), fp8
    y, total = fused.norm(*arguments, dtype=E4M3)
    expected, expected_total = reference.norm(x, weight, EPS, delta, fp8)
    assert same(total.contiguous(), expected_total)
    if fp8 is None:
        assert same(y, expected)
        return
    assert same(y.x, expected.x) and same_quantised(y, expected.x, fp8)
    unkept, again = fused.norm(*arguments, keep=False, dtype=E4M3)
    assert unkept.x is None and unkept.dtype == dtype
    assert same(unkept.q, y.q) and same(unkept.s, y.s) and same(again.contiguous(), expected_total)


@pytest.mark.parametrize("fp8", ["float32", "ue8m0"])
@pytest.mark.parametrize("h", [100, 576, 7168])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_exact(dtype: torch.dtype, h: int, fp8: Any) -> None:
    """Any numbers: the sum is rounded first, the norm is off by its last bit at most, and FP8 is made of that norm."""
    x, delta, weight = spread(5, h).to(dtype), spread(5, h).to(dtype), norm_weight(h)
    y, total = fused.norm(guarded(x), guarded(weight), EPS, guarded(delta), fp8, dtype=E4M3)
    assert same(total, x + delta)
    wide = (x + delta).double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    assert near(y.x, exact, 1 if dtype == torch.bfloat16 else 4)
    assert near(reference.norm(x, weight, EPS, delta)[0], exact, 1 if dtype == torch.bfloat16 else 4)
    assert same_quantised(y, y.x, fp8)


def test_norm_for_fnuz() -> None:
    x, weight = guarded(spread(4, 300).bfloat16()), guarded(norm_weight(300))
    y, _ = fused.norm(x, weight, EPS, fp8="float32", dtype=FNUZ)
    assert same_quantised(y, y.x, "float32", FNUZ)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_row(bad: float) -> None:
    x, weight = torch.randn(6, 200).bfloat16(), norm_weight(200)
    y, _ = fused.norm(guarded(x), guarded(weight), EPS, fp8="ue8m0", dtype=E4M3)
    x[2, 150] = bad
    z, _ = fused.norm(guarded(x), guarded(weight), EPS, fp8="ue8m0", dtype=E4M3)
    expected = reference.norm(x, weight, EPS, fp8="ue8m0")[0]
    for a, b, e in zip(y[:3], z[:3], expected[:3], strict=True):
        others = torch.arange(6) != 2
        assert torch.equal(b.cpu().float().isnan(), e.float().isnan())
        assert same(a.cpu()[others], b.cpu()[others]) and b[2].float().isnan().any()


def test_a_norm_of_columns_that_lie_apart_and_of_no_tokens() -> None:
    x, weight = guarded(integers(100, 6).bfloat16()).T, guarded(norm_weight(100))
    assert same(fused.norm(x, weight, EPS)[0], reference.norm(x.cpu(), weight.cpu(), EPS)[0].contiguous())
    y, total = fused.norm(x[:0], weight, EPS, x[:0], "ue8m0", dtype=E4M3)
    assert y.q.shape == total.shape == (0, 100) and y.s.shape == (0, 1)


# silu_mul


@pytest.mark.parametrize(
    "few, rows, inter, half",
    [
        (True, 1, 2048, 2048),
        (True, 5, 100, 128),
        (True, 3, 256, 256),
        (False, 1, 500, 512),
        (False, 70, 192, 256),
        (False, 3, 257, 300),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(
    dtype: torch.dtype, few: bool, rows: int, inter: int, half: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The columns between are NaN, as are those before and behind."""
    monkeypatch.setattr(fused, "FEW_BLOCKS", 1 << 30 if few else 0)
    x = torch.full((rows, 2, half), math.nan, dtype=dtype)
    x[..., :inter] = (4 * torch.randn(rows, 2, inter)).to(dtype)
    stacked = slice_of_nan(x.flatten(1))
    y = fused.silu_mul(stacked, inter)
    gate, up = x[..., :inter].double().unbind(1)
    assert y.is_contiguous() and y.shape == (rows, inter)
    assert near(y, gate * gate.sigmoid() * up, 1 if dtype == torch.bfloat16 else 8)
    for fp8, fp8_dtype in (("float32", E4M3), ("ue8m0", E4M3), ("ue8m0", FNUZ)):
        assert same_quantised(fused.silu_mul(stacked, inter, fp8, dtype=fp8_dtype), y, fp8, fp8_dtype)


def test_silu_mul_far_out() -> None:
    """Where the exponential is infinite or nothing; infinities and NaN as in torch, each in its own place."""
    gate = torch.tensor([[0.0, -0.0, 90, -90, 1e4, -1e4, math.inf, -math.inf, math.nan, 1]])
    x = torch.cat((gate, torch.full((1, 10), 2.0)), dim=1)
    x[0, -1] = math.nan
    y, expected = fused.silu_mul(guarded(x), 10).cpu(), reference.silu_mul(x, 10)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.allclose(y, expected, rtol=1e-6, atol=1e-36, equal_nan=True)


@pytest.mark.parametrize("fp8", [None, "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_of_partial_sums(dtype: torch.dtype, fp8: str | None) -> None:
    """The bits of their sum, taken in order and rounded; each is followed by NaN."""
    parts = torch.full((3, 5, 2, 128), math.nan)
    parts[..., :100] = torch.randn(3, 5, 2, 100)
    summed = (parts[0] + parts[1] + parts[2]).to(dtype)
    found = fused.silu_mul(PartialSums(guarded(parts.flatten(2)), dtype), 100, fp8)
    expected = fused.silu_mul(guarded(summed.flatten(1)), 100, fp8)
    if fp8:
        assert found.dtype == expected.dtype == dtype and same(found.q, expected.q) and same(found.s, expected.s)
    else:
        assert same(found, expected)


def test_silu_mul_of_nothing() -> None:
    empty = torch.zeros(0, 256, dtype=torch.bfloat16, device=DEVICE)
    assert fused.silu_mul(empty, 100).shape == (0, 100)
    assert fused.silu_mul(empty, 100, "ue8m0").s.shape == (0, 1)


# The backend and its launches


@pytest.mark.parametrize("invariant", [False, True])
def test_the_backend_calls_the_kernels(invariant: bool) -> None:
    """They are its methods; what the reference's make is the same here."""
    x, weight = guarded(integers(5, 200).bfloat16()), guarded(norm_weight(200))

    def run(ops: ReferenceBackend) -> list[torch.Tensor]:
        y, total = ops.norm(x, weight, EPS, x, "ue8m0", keep=True)
        z = ops.silu_mul(x, 90, "ue8m0")
        assert z.x is None
        return [*y[:3], total, *z[:2]]

    gpu, plain = GpuBackend(invariant), ReferenceBackend(invariant)
    assert (gpu.norm, gpu.silu_mul) == (fused.norm, fused.silu_mul)
    assert fused.norm != plain.norm and fused.silu_mul != plain.silu_mul
    if INTERPRETED:
        assert all(same(a, b) for a, b in zip(run(gpu), run(plain), strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter takes the rows of sm_90")
def test_launches_ask_for_listed_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    with only_listed_launches(fused, monkeypatch):
        bf16 = {"dtype": torch.bfloat16}
        x, weight = torch.zeros(3, 7168, **bf16), torch.zeros(7168)
        fused.norm(x, weight, EPS, x)
        fused.norm(x, weight, EPS, x, "float32")
        fused.norm(x, weight, EPS, x, "ue8m0", keep=False)
        fused.norm(x, weight, EPS, x, "float32", keep=False)
        fused.norm(x, weight, EPS, fp8="float32", keep=False)
        fused.silu_mul(x[:1, :512], 256, "float32")
        for parts, fp8 in ((2, None), (2, "float32"), (8, "float32")):
            fused.silu_mul(PartialSums(torch.zeros(parts, 8, 512), torch.bfloat16), 256, fp8)
        for fp8 in (None, "float32", "ue8m0"):
            fused.silu_mul(x.expand(1000, 3, 7168).flatten(0, 1), 3584, fp8)

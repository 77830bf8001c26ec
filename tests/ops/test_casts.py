"""The FP8 casts and scales, exhaustively: our integer operations against torch's casts, both against exact numbers."""

import math

import numpy as np
import pytest
import torch

from ops import reference

pytest.importorskip("triton")
import triton
import triton.language as tl

from ops.gpu import casts, quantisation

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes in numpy
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
FORMATS = [None, "ue8m0"]


@triton.jit
def each(x_ptr, y_ptr, n, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + i, mask=i < n)
    if OP == "widen":
        y = casts.widen_e4m3(x)
    elif OP == "round":
        y = casts.round_e4m3(x)
    elif OP == "round fnuz":
        y = casts.round_e4m3(x, FNUZ=True)
    elif OP == "cast":
        y = casts.cast(x, y_ptr.dtype.element_ty)
    else:
        y = casts.round_up_to_power_of_two(x)
    tl.store(y_ptr + i, y, mask=i < n)


def run(op: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    each[(triton.cdiv(x.numel(), 4096),)](x.to(DEVICE), y, x.numel(), OP=op, SIZE=4096)
    return y.cpu()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, the sign of zero included; any NaN equals any NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    nan = a.float().isnan()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(nan, b.float().isnan()) and bool(((a.view(bits) == b.view(bits)) | nan).all())


def all_bf16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def hard_float32(dtype: torch.dtype) -> torch.Tensor:
    """Every bfloat16, every number of an FP8 type and every midpoint between two, one ulp to both sides, and noise."""
    numbers = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    edges = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    inf = torch.tensor(math.inf)
    edges = torch.cat([edges, torch.nextafter(edges, inf), torch.nextafter(edges, -inf)])
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 17, generator=g) * 2.0 ** torch.randint(-14, 8, (1 << 17,), generator=g)
    return torch.cat([all_bf16().float(), edges, -edges, noise])


def test_widening_is_exact_for_every_byte() -> None:
    byte = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert same(run("widen", byte, torch.float32), byte.view(E4M3).float())
    widened = byte.view(E4M3).float()
    assert same(widened.bfloat16().float(), widened)  # every e4m3 number is a bfloat16 number


@pytest.mark.parametrize("dtype, op", [(E4M3, "round"), (FNUZ, "round fnuz")])
def test_rounding_is_torchs_and_saturates(dtype: torch.dtype, op: str) -> None:
    x = hard_float32(dtype)
    largest = torch.finfo(dtype).max
    y = run(op, x, torch.uint8).view(dtype)
    assert same(y, x.clamp(-largest, largest).to(dtype))
    near = x.isnan() | (x.abs() <= largest * (1 + 1 / 32))  # rounds to the largest number unclamped
    assert same(y[near], x[near].to(dtype))


def test_rounding_is_to_nearest_with_ties_to_even() -> None:
    """Against a search of all e4m3 numbers, which owes torch's cast nothing."""
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).double()  # 0 to 448; a code's last bit is the mantissa's
    x = hard_float32(E4M3).abs()
    x = x[x <= 448].double()
    above = torch.searchsorted(numbers, x).clamp(min=1)
    below = above - 1
    down, up = x - numbers[below], numbers[above] - x
    nearest = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    assert torch.equal(run("round", x.float(), torch.uint8).long(), nearest)
    assert run("round", torch.tensor([7.988]), torch.uint8).view(E4M3).item() == 8


def test_cast_to_bf16_is_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 17,), generator=g).to(torch.int32)
    ties = (torch.arange(65536, dtype=torch.int32) << 16) | 0x8000
    x = torch.cat([bits, ties, ties + 1, ties - 1]).view(torch.float32)
    assert same(run("cast", x, torch.bfloat16), x.bfloat16())


def test_power_of_two_scales_are_exact() -> None:
    """At every power of two that is a normal float32, and one ulp to both sides."""
    power = torch.tensor([2.0**e for e in range(-126, 128)])
    above, below = torch.nextafter(power, torch.tensor(math.inf)), torch.nextafter(power, torch.tensor(0.0))
    x = torch.cat([power, above[:-1], below[1:]])
    mantissa, exponent = np.frexp(x.double().numpy())  # x = mantissa * 2**exponent, mantissa in [0.5, 1)
    exact = torch.from_numpy(np.exp2(np.where(mantissa == 0.5, exponent - 1, exponent))).float()
    special = torch.tensor([math.inf, math.nan])
    x, exact = torch.cat([x, special]), torch.cat([exact, special])
    assert same(reference.round_up_to_power_of_two(x), exact)
    assert same(run("power", x, torch.float32), exact)


@pytest.mark.parametrize("scale_fmt", FORMATS)
@pytest.mark.parametrize("dtype", [E4M3, FNUZ])
@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_act_quant_of_every_bf16(order: str, dtype: torch.dtype, scale_fmt: str | None) -> None:
    """Sorted by bits, a block holds numbers of one size; mixed, its scale sends most of them among the subnormals."""
    x = all_bf16()
    if order == "mixed":
        finite = x[x.isfinite()]
        x = torch.cat([finite, torch.zeros(-finite.numel() % 128, dtype=x.dtype)]).view(128, -1).T.contiguous()
    x = x.reshape(-1, 128)
    q, s = quantisation.act_quant(x.to(DEVICE), scale_fmt=scale_fmt, dtype=dtype)
    expected_q, expected_s = reference.act_quant(x, scale_fmt=scale_fmt, dtype=dtype)
    assert same(s.cpu(), expected_s)
    assert same(q.cpu(), expected_q)


@pytest.mark.parametrize("scale_fmt", FORMATS)
def test_reference_act_quant_is_the_formula(scale_fmt: str | None) -> None:
    """One block after the other in numpy, whose float32 division is IEEE's."""
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(64, 128, generator=g) * 2.0 ** torch.randint(-20, 20, (64, 1), generator=g)).bfloat16()
    q, s = reference.act_quant(x, scale_fmt=scale_fmt)
    for row, q_row, scale in zip(x, q, s, strict=True):
        exact = np.float32(max(row.float().abs().max().item(), np.float32(1e-4))) / np.float32(448)
        if scale_fmt == "ue8m0":
            mantissa, exponent = math.frexp(exact)
            exact = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
        assert scale.item() == exact
        assert same(q_row, torch.from_numpy(row.float().numpy() / exact).to(E4M3))


@pytest.mark.parametrize("scale_fmt", FORMATS)
def test_act_quant_keeps_nan_and_never_makes_one(scale_fmt: str | None) -> None:
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1, 5], x[2, 200], x[3, 7] = math.nan, math.inf, torch.finfo(torch.bfloat16).max
    x[4] = 0
    x[5, :128] = torch.finfo(torch.bfloat16).tiny
    for q, s in (quantisation.act_quant(x.to(DEVICE), scale_fmt=scale_fmt), reference.act_quant(x, scale_fmt=scale_fmt)):
        bad = (q.cpu().float().unflatten(-1, (2, 128)) * s.cpu().unsqueeze(-1)).isnan().any(dim=-1)
        assert bad.nonzero().tolist() == [[1, 0], [2, 1]]
        assert (q[4].float() == 0).all() and (s > 0).cpu()[[0, 3, 4, 5]].all()


def test_fnuz_means_the_same_weights() -> None:
    w = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(E4M3).view(2, 128)
    s = torch.tensor([[0.37]])
    fnuz, doubled = reference.to_fnuz(w, s)
    old, new = w.float() * s, fnuz.float() * doubled
    assert fnuz.dtype == FNUZ
    assert torch.equal(old.isnan(), new.isnan())
    assert torch.equal(old[~old.isnan()], new[~new.isnan()])

"""The C kernels' products in fixed point, against float64, with every set of instructions that has them, as far as this
processor has it."""

import math
import platform

import pytest
import torch

from core.numerics import Form
from ops import reference
from ops.cpu import kernels
from ops.cpu.backend import CompiledCpuBackend
from ops.formats import Weight
from support.limits import LAST_RESORT, limited
from support.model_pairs import relative_error
from support.processor import FEATURES, flags_for
from support.quantised_weights import FORMS, every_byte, every_nibble, exact, random_weight

NEEDS = {
    "x86-64-v3": {"avx2"}, "alderlake": {"avx_vnni"}, "cascadelake": {"avx512_vnni"},
    "icelake-server": {"avx512_vnni", "avx512vbmi", "avx512_bitalg"},
}  # fmt: skip
LONG = ("alderlake", "cascadelake")
FEW = {16: 4, 32: 3}  # by the width of a panel: rows that take weights as they lie

pytestmark = [
    pytest.mark.timeout(LAST_RESORT),  # the compiler has a limit of its own, of processor time
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instructions are x86's"),
    pytest.mark.usefixtures("march"),
]

if kernels.library() is None:
    pytest.skip("no C compiler, or other threads than GNU OpenMP's", allow_module_level=True)


@pytest.fixture(params=["x86-64-v3", "icelake-server", *(pytest.param(march, marks=pytest.mark.trust) for march in LONG)])
def march(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the kernels are compiled for."""
    if not NEEDS[request.param] <= FEATURES:
        pytest.skip(f"this processor lacks what {request.param} has")
    found = kernels.load(kernels.build(limited(120, kernels.compilers()[0]), flags_for(f"-march={request.param}")))
    monkeypatch.setattr(kernels, "library", lambda: found)
    assert kernels.may_use_fixed() and kernels.may_use_units(True) and not kernels.may_use_units()
    return request.param


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def in_fixed_point(w: Weight) -> torch.Tensor:
    """What such a product takes for the weight, float64 (N, K): e4m3 in 13 bits by the largest of a panel's block."""
    if w.data.dtype != torch.float8_e4m3fn:
        return exact(w)
    values, rows = w.data.double(), kernels.panel_width()
    for n in range(0, len(values), rows):
        for k in range(0, values.shape[1], w.block[1]):
            part = values[n : n + rows, k : k + w.block[1]]
            step = 2.0 ** (math.frexp(max(float(part.abs().max()), 2.0**-6))[1] - 13)
            part.copy_((part / step).round() * step)
    return exact(w._replace(data=values))


def check(w: Weight, x: torch.Tensor) -> None:
    """Many rows are those of the reference to float32's rounding, and each the same bits among fewer; few are as
    without."""
    packed, expected = kernels.pack_weight(w), reference.fixed_point(x).double() @ in_fixed_point(w).T
    y = kernels.linear(x, packed, torch.float32, units=True)
    magnitude = x.double().abs() @ exact(w).abs().T
    assert ((y - expected).abs() <= 1e-6 * magnitude).all()
    few = FEW[kernels.panel_width()]
    for rows in (few + 1, few + 2, 7, 12, 13, 25, 40, 49):
        assert torch.equal(kernels.linear(x[:rows], packed, torch.float32, units=True), y[:rows]), rows
    plain = kernels.linear(x, packed, torch.float32)
    assert torch.equal(kernels.linear(x[:few], packed, torch.float32, units=True), plain[:few])
    assert torch.equal(kernels.linear(x.float(), packed, torch.float32, units=True), plain)  # floats are not rounded
    assert torch.equal(kernels.linear(x, packed, torch.bfloat16, units=True), y.bfloat16())
    if w.data.shape[-2] > 1:
        assert not torch.equal(y, plain)  # it was used


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n, k", [(1, 128), (70, 640), (300, 256)])
def test_linear(form, n, k, monkeypatch):
    """Of rows that lie apart, and in chunks of rows."""
    w, x = random_weight(FORMS[form], n, k), randn(300, k + 8, seed=1)[:, 3 : k + 3]
    check(w, x)
    packed = kernels.pack_weight(w)
    y = kernels.linear(x, packed, torch.float32, units=True)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)
    assert kernels.chunk_rows(k, True) == 12
    for rows in (13, 14, 15, 16, 17, 25, 300):  # of the last chunk as few as would not go so by themselves
        assert torch.equal(kernels.linear(x[:rows], packed, torch.float32, units=True), y[:rows]), rows


@pytest.mark.parametrize("size", [448, 129, 127, 30, 2, 0.02, 2.0**-7])
def test_weights_that_do_not_fill_their_range(size):
    """As of a cast with a scale of one. Subnormal numbers among them are not lost."""
    values = torch.rand(100, 256, generator=torch.Generator().manual_seed(0)).mul(2).sub(1) * size
    w = Weight(values.to(torch.float8_e4m3fn), torch.ones(1, 2))
    check(w, randn(60, 256))
    lost = (in_fixed_point(w) - exact(w)).abs()
    assert (lost <= w.data.float().abs().max() * 2.0**-13).all() and (size > 0.02 or not lost.any())


@pytest.mark.parametrize("kind, group", [("int8", 64), ("int8", 96), ("int8", 512), ("int4", 96), ("int4", 256)])
def test_groups_of_whole_32_channels(kind, group):
    check(random_weight(Form(kind, (1, group), zeros=kind == "int4"), 50, 3 * group), randn(60, 3 * group))


@pytest.mark.parametrize("form", ["fp8", "int8 blocks"])
def test_channels_that_fill_no_block(form):
    check(random_weight(FORMS[form], 130, 224), randn(60, 224))


@pytest.mark.parametrize(
    "form, k", [(Form("fp8"), 144), (Form("int8"), 77), (Form("int8", (1, 48)), 192), (Form("int4", (1, 36)), 72)]
)
def test_channels_and_groups_that_are_not_whole_32_are_multiplied_as_floats(form, k):
    w, x = kernels.pack_weight(random_weight(form, 50, k)), randn(40, k)
    assert torch.equal(kernels.linear(x, w, torch.float32, units=True), kernels.linear(x, w, torch.float32))


def test_plain_weights_are_multiplied_as_floats():
    w, x = kernels.pack(randn(50, 256)), randn(40, 256)
    assert torch.equal(kernels.linear(x, w, torch.float32, units=True), kernels.linear(x, w, torch.float32))


@pytest.mark.parametrize("form", ["fp8", "int8 blocks"])
def test_every_byte_in_every_place(form):
    """Rows that are one at one k, and so pick single values, whose scale is a power of two. All of int8 are exact, and
    of e4m3, with all values among them, from a half on; a smaller one is the nearest sixteenth."""
    w = every_byte(FORMS[form])
    y = 8 * kernels.linear(torch.eye(256).bfloat16(), kernels.pack_weight(w), torch.float32, units=True).T
    values = w.data.float()
    assert torch.equal(y, (values * 16).round() / 16 if form == "fp8" else values)
    assert form != "fp8" or torch.equal(y[values.abs() >= 0.5], values[values.abs() >= 0.5])


@pytest.mark.parametrize("zeros", [True, False])
def test_every_nibble_with_every_zero_point(zeros):
    w = every_nibble(zeros)
    y = kernels.linear(torch.eye(512).bfloat16(), kernels.pack_weight(w), torch.float32, units=True)
    assert torch.equal(y.T, exact(w).float()) and len(y.unique()) == (31 if zeros else 16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [-90, -40, 0, 40, 100])
def test_how_far_it_is_from_exact(form, size):
    """A number within a factor of 32 of its group's largest is exact, another wrong by at most 2^-13 of that."""
    w, x = random_weight(FORMS[form], 70, 256), randn(40, 256)
    x[::3] *= torch.exp2(-10 * torch.rand(14, 256, generator=torch.Generator().manual_seed(1))).bfloat16()
    x[5:9, ::40] *= 1000
    x = (x.float() * 2.0**size).bfloat16()
    groups = x.double().unflatten(1, (-1, 32))
    largest = groups.abs().amax(2, keepdim=True).expand_as(groups).flatten(1)
    errors = (reference.fixed_point(x).double() - x.double()).abs()
    assert (errors <= largest * 2.0**-13).all() and not errors[x.double().abs() * 32 >= largest].any()
    allowed = errors @ exact(w).abs().T + reference.fixed_point(x).double().abs() @ (in_fixed_point(w) - exact(w)).abs().T
    y = kernels.linear(x, kernels.pack_weight(w), torch.float32, units=True)
    exactly = x.double() @ exact(w).T
    assert ((y - exactly).abs() <= allowed + 1e-6 * (x.double().abs() @ exact(w).abs().T)).all()


def test_random_rows_are_nearer_than_bfloat16_rounds():
    """The error of a product is less than a twentieth of what its rounding to bfloat16 makes."""
    w = Weight(randn(256, 1024).float().mul(100).to(torch.float8_e4m3fn), torch.ones(2, 8))
    x = randn(64, 1024, seed=1)
    exactly = x.double() @ exact(w).T
    y = kernels.linear(x, kernels.pack_weight(w), torch.float32, units=True)
    assert relative_error(y, exactly) < 5e-5 and relative_error(exactly.bfloat16(), exactly) > 1e-3


@pytest.mark.parametrize("value, weight", [(255 / 128, 448), (-255 / 128, 448), (255 / 128, -448)])
def test_the_largest_sums_fit(value, weight):
    w = Weight(torch.full((32, 256), float(weight)).to(torch.float8_e4m3fn), torch.full((1, 2), 2.0**-8))
    y = kernels.linear(torch.full((13, 256), value).bfloat16(), kernels.pack_weight(w), torch.float32, units=True)
    assert (y == value * weight).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(form, bad):
    w, x = random_weight(FORMS[form], 70, 256), randn(40, 256)
    x[18, 7] = bad
    y = kernels.linear(x, kernels.pack_weight(w), torch.float32, units=True)
    assert y[18].isnan().all() and y[[*range(18), *range(19, 40)]].isfinite().all()


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_a_weight_with_a_nan_is_multiplied_as_floats(nan):
    w, x = random_weight(FORMS["fp8"], 70, 256), randn(13, 256)
    w.data.view(torch.uint8)[33, 5] = nan
    y = kernels.linear(x, kernels.pack_weight(w), torch.float32, units=True)
    assert y[:, 33].isnan().all() and y.isnan().sum() == 13


def test_a_group_of_zeros_or_of_the_smallest_numbers_is_zeros():
    w, x = random_weight(FORMS["fp8"], 70, 256), randn(13, 256)
    y = kernels.linear(x, kernels.pack_weight(w), torch.float32, units=True)
    for small in (0.0, 2.0**-133, 2.0**-126, 2.0**-120, 2.0**-116, 2.0**-115):
        more = torch.cat((x, torch.full((13, 128), small).bfloat16()), dim=1)
        wider = Weight(torch.cat((w.data, w.data[:, :128]), 1), torch.cat((w.scale, w.scale[:, :1]), 1))
        assert torch.equal(kernels.linear(more, kernels.pack_weight(wider), torch.float32, units=True), y)
    counts = torch.full((13, 256), 2.0**-114).bfloat16()
    assert kernels.linear(counts, kernels.pack_weight(w), torch.float32, units=True).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows, h, inter", [(200, 256, 128), (17, 256, 128), (200, 256, 160), (200, 256, 144)])
def test_experts(form, rows, h, inter, monkeypatch):
    """As without, but for the rounding of what each product takes; where a product fits none, both go as floats."""
    rows_of, columns = FORMS[form].block
    if inter % columns and FORMS[form].dtype == torch.uint8:
        pytest.skip("INT4 is of whole groups")
    half = -(-inter // rows_of) * rows_of
    w13, w2 = random_weight(FORMS[form], 8, 2 * half, h), random_weight(FORMS[form], 8, h, inter, seed=1)
    w13, w2 = kernels.pack_weight(w13), kernels.pack_weight(w2)
    ids = torch.rand(rows, 8, generator=torch.Generator().manual_seed(rows)).topk(3).indices
    weights, shared = torch.rand(rows, 3, generator=torch.Generator().manual_seed(1)), randn(rows, h, seed=2)
    inputs = randn(rows, h), weights, ids, 0, w13, w2, inter, shared
    plain, y = (kernels.experts(*inputs, units) for units in (False, True))
    assert relative_error(y, plain.double()) < 1e-3
    assert torch.equal(y, plain) == (inter % 32 > 0)
    monkeypatch.setattr(kernels, "BUNDLE_ROWS", 1)
    assert torch.equal(kernels.experts(*inputs, units=True), y)


def test_only_a_backend_that_is_allowed_to_uses_it():
    assert CompiledCpuBackend(fixed_point=True).units
    assert not CompiledCpuBackend().units and not CompiledCpuBackend(batch_invariant=True, fixed_point=True).units

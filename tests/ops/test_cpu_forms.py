"""The C kernels' products by weights of 8 and 4 bits, against float64, with this processor's vectors and shorter ones."""

import math

import pytest
import torch

from core.numerics import Form
from ops.cpu import kernels
from ops.cpu.backend import CompiledCpuBackend
from ops.formats import Weight
from ops.reference_backend import ReferenceBackend
from support.limits import LAST_RESORT
from support.model_pairs import relative_error
from support.quantised_weights import FORMS, every_byte, every_nibble, exact, random_weight

pytestmark = [
    pytest.mark.timeout(LAST_RESORT),  # the compiler has a limit of its own, of processor time
    pytest.mark.usefixtures("vectors"),
]

if kernels.library() is None:
    pytest.skip("no C compiler, or other threads than GNU OpenMP's", allow_module_level=True)

BLOCKS = [name for name, form in FORMS.items() if form.block[0] > 1]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def check(w: Weight, rows: list[int]) -> None:
    """The product of the most rows is float64's to float32's rounding, and each of fewer has the same bits."""
    values, x = exact(w), randn(max(rows), exact(w).shape[1], seed=1)
    packed = kernels.pack_weight(w)
    y = kernels.linear(x, packed, torch.float32)
    expected, magnitude = x.double() @ values.T, x.double().abs() @ values.abs().T
    assert y.shape == expected.shape and ((y - expected).abs() <= 1e-6 * magnitude).all()
    for n in rows:
        assert torch.equal(kernels.linear(x[:n], packed, torch.float32), y[:n]), n
    assert torch.equal(kernels.linear(x, packed, torch.bfloat16), y.bfloat16())
    assert torch.equal(kernels.linear(x.float(), packed, torch.float32), y)
    assert relative_error(ReferenceBackend().linear(x.float(), w), y) < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape, rows", [((1, 128), [1, 2, 40]), ((70, 640), [*range(1, 40)]), ((400, 256), [3, 100, 512])]
)
def test_linear(form, shape, rows):
    check(random_weight(FORMS[form], *shape), rows)


@pytest.mark.parametrize("form", [name for name in FORMS if "int4" not in name])
@pytest.mark.parametrize("n, k", [(1, 1), (33, 77), (130, 200), (300, 129)])
def test_channels_that_fill_no_block(form, n, k):
    check(random_weight(FORMS[form], n, k), [1, 5, 30])


@pytest.mark.parametrize(
    "kind, group",
    [("int8", 2), ("int8", 48), ("int8", 96), ("int8", 144), ("int8", 512), ("int4", 4), ("int4", 36), ("int4", 256)],
)
def test_groups_of_any_size(kind, group):
    """Less than are widened at a time, and more; several of them together, of which the last may be fewer."""
    for groups in (2, 21) if group < 200 else (2,):
        check(random_weight(Form(kind, (1, group), zeros=kind == "int4"), 50, groups * group), [1, 4, 30])


@pytest.mark.parametrize("form", ["fp8", "int8 blocks"])
def test_every_byte_in_every_place(form):
    """Rows that are one at one k, and so pick single values, whose scale is a power of two."""
    w = every_byte(FORMS[form])
    y = kernels.linear(torch.eye(256).bfloat16(), kernels.pack_weight(w), torch.float32)
    assert torch.equal(y.T, w.data.float() / 8) and len(y.unique()) == (253 if form == "fp8" else 256)


@pytest.mark.parametrize("zeros", [True, False])
def test_every_nibble_with_every_zero_point(zeros):
    w = every_nibble(zeros)
    y = kernels.linear(torch.eye(512).bfloat16(), kernels.pack_weight(w), torch.float32)
    assert torch.equal(y.T, exact(w).float()) and len(y.unique()) == (31 if zeros else 16)


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_nan_stays_in_its_channel(nan):
    w = random_weight(FORMS["fp8"], 70, 200)
    w.data.view(torch.uint8)[33, 5] = nan
    packed = kernels.pack_weight(w)
    for rows in (1, 2, 3, 4, 13):
        y = kernels.linear(randn(rows, 200), packed, torch.float32)
        assert y[:, 33].isnan().all() and y.isnan().sum() == rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(form, bad):
    w, x = random_weight(FORMS[form], 70, 256), randn(13, 256)
    x[5, 7] = bad
    y = kernels.linear(x, kernels.pack_weight(w), torch.float32)
    assert not y[5].isfinite().any() and y[[*range(5), *range(6, 13)]].isfinite().all()
    few = kernels.linear(x[4:7], kernels.pack_weight(w), torch.float32)
    assert not few[1].isfinite().any() and few[[0, 2]].isfinite().all()


def test_small_numbers_are_not_lost():
    """The smallest e4m3 by inputs and scales that are small: no step of it is a subnormal float32."""
    w = Weight(torch.full((32, 128), 2.0**-9).to(torch.float8_e4m3fn), torch.full((1, 1), 2.0**-20))
    y = kernels.linear(torch.full((2, 128), 2.0**-80).bfloat16(), kernels.pack_weight(w), torch.float32)
    assert (y == 2.0 ** (-9 - 20 - 80 + 7)).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [-133, -120, -91, -90, -30, 27, 28, 60, 100])
def test_inputs_of_any_size(form, size):
    """Subnormal bfloat16 too, and with zeros, and ones, among them: a row's bits are those it has among many others."""
    w, x = random_weight(FORMS[form], 70, 384), randn(24, 384)
    w.data.view(torch.uint8)[:, ::3] &= 0x81  # many subnormal numbers and zeros
    x.view(torch.int16)[:12] = torch.tensor(2.0**size).bfloat16().view(torch.int16) | x.view(torch.int16)[:12] & -32768
    x[::5, ::7] = 0
    x[2::5, 5::11] = 1
    packed, values = kernels.pack_weight(w), exact(w)
    y = kernels.linear(x, packed, torch.float32)
    exactly, magnitude = x.double() @ values.T, x.double().abs() @ values.abs().T
    assert ((y - exactly).abs() <= 1e-6 * magnitude + 2.0**-140).all()
    for first in range(0, 12, 4):
        for n in range(1, 5):
            assert torch.equal(kernels.linear(x[first : first + n], packed, torch.float32), y[first : first + n]), (first, n)


def test_a_thread_that_takes_subnormal_numbers_for_zeros():
    """Some libraries set that when they are loaded."""
    w = random_weight(FORMS["fp8"], 70, 384)
    w.data.view(torch.uint8)[:, 1:] &= 0x81
    packed, x, threads = kernels.pack_weight(w), randn(3, 384), torch.get_num_threads()
    y = kernels.linear(x, packed, torch.float32)
    torch.set_num_threads(1)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor has no such mode")
        flushed = kernels.linear(x, packed, torch.float32)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert torch.equal(flushed, y)


def test_a_stack_of_whole_panels_is_packed_where_it_lies():
    for form in FORMS.values():
        w = random_weight(form, 3, 256, 384)
        values, x = exact(w), randn(5, 384)
        packed = kernels.pack_weight(w)
        assert packed.data.data_ptr() == w.data.data_ptr() and len(packed) == 3
        for scales, from_ in ((packed.scale, w.scale), (packed.zero, w.zero)):
            held = from_ is not None and from_.dtype != torch.float16  # which is widened
            assert not held or scales.data_ptr() == from_.data_ptr()
        ragged = random_weight(form, 3, 250, 384)
        others, before = exact(ragged), [t.clone() for t in ragged[:2]]
        apart = kernels.pack_weight(ragged)
        for now, then in zip(ragged[:2], before, strict=True):
            assert torch.equal(now.view(torch.uint8), then.view(torch.uint8))
        for e in range(3):
            assert relative_error(kernels.linear(x, packed[e], torch.float32), x.double() @ values[e].T) < 1e-6
            assert relative_error(kernels.linear(x, apart[e], torch.float32), x.double() @ others[e].T) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_what_it_takes(form):
    """Scales of bfloat16 stay so; those of float16 become float32. A matrix is left as it was."""
    w = random_weight(FORMS[form], 70, 256)
    before = w.data.clone()
    packed = kernels.pack_weight(w)
    tensors = [t for t in (packed.data, packed.scale, packed.zero) if t is not None]
    assert sum(t.numel() * t.element_size() for t in tensors) == kernels.packed_bytes(FORMS[form], 70, 256)
    assert packed.scale.dtype == (torch.bfloat16 if FORMS[form].scale == torch.bfloat16 else torch.float32)
    assert torch.equal(w.data.view(torch.uint8), before.view(torch.uint8))
    assert kernels.packed_bytes(Form(), 70, 256) == 2 * kernels.packed_numbers(70, 256)


def test_what_the_backend_packs():
    """All but W8A8, and blocks that no panel fills, which are multiplied as they are."""
    ops = CompiledCpuBackend()
    for form in FORMS.values():
        packed = ops.pack_weight(random_weight(form, 128, 256))
        assert isinstance(packed.data, kernels.Packed) and packed.scale is None and packed.zero is None
    w8a8 = random_weight(FORMS["fp8"], 128, 256)._replace(gemm="fp8")
    assert ops.pack_weight(w8a8) is w8a8
    for odd in (Form("fp8", (8, 128)), Form("int8", (1, 33))):
        w, x = random_weight(odd, 128, 256), randn(4, 256)
        assert ops.pack_weight(w) is w
        assert relative_error(ops.linear(x, w), (x.double() @ exact(w).T).bfloat16()) < 3e-3


# ---------------------------------------------------------------- instructions for pairs of bfloat16

@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("form", [*FORMS, "plain"])
@pytest.mark.parametrize("n, k", [(1, 128), (70, 640), (300, 256)])
def test_linear_in_pairs(form, n, k, monkeypatch):
    """Whatever the number of rows, a row's bits are the same; floats go another way."""
    w = Weight(randn(n, k)) if form == "plain" else random_weight(FORMS[form], n, k)
    values, x = w.data.double() if form == "plain" else exact(w), randn(300, k + 8, seed=1)[:, 3 : k + 3]
    packed = kernels.pack_weight(w)
    y = kernels.linear(x, packed, torch.float32, units=True)
    assert ((y - x.double() @ values.T).abs() <= 1e-6 * (x.double().abs() @ values.abs().T)).all()
    for rows in (*range(1, 15), 40, 100):
        assert torch.equal(kernels.linear(x[:rows], packed, torch.float32, units=True), y[:rows])
    assert torch.equal(kernels.linear(x, packed, torch.bfloat16, units=True), y.bfloat16())
    plain = kernels.linear(x, packed, torch.float32)
    assert torch.equal(kernels.linear(x.float(), packed, torch.float32, units=True), plain)
    if n > 1:
        assert not torch.equal(y, plain)  # they were used
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)
    assert torch.equal(kernels.linear(x, packed, torch.float32, units=True), y)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("n, k", [(1, 1), (67, 515), (33, 77)])
def test_an_odd_number_of_channels_in_pairs(n, k):
    w, x = randn(n, k), randn(30, k, seed=1)
    y = kernels.linear(x, kernels.pack(w), torch.float32, units=True)
    assert ((y - x.double() @ w.double().T).abs() <= 1e-6 * (x.double().abs() @ w.double().abs().T)).all()


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 9, 200])
def test_experts_in_pairs(form, rows):
    """As without, but for a rounding of what SwiGLU makes; a token's bits do not depend on the others."""
    g = torch.Generator().manual_seed(rows)
    w13, w2 = (kernels.pack_weight(w) for w in experts_of(FORMS[form], 8, 256, 128))
    x, ids = randn(rows, 256), torch.rand(rows, 8, generator=g).topk(3).indices
    weights, shared = torch.rand(rows, 3, generator=g), randn(rows, 256, seed=2)
    plain, y = (kernels.experts(x, weights, ids, 0, w13, w2, 128, shared, units) for units in (False, True))
    assert relative_error(y, plain.double()) < 4e-3
    last = slice(rows - 1, rows)
    assert torch.equal(kernels.experts(x[last], weights[last], ids[last], 0, w13, w2, 128, shared[last], True), y[last])


# ---------------------------------------------------------------- the matrix unit

@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n, k", [(1, 128), (70, 640), (300, 256)])
def test_linear_in_tiles(form, n, k, monkeypatch):
    """Every way a last tile can be short, and more rows than a chunk is widened for; few rows go another way."""
    w, all_rows = random_weight(FORMS[form], n, k), randn(300, k + 8, seed=1)[:, 3 : k + 3]
    values, packed = exact(w), kernels.pack_weight(w)
    plain, expected = kernels.linear(all_rows, packed, torch.float32), all_rows.double() @ values.T
    bound = 1e-6 * (all_rows.double().abs() @ values.abs().T)
    for rows in (4, 16, 31, 33, 48, 255, 257, 300):
        x = all_rows[:rows]
        y = kernels.linear(x, packed, torch.float32, units=True)
        assert ((y - expected[:rows]).abs() <= bound[:rows]).all(), rows
        assert torch.equal(kernels.linear(x, packed, torch.bfloat16, units=True), y.bfloat16())
        tiny = torch.full((rows, k), 2.0**-130).bfloat16()  # a zero for the matrix unit
        assert not kernels.linear(tiny, packed, torch.float32, units=True).any()
    assert torch.equal(kernels.linear(x[:3], packed, torch.float32, units=True), plain[:3])
    monkeypatch.setattr(kernels, "TILE_CHUNK_BYTES", 1)
    assert torch.equal(kernels.linear(x, packed, torch.float32, units=True), y)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "kind, group, k", [("int8", 96, 192), ("int8", 256, 512), ("int8", 48, 192), ("int4", 32, 96), ("int4", 36, 72)]
)
def test_groups_that_fill_no_tile_go_another_way(kind, group, k):
    w, x = random_weight(Form(kind, (1, group), zeros=kind == "int4"), 50, k), randn(40, k)
    tiny = torch.full((40, k), 2.0**-130).bfloat16()  # a zero for the matrix unit
    y, zero = (kernels.linear(inputs, kernels.pack_weight(w), torch.float32, units=True) for inputs in (x, tiny))
    assert ((y - x.double() @ exact(w).T).abs() <= 1e-6 * (x.double().abs() @ exact(w).abs().T)).all()
    assert bool(zero.any()) == (group % 32 > 0)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row_of_a_tile(form, bad):
    w, x = random_weight(FORMS[form], 70, 256), randn(40, 256)
    x[18, 7] = bad
    y = kernels.linear(x, kernels.pack_weight(w), torch.float32, units=True)
    assert not y[18].isfinite().any() and y[[*range(18), *range(19, 40)]].isfinite().all()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows, h, inter", [(200, 256, 128), (60, 256, 128), (200, 256, 144)])
def test_experts_in_tiles(form, rows, h, inter, monkeypatch):
    """As without, but for a rounding of what SwiGLU makes; experts with few rows, or whose second product fills no
    tile, go another way."""
    if inter % FORMS[form].block[1] and FORMS[form].dtype == torch.uint8:
        pytest.skip("INT4 is of whole groups")
    w13, w2 = (kernels.pack_weight(w) for w in experts_of(FORMS[form], 8, h, inter))
    ids = torch.rand(rows, 8, generator=torch.Generator().manual_seed(rows)).topk(3).indices
    weights, shared = torch.rand(rows, 3, generator=torch.Generator().manual_seed(1)), randn(rows, h, seed=2)
    inputs = randn(rows, h), weights, ids, 0, w13, w2, inter, shared
    plain, y = (kernels.experts(*inputs, units) for units in (False, True))
    assert relative_error(y, plain.double()) < 4e-3
    if inter % 32:
        assert torch.equal(y, plain)
    monkeypatch.setattr(kernels, "BUNDLE_ROWS", 1)
    assert torch.equal(kernels.experts(*inputs, units=True), y)


# ---------------------------------------------------------------- mixture of experts


def experts_of(form: Form, n: int, h: int, inter: int) -> tuple[Weight, Weight]:
    """w13, each half in whole blocks of rows, and w2."""
    half = -(-inter // form.block[0]) * form.block[0]
    return random_weight(form, n, 2 * half, h), random_weight(form, n, h, inter, seed=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("h, inter", [(256, 128), (128, 384), (200, 72)])
@pytest.mark.parametrize("rows, first, n_local", [(1, 0, 8), (40, 2, 3), (100, 0, 8), (512, 0, 2)])
def test_experts(form, h, inter, rows, first, n_local):
    """One token or many, all experts or this rank's; a width that fills no block."""
    if FORMS[form].kind == "int4" and h % 128:
        pytest.skip("groups are whole")
    g = torch.Generator().manual_seed(rows)
    w13, w2 = experts_of(FORMS[form], n_local, h, inter)
    x, shared = randn(rows, h), randn(rows, h, seed=2)
    ids = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(rows)])
    weights = torch.rand(rows, 3, generator=g)
    expected, half = shared.double(), w13.data.shape[1] // 2
    for e in range(n_local):
        token, place = (ids == first + e).nonzero(as_tuple=True)
        gate_up = x[token].double() @ exact(w13.expert(e)).T
        middle = torch.nn.functional.silu(gate_up[:, :inter]) * gate_up[:, half : half + inter]
        expected[token] += weights[token, place, None].double() * (middle @ exact(w2.expert(e)).T)
    packed = [kernels.pack_weight(w) for w in (w13, w2)]
    y = kernels.experts(x, weights, ids, first, *packed, inter, shared)
    assert ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5 * expected.abs().max()).all()
    few = slice(rows // 2, rows // 2 + 5)
    assert torch.equal(kernels.experts(x[few], weights[few], ids[few], first, *packed, inter, shared[few]), y[few])


@pytest.mark.parametrize("invariant", [True, False])
def test_experts_of_two_forms(invariant):
    """One stack that is packed, one that is not."""
    ops = CompiledCpuBackend(batch_invariant=invariant)
    w13, w2 = random_weight(FORMS["fp8"], 4, 256, 128), random_weight(Form("int8", (8, 128)), 4, 128, 128)
    x, weights, ids = randn(9, 128), torch.rand(9, 1), torch.arange(9).remainder(4)[:, None]
    expected = ReferenceBackend().experts(x, weights, ids, 0, w13, w2, 128)
    mixed = ops.experts(x, weights, ids, 0, ops.pack_weight(w13), ops.pack_weight(w2), 128)
    assert relative_error(mixed, expected) < 5e-3

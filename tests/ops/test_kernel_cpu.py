"""The C kernels against float64 and their references, with this processor's vectors and with shorter ones."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.batch import Batch
from engine import recorded_steps
from ops import reference
from ops.cpu import kernels
from ops.cpu.backend import CompiledCpuBackend
from ops.cpu.kernels import Packed
from ops.formats import Routing
from support.limits import LAST_RESORT
from support.model_pairs import relative_error

pytestmark = [
    pytest.mark.timeout(LAST_RESORT),  # the compiler has a limit of its own, of processor time
    pytest.mark.usefixtures("vectors"),
]

if kernels.library() is None:
    pytest.skip("no C compiler, or other threads than GNU OpenMP's", allow_module_level=True)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


# ---------------------------------------------------------------- matrix products


@pytest.mark.parametrize("n, k", [(96, 160), (1, 1), (67, 515), (130, 33), (32, 7), (300, 64)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 7, 12, 13, 25, 120])
def test_linear(n, k, rows):
    """Whole panels and part of one, every number of rows a block can have; rounded once, if at all."""
    w, x = randn(n, k), randn(rows, k, seed=1)
    expected = x.double() @ w.double().T
    packed = kernels.pack(w)
    y = kernels.linear(x, packed, torch.float32)
    assert y.shape == (rows, n) and ((y - expected).abs() <= 1e-6 * (x.double().abs() @ w.double().abs().T)).all()
    assert torch.equal(kernels.linear(x, packed, torch.bfloat16), y.bfloat16())
    assert torch.equal(kernels.linear(x.float(), packed, torch.float32), y)
    wider = randn(rows, k + 5, seed=2)
    wider[:, 2 : k + 2] = x
    assert torch.equal(kernels.linear(wider[:, 2 : k + 2], packed, torch.float32), y)  # rows that lie apart
    assert torch.equal(kernels.linear(x.T.contiguous().T, packed, torch.float32), y)  # numbers that do


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("n, k", [(96, 160), (67, 512), (1, 32), (300, 64)])
@pytest.mark.parametrize("rows", [4, 15, 16, 17, 31, 33, 47, 100, 250])
def test_linear_in_tiles(n, k, rows, monkeypatch):
    """Every way a last tile can be short, of rows that lie apart; the sums of fewer rows are added up as without."""
    w, x = randn(n, k), randn(rows, k + 8, seed=1)[:, 3 : k + 3]
    expected, magnitude = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    packed = kernels.pack(w)
    y = kernels.linear(x, packed, torch.float32, units=True)
    assert y.shape == (rows, n) and ((y - expected).abs() <= 1e-6 * magnitude).all()
    assert torch.equal(kernels.linear(x, packed, torch.bfloat16, units=True), y.bfloat16())
    assert torch.equal(
        kernels.linear(x.float(), packed, torch.float32, units=True), plain := kernels.linear(x, packed, torch.float32)
    )
    assert torch.equal(kernels.linear(x[:3], packed, torch.float32, units=True), plain[:3])
    monkeypatch.setattr(kernels, "TILE_CHUNK_BYTES", 1)
    assert kernels.tile_chunk_rows(k) == 96
    assert torch.equal(kernels.linear(x, packed, torch.float32, units=True), y)
    if n > 1 and k > 100:
        assert not torch.equal(y, plain)  # they were used
    else:
        assert ((plain - expected).abs() <= 1e-6 * magnitude).all()


@pytest.mark.usefixtures("tiles")
def test_channels_that_fill_no_tile_go_another_way():
    w, x = randn(64, 40), randn(50, 40, seed=1)
    y = kernels.linear(x, kernels.pack(w), torch.float32)
    assert torch.equal(kernels.linear(x, kernels.pack(w), torch.float32, units=True), y)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row_of_a_tile(bad):
    w, x = randn(70, 64), randn(40, 64, seed=1)
    w[33, 4] = x[18, 7] = bad
    y = kernels.linear(x, kernels.pack(w), torch.float32, units=True)
    expected = x.float() @ w.float().T
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


def test_only_a_backend_that_need_not_be_batch_invariant_uses_units(monkeypatch):
    monkeypatch.setattr(kernels, "may_use_units", lambda fixed_point: True)
    assert CompiledCpuBackend().units and not CompiledCpuBackend(batch_invariant=True).units


def test_an_odd_number_of_channels_is_filled_up():
    """What the memory held before may be NaN, which zeros do not take away."""
    w, x = randn(40, 33), randn(5, 33, seed=1)
    expected = kernels.linear(x, kernels.pack(w), torch.float32)
    torch.use_deterministic_algorithms(True)  # has torch fill new memory with NaN
    try:
        assert torch.equal(kernels.linear(x, kernels.pack(w), torch.float32), expected) and expected.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_row_does_not_depend_on_other_rows(monkeypatch):
    """To the bit: whatever the number of rows, and so the block's and the chunk's."""
    x, packed = randn(150, 600), kernels.pack(randn(150, 600, seed=1))
    whole = kernels.linear(x, packed, torch.float32)
    for rows in range(1, 30):
        assert torch.equal(kernels.linear(x[:rows], packed, torch.float32), whole[:rows])
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 4 * 600 * 40)
    assert kernels.chunk_rows(600) == 36
    assert torch.equal(kernels.linear(x, packed, torch.float32), whole)


def test_a_stack_of_whole_panels_is_packed_where_it_lies():
    stack, x = randn(3, 96, 50), randn(5, 50, seed=1)
    plain = stack.clone()
    packed = kernels.pack(stack)
    assert packed.data.data_ptr() == stack.data_ptr() and len(packed) == 3 and not torch.equal(stack, plain)
    ragged = kernels.pack(odd := plain[:, :91].contiguous())
    assert torch.equal(odd, plain[:, :91]) and ragged.data.numel() == 3 * kernels.packed_numbers(91, 50)
    for e in range(3):
        y = kernels.linear(x, packed[e], torch.float32)
        assert relative_error(y, x.double() @ plain[e].double().T) < 1e-6
        assert torch.equal(kernels.linear(x, ragged[e], torch.float32), y[:, :91])


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE.exists() or "[never]" in HUGE.read_text(), reason="Linux gives no huge pages here")
def test_a_packed_weight_lies_in_huge_pages():
    """Whole ones within it were asked for: `hg` among the flags of its memory."""
    packed = kernels.pack(torch.zeros(4096, 2048).bfloat16())
    middle, found = packed.data.data_ptr() + (8 << 20), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(match[1], 16) <= middle < int(match[2], 16)
        elif is_there and line.startswith("VmFlags:"):
            found = line
    assert " hg" in found


def test_a_matrix_is_left_as_it_was():
    """The head may be the embedding too."""
    w = randn(64, 32)
    kernels.pack(w)
    assert torch.equal(w, randn(64, 32))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    w, x = randn(70, 20), randn(3, 20, seed=1)
    w[33, 4] = x[1, 7] = bad
    y = kernels.linear(x, kernels.pack(w), torch.float32)
    expected = x.float() @ w.float().T
    assert torch.equal(y.isfinite(), expected.isfinite()) and not y[0, 33].isfinite() and not y[1].isfinite().any()
    assert torch.equal(y.isnan(), expected.isnan())
    rounded = kernels.linear(x, kernels.pack(w), torch.bfloat16)
    assert torch.equal(rounded.isnan(), y.isnan()) and torch.equal(rounded.isinf(), y.isinf())


def test_rounding_is_to_even():
    """Ties, which multiplying by one leaves as they are; the largest numbers round up to infinity."""
    one = kernels.pack(torch.eye(64).bfloat16())
    bits = torch.arange(1 << 16, dtype=torch.int64)[:, None] * 65536 + torch.tensor(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    )
    x = ((bits + 2**31) % 2**32 - 2**31).to(torch.int32).view(torch.float32).flatten()
    x = x[x.isfinite() & ((x.abs() >= 2.0**-126) | (x == 0))][: 6 * 65000 // 64 * 64].view(-1, 64)
    assert torch.equal(kernels.linear(x, one, torch.bfloat16), x.bfloat16())
    few = kernels.pack(torch.eye(5, 64).bfloat16())  # less than a vector
    assert torch.equal(kernels.linear(x, few, torch.bfloat16), x[:, :5].bfloat16())


# ---------------------------------------------------------------- mixture of experts


@pytest.mark.parametrize("h, inter", [(72, 40), (64, 32), (33, 7)])
@pytest.mark.parametrize("rows, first, n_local", [(1, 0, 8), (7, 0, 8), (200, 0, 8), (7, 2, 3), (1, 6, 2), (90, 0, 1)])
def test_experts(rows, first, n_local, h, inter, monkeypatch):
    """One token or many, all experts or this rank's, ones nobody chose; in bundles of few rows and many."""
    g = torch.Generator().manual_seed(rows)
    w13 = torch.randn(n_local, 2 * inter, h, generator=g).bfloat16() / 8
    w2 = torch.randn(n_local, h, inter, generator=g).bfloat16() / 8
    x, shared = torch.randn(rows, h, generator=g).bfloat16(), torch.randn(rows, h, generator=g).bfloat16()
    ids = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(rows)])
    weights = torch.rand(rows, 3, generator=g)
    expected = torch.zeros(rows, h, dtype=torch.float64)
    for t in range(rows):
        for e, weight in zip((ids[t] - first).tolist(), weights[t].double(), strict=True):
            if 0 <= e < n_local:
                gate, up = (w13[e].double() @ x[t].double()).chunk(2)
                expected[t] += weight * (w2[e].double() @ (torch.nn.functional.silu(gate) * up))
    packed = kernels.pack(w13), kernels.pack(w2)
    alone = kernels.experts(x, weights, ids, first, *packed, inter)
    assert alone.dtype == torch.bfloat16
    assert ((alone.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5 * expected.abs().max()).all()
    both = kernels.experts(x, weights, ids, first, *packed, inter, shared)
    exact = expected + shared.double()
    assert ((both.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()
    for bundle in (1, 40):  # whatever goes together, and a row whatever else there is
        monkeypatch.setattr(kernels, "BUNDLE_ROWS", bundle)
        assert torch.equal(kernels.experts(x, weights, ids, first, *packed, inter, shared), both)
    last = slice(rows - 1, rows)
    few = kernels.experts(x[last], weights[last], ids[last], first, *packed, inter, shared[last])
    assert torch.equal(few, both[last])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("rows, first, n_local", [(16, 0, 8), (200, 0, 8), (100, 2, 3), (90, 0, 1)])
@pytest.mark.parametrize("h, inter", [(96, 64), (72, 32), (64, 40)])
def test_experts_in_tiles(rows, first, n_local, h, inter, monkeypatch):
    """Beside experts with too few rows; as without tiles, but for a rounding of what SwiGLU makes."""
    g = torch.Generator().manual_seed(rows)
    w13 = torch.randn(n_local, 2 * inter, h, generator=g).bfloat16() / 8
    w2 = torch.randn(n_local, h, inter, generator=g).bfloat16() / 8
    x, shared = torch.randn(rows, h, generator=g).bfloat16(), torch.randn(rows, h, generator=g).bfloat16()
    ids = torch.rand(rows, 8, generator=g).mul(torch.tensor([9.0, 9, 9, 9, 2, 2, 1, 1])).topk(3).indices
    weights = torch.rand(rows, 3, generator=g)
    inputs = x, weights, ids, first, kernels.pack(w13), kernels.pack(w2), inter, shared
    plain, y = (kernels.experts(*inputs, units=units) for units in (False, True))
    assert relative_error(y, plain.double()) < 4e-3
    for bundle in (1, 40):
        monkeypatch.setattr(kernels, "BUNDLE_ROWS", bundle)
        assert torch.equal(kernels.experts(*inputs, units=True), y)
    if h % 32 or inter % 32:
        assert torch.equal(y, plain)


RULES = [
    Routing(4, score, method, groups, 3, normalise, 2.5)
    for score in ("sigmoid", "softmax")
    for method, groups in (("greedy", 1), ("greedy", 8), ("noaux_tc", 8), ("group_limited_greedy", 8), ("noaux_tc", 1))
    for normalise in (True, False)
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.score_func}-{r.topk_method}-{r.n_groups}-{r.normalise}")
@pytest.mark.parametrize("biased", [False, True])
def test_route(rule, biased):
    g = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(300, 64, generator=g)
    bias = torch.randn(64, generator=g) if biased else None
    weights, ids = kernels.route(logits, bias, rule)
    expected, chosen = reference.route(logits, bias, rule)
    assert torch.equal(ids, chosen) and relative_error(weights, expected) < 1e-6


def test_equal_choices_are_taken_in_order():
    weights, ids = kernels.route(torch.zeros(2, 12), None, Routing(5, "softmax", "noaux_tc", 4, 2, False, 1.0))
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2 and torch.allclose(weights, torch.tensor(1 / 12))


@pytest.mark.parametrize(
    "rule", [r for r in RULES if r.normalise], ids=lambda r: f"{r.score_func}-{r.topk_method}-{r.n_groups}"
)
@pytest.mark.parametrize("place", [0, 17, 63])
def test_nan_is_chosen_and_so_seen(rule, place):
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    logits[1, place] = math.nan
    weights, ids = kernels.route(logits, None, rule)
    assert weights[1].isnan().any() and not weights[0].isnan().any()
    assert place in ids[1].tolist() or rule.score_func == "softmax"  # where all are NaN
    logits[1] = math.nan
    weights, ids = kernels.route(logits, None, rule)
    assert weights[1].isnan().all() and len(set(ids[1].tolist())) == 4 and ids.max() < 64


def test_choices_of_minus_infinity():
    """With fewer experts left than wanted the rest are some that were dropped, each once."""
    rule = Routing(4, "sigmoid", "noaux_tc", 4, 1, True, 1.0)
    bias = torch.full((8,), -math.inf)
    bias[3] = 0
    for b, one in ((None, rule), (bias, rule), (bias, replace(rule, n_groups=1))):
        weights, ids = kernels.route(torch.randn(5, 8), b, one)
        assert all(len(set(row)) == 4 for row in ids.tolist()) and weights.isfinite().all()
    assert ids[:, 0].eq(3).all()


# ---------------------------------------------------------------- what goes number by number


def same_but_for_the_last_bit(y: torch.Tensor, expected: torch.Tensor, share: float = 0.01) -> None:
    """Sums in another order may round another way now and then."""
    far = (y.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert far.max() <= 1 and (far > 0).float().mean() <= share


def exactly_float32(n: int, seed: int) -> torch.Tensor:
    """A norm's weight (n,) that no bfloat16 holds."""
    return randn(n, seed=seed).float() * 1.001


@pytest.mark.parametrize("h", [1, 15, 16, 300])
@pytest.mark.parametrize("rows", [1, 40])
def test_norm(h, rows):
    x, delta, w = randn(rows, h), randn(rows, h, seed=1), exactly_float32(h, seed=2)
    for more in (None, delta):
        y, total = kernels.norm(x, w, 1e-6, more)
        expected, sums = reference.norm(x, w, 1e-6, more)
        assert torch.equal(total, sums)
        same_but_for_the_last_bit(y, expected)
    wide = randn(rows, h + 9)
    same_but_for_the_last_bit(kernels.norm(wide[:, :h], w, 1e-6)[0], reference.norm(wide[:, :h], w, 1e-6)[0])


@pytest.mark.parametrize("inter", [1, 33, 64])
def test_silu_mul(inter):
    gate_up = randn(50, 2 * (inter + 3)) * 4
    assert torch.equal(kernels.silu_mul(gate_up, inter), reference.silu_mul(gate_up, inter))


def test_silu_of_every_number():
    """All 65,536 of bfloat16, with which exp is tested too."""
    gate = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate_up = torch.cat((gate[:, None], torch.ones(1 << 16, 1).bfloat16()), dim=-1).view(-1, 32, 2).mT.reshape(-1, 64)
    y = kernels.silu_mul(gate_up, 32).flatten()
    exact = torch.nn.functional.silu(gate.double())
    finite = gate.isfinite()
    assert torch.equal(y.isnan(), gate.isnan() | (gate == -math.inf))
    error = (y.double() - exact)[finite].abs()
    assert (error <= 2**-8 * exact[finite].abs() + 1e-35).all()
    assert y[gate == math.inf].item() == math.inf


def test_latents_and_rotary():
    """As the reference does: shuffled slots, one that is written nowhere, inputs that are parts of wider rows."""
    c, r, n = 50, 16, 5
    kv, q = randn(9, 8 + c + r)[:, 8:], randn(9, n, 24 + r, seed=1)[..., 24:]
    angles = torch.rand(9, r // 2, generator=torch.Generator().manual_seed(2)) * 100
    slots = torch.tensor([3, 4, 200, -1, 100, 101, 7, 8, 255])
    pools = [torch.full((4, 64, c + r), 7.0).bfloat16() for _ in range(2)]
    inputs = kv, exactly_float32(c, seed=3), 1e-6, angles.cos(), angles.sin(), slots
    kernels.write_latents(*inputs, pools[0])
    reference.norm_latents(*inputs, pools[1])
    same_but_for_the_last_bit(pools[0], pools[1], 0.02)
    turned = kernels.rotary(q, angles.cos(), angles.sin())
    same_but_for_the_last_bit(turned, reference.rotary(q, angles.cos(), angles.sin()), 0.02)
    again = pools[0].clone()
    kernels.write_latents(kv.clone(), *inputs[1:], pools[0])
    assert torch.equal(again, pools[0]) and torch.equal(kernels.rotary(q.clone(), angles.cos(), angles.sin()), turned)


# ---------------------------------------------------------------- attention


def problem(lengths, new, n=5, dn=24, r=16, dv=20, c=48, page=64, seed=0):
    """Ragged sequences over shuffled pages, in bfloat16, and the reference's answer in float32."""
    g = torch.Generator().manual_seed(seed)
    n_pages = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(n_pages), generator=g).tolist()
    pages = [[order.pop() for _ in range(count)] for count in n_pages]
    batch = Batch.pack([([0] * q, k - q, p) for k, q, p in zip(lengths, new, pages, strict=True)])
    t = sum(new)
    q_nope, q_pe = (torch.randn(t, n, d, generator=g).bfloat16() for d in (dn, r))
    latents = torch.randn(sum(n_pages), page, c + r, generator=g).bfloat16()
    w_uk, w_uv = (torch.randn(n, d, c, generator=g).div(c**0.5).bfloat16() for d in (dn, dv))
    inputs = (q_nope, q_pe, latents, batch, w_uk, w_uv, 0.37)
    return inputs, reference.mla(*[x.float() if isinstance(x, torch.Tensor) else x for x in inputs])


def attend(inputs, most: int = 16) -> torch.Tensor:
    out = torch.full((*inputs[0].shape[:2], inputs[5].shape[1]), 7.0).bfloat16()
    kernels.mla(*inputs, most, out)
    return out


SHAPES = [
    ([1], [1]),
    ([64, 65, 128, 300], [1, 1, 1, 1]),
    ([300, 517, 250], [16, 1, 5]),  # drafts, which do not see each other's future
    ([2, 64, 63], [2, 7, 16]),
    ([3000], [3]),  # in several splits
    ([17000, 70], [1, 2]),  # which grow
]


@pytest.mark.parametrize("lengths, new", SHAPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {}, {"n": 16, "c": 512, "r": 64}, {"n": 20, "c": 50}, {"n": 3, "c": 7, "r": 2, "dv": 5},
        {"n": 2, "dn": 128, "r": 64, "dv": 192, "c": 64},  # GigaChat3's values
    ],
)  # fmt: skip
def test_mla(lengths, new, sizes):
    if sizes.get("c") == 512 and max(lengths) > 4000:
        lengths = [n // 4 for n in lengths]
    inputs, expected = problem(lengths, new, **sizes)
    assert relative_error(attend(inputs), expected) < 3e-3


def test_scores_far_apart():
    """Where one key takes it all, and where those of the first splits count for nothing."""
    (q_nope, q_pe, latents, batch, w_uk, w_uv, _), _ = problem([900], [2])
    inputs = q_nope, q_pe, latents, batch, w_uk, w_uv, 40.0
    expected = reference.mla(*[x.float() if isinstance(x, torch.Tensor) else x for x in inputs])
    assert relative_error(attend(inputs), expected) < 1e-2


def test_a_sequence_does_not_depend_on_others():
    """To the bit, and NaN in one stays there."""
    lengths, new = [300, 700, 250], [3, 1, 5]
    inputs, _ = problem(lengths, new)
    q_nope, q_pe, latents, batch, *rest = inputs
    together = attend(inputs)
    for b, rows in enumerate((slice(0, 3), slice(3, 4), slice(4, 9))):
        own = batch.pages[b, : -(-lengths[b] // 64)].tolist()
        alone = Batch.pack([([0] * new[b], lengths[b] - new[b], own)])
        assert torch.equal(attend((q_nope[rows], q_pe[rows], latents, alone, *rest)), together[rows])
    latents[batch.pages[1, 0], 5] = math.nan
    spoiled = attend(inputs)
    assert (
        spoiled[3].isnan().all() and torch.equal(spoiled[:3], together[:3]) and torch.equal(spoiled[4:], together[4:])
    )


def test_sequences_of_many_rows_are_left_alone():
    inputs, expected = problem([300, 200, 100], [1, 17, 16])
    out = attend(inputs)
    assert out[1:18].eq(7).all() and relative_error(out[[0, *range(18, 34)]], expected[[0, *range(18, 34)]]) < 3e-3
    assert attend(inputs, most=0).eq(7).all()


def expand(inputs, most: int = 0, units: bool = False) -> torch.Tensor:
    out = torch.full((*inputs[0].shape[:2], inputs[5].shape[1]), 7.0).bfloat16()
    kernels.mla_prefill(*inputs, most, out, units)
    return out


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize(
    "lengths, new", [([1], [1]), ([33, 31], [33, 31]), ([300], [300]), ([700, 90], [513, 90]), ([600, 257], [29, 1])]
)
@pytest.mark.parametrize(
    "sizes",
    [
        {}, {"n": 16, "c": 512, "r": 64}, {"n": 3, "c": 7, "r": 2, "dv": 5}, {"n": 1, "dn": 5, "c": 50},
        {"n": 2, "dn": 128, "r": 64, "dv": 192, "c": 64},  # GigaChat3's values
        {"n": 3, "dn": 64, "r": 32, "dv": 40, "c": 96}, {"n": 2, "dn": 40, "r": 32, "c": 96}, {"n": 2, "dn": 64, "r": 8, "c": 96},
    ],
)  # fmt: skip
def test_mla_prefill(lengths, new, sizes, units):
    """Less than a panel of keys, some and several blocks of them, with keys before the rows and without."""
    inputs, expected = problem(lengths, new, **sizes)
    assert relative_error(expand(inputs, units=units), expected) < 4.5e-3  # keys and values are rounded as well


@pytest.mark.parametrize(
    "rows, keys, absorbed", [(46, 64, True), (47, 64, False), (64, 64, False), (64, 512, True), (16, 16, True)]
)
def test_the_form_that_multiplies_less(rows, keys, absorbed):
    """Counted for DeepSeek-V3's sizes: what is done for each row, for each key, and for each of both."""
    assert (rows <= kernels.absorbed_rows(170, keys)) == absorbed
    c, r, dn, dv = 512, 64, 128, 128
    products = {
        True: rows * c * (dn + dv) + rows * keys * (2 * c + r),
        False: keys * c * (dn + dv) + rows * keys * (dn + r + dv),
    }
    assert rows <= kernels.ABSORBED_ROWS or (products[True] <= products[False]) == absorbed


def test_what_never_multiplies_more_is_always_absorbed():
    always = reference.absorbed_rows(torch.empty(1, 64, 32), torch.empty(1, 64, 32), 64)
    assert kernels.absorbed_rows(always, 100) >= 100


def test_steps_that_are_recorded_are_absorbed():
    assert all(kernels.absorbed_rows(170, keys) >= recorded_steps.ROWS for keys in (1, 2, 8, 100000))


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"n": 3, "dn": 64, "r": 32, "dv": 40, "c": 96}])
def test_a_prefilled_row_does_not_depend_on_others(units, sizes):
    """To the bit: neither on other sequences nor on later rows; NaN in a sequence stays there."""
    lengths, new = [300, 700], [300, 400]
    inputs, _ = problem(lengths, new, **sizes)
    q_nope, q_pe, latents, batch, *rest = inputs
    together = expand(inputs, units=units)
    own = batch.pages[1, :11].tolist()
    for first, last in ((300, 317), (340, 600), (699, 700)):
        rows = slice(first, last)  # of the batch; the second sequence's are at 300 more, of 700
        part = Batch.pack([([0] * (last - first), first, own)])
        assert torch.equal(expand((q_nope[rows], q_pe[rows], latents, part, *rest), units=units), together[rows])
    latents[batch.pages[0, 0], 5] = math.nan
    spoiled = expand(inputs, units=units)
    assert spoiled[5:300].isnan().all() and torch.equal(spoiled[300:], together[300:])


def test_prefill_far_apart():
    """Where one key takes it all, and where those of the first blocks count for nothing."""
    (q_nope, q_pe, latents, batch, w_uk, w_uv, _), _ = problem([900], [300])
    inputs = q_nope, q_pe, latents, batch, w_uk, w_uv, 40.0
    expected = reference.mla_expanded(
        q_nope, q_pe, reference.gather(latents, batch.pages[0], 900), batch.positions, w_uk, w_uv, 40.0
    )
    assert relative_error(expand(inputs), expected) < 3e-2


def test_prefill_leaves_sequences_of_few_rows_alone():
    inputs, expected = problem([300, 200, 100], [20, 16, 17])
    out = expand(inputs, most=16)
    assert out[20:36].eq(7).all() and relative_error(out[36:], expected[36:]) < 4.5e-3


def test_wrong_dtypes_are_noticed():
    packed = kernels.pack(randn(32, 8))
    with pytest.raises(Exception, match="float16 where C takes"):
        kernels.norm(torch.ones(1, 8).half(), torch.ones(8), 1e-6)
    with pytest.raises(AssertionError):
        kernels.linear(randn(2, 9), packed, torch.float32)
    with pytest.raises(AssertionError):
        kernels.linear(randn(2, 8), Packed(packed.data[None], 32, 8), torch.float32)

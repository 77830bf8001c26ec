"""The kernels of a mixture-of-experts layer, each against its reference on ragged shapes, then the layer as a whole.

As in test_kernel.py: interpreted without a GPU, outputs NaN beforehand, inputs followed by NaN.
"""

import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from core.config import BLOCK_SIZE
from ops import reference
from ops.formats import PartialSums, Quantised, Routing, Weight
from ops.reference_backend import ReferenceBackend
from support.kernel_launches import only_listed_launches
from support.quantised_weights import FORMS, random_weight
from support.quantised_weights import exact as exact_values

pytest.importorskip("triton")
from test_kernel import DEVICE, E4M3, INTERPRETED, PRECISE, PRECISE_BF16, guarded, poisoned, same, wide
from test_kernel import activations as quantised_activations
from test_kernel import seeded as seeded
from test_kernel import weights as quantised_weights

from ops.gpu import device, grouped_gemm, moe, ordered_gemm, quantisation, router, tiles
from ops.gpu import sort as sorting
from ops.gpu.backend import GpuBackend
from ops.gpu.tiles import Tile
from support.kernel_configurations import RULES as RELEASED_RULES

__all__ = ["poisoned", "seeded"]  # fixtures, for every test here

TOKENS = [0, 1, 3, 17, 70]

# Router

TEST_RULE = Routing(6, "sigmoid", "noaux_tc", 8, 3, True, 2.5)  # the shape that catches wrong group scores and masks
LITE = Routing(6, "softmax", "greedy", 1, 1, False, 1.0)
RULES = {
    "test": (32, TEST_RULE),
    "V2-Lite": (64, LITE),
    "greedy with groups": (64, replace(LITE, n_groups=8, n_limited_groups=2)),
    "six groups": (60, replace(TEST_RULE, n_groups=6, topk_method="group_limited_greedy")),
} | RELEASED_RULES


def gate_bias(n_experts: int, rule: Routing) -> torch.Tensor | None:
    return torch.randn(n_experts) * 0.5 - 1 if rule.topk_method == "noaux_tc" else None


def launch_router(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, rule: Routing, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = router.router(guarded(x), guarded(w), None if bias is None else guarded(bias), rule, **options)
    return weights.cpu(), ids.cpu()


def chosen(scores: torch.Tensor, bias: torch.Tensor | None, rule: Routing) -> list[list[int]]:
    """The choice spelled out one token at a time, in float32; of equals the lowest number is taken."""

    def order(values: list[float]) -> list[int]:
        return sorted(range(len(values)), key=lambda i: (-values[i], i))

    found = []
    for row in scores if bias is None else scores + bias:
        values = row.tolist()
        size = len(values) // rule.n_groups
        if rule.topk_method != "greedy":
            members = [sorted(values[g * size : (g + 1) * size], reverse=True) for g in range(rule.n_groups)]
            best = 2 if rule.topk_method == "noaux_tc" else 1
            worth = [torch.tensor(m[:best]).sum().item() for m in members]
            kept = order(worth)[: rule.n_limited_groups]
            values = [v if i // size in kept else -math.inf for i, v in enumerate(values)]
        found.append(order(values)[: rule.top_k])
    return found


@pytest.mark.parametrize(
    "name, tokens", [(name, 5) for name in RULES] + [pytest.param(name, 70, marks=pytest.mark.trust) for name in RULES]
)
def test_router(name: str, tokens: int) -> None:
    """Two and a half blocks of channels; the logits are checked in float64."""
    n_experts, rule = RULES[name]
    x, w, bias = torch.randn(tokens, 320).bfloat16(), torch.randn(n_experts, 320).bfloat16() / 8, None
    bias = gate_bias(n_experts, rule)
    weights, ids = launch_router(x, w, bias, rule)
    expected, expected_ids = reference.route((x.double() @ w.double().T).float(), bias, rule)
    assert ids.dtype == torch.int64 and torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)
    for ours, exact in zip(reference.router(x, w, bias, rule), (expected, expected_ids), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=0)


def brief(tables: dict[str, tuple[Any, ...]]) -> list[Any]:
    """Every tile of the tables; those that are not in Hopper's wait for `make trust`. On a GPU only its own."""
    archs = tables if INTERPRETED else [device.architecture(torch.device(DEVICE))]
    found = dict.fromkeys(tile for arch in archs for tile in tables.get(arch, ()))
    known = set(tables.get("sm_90", ()))
    return [pytest.param(t, id=str(t), marks=() if t in known or not INTERPRETED else pytest.mark.trust) for t in found]


@pytest.mark.parametrize("tile", brief(router.ROUTER))
def test_every_router_tile(tile: router.RouterTile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two row tiles, and experts' tiles, the last of each ragged; channels in as many parts as there can be."""
    row = replace(tile, max_rows=math.inf)
    monkeypatch.setitem(router.ROUTER, device.architecture(torch.device(DEVICE)), (row,))
    n_experts, rule = 144, replace(TEST_RULE, n_groups=9)
    x, w = torch.randn(tile.block_t + 3, 600).bfloat16(), torch.randn(n_experts, 600).bfloat16() / 8
    bias = gate_bias(n_experts, rule)
    weights, ids = launch_router(x, w, bias, rule)
    expected, expected_ids = reference.route((x.double() @ w.double().T).float(), bias, rule)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["V3", "K2", "V2"])
def test_router_of_near_ties(name: str) -> None:
    """float32 logits 1e-5 apart, which one-hot tokens pick out of the weights without rounding."""
    n_experts, rule = RULES[name]
    tokens = 5
    logits = 0.5 + 1e-5 * torch.stack([torch.randperm(n_experts) for _ in range(tokens)])
    bias = torch.full((n_experts,), -0.75) if rule.score_func == "sigmoid" else None
    _, ids = launch_router(torch.eye(tokens), logits.T.contiguous(), bias, rule)
    scores = logits.double().sigmoid() if rule.score_func == "sigmoid" else logits.double().softmax(dim=-1)
    assert ids.tolist() == chosen(scores, None if bias is None else bias.double(), rule)
    assert torch.equal(ids, reference.route(logits, bias, rule)[1])


@pytest.mark.parametrize("name", ["test", "K2", "six groups", "V2-Lite"])
def test_router_takes_the_first_of_equals(name: str) -> None:
    """Few different values: groups and experts tie everywhere, at negative biased scores too."""
    n_experts, rule = RULES[name]
    logits = torch.randint(0, 3, (20, n_experts)).float()
    logits[0] = 1
    bias = torch.randint(-2, 0, (n_experts,)).float() if rule.topk_method == "noaux_tc" else None
    x = torch.eye(20)
    _, ids = launch_router(x, logits.T.contiguous(), bias, rule)
    # One number for each level of the logits stands for its score: sums of two are as exact as the kernel's.
    scores = logits.sigmoid() if rule.score_func == "sigmoid" else logits
    assert ids.tolist() == chosen(scores, bias, rule)


def test_router_of_nan_stays_in_its_token() -> None:
    x, w, bias = torch.randn(6, 128).bfloat16(), torch.randn(32, 128).bfloat16() / 8, torch.randn(32)
    plain, plain_ids = launch_router(x, w, bias, TEST_RULE)
    x[2, 5] = math.nan
    weights, ids = launch_router(x, w, bias, TEST_RULE)
    others = torch.tensor([0, 1, 3, 4, 5])
    assert same(weights[others], plain[others]) and torch.equal(ids[others], plain_ids[others])
    assert weights[2].isnan().all() and len({*ids[2].tolist()}) == 6 and ids[2].min() >= 0 and ids[2].max() < 32


def test_router_is_independent_of_batch_composition() -> None:
    x, w, bias = torch.randn(20, 320).bfloat16(), torch.randn(32, 320).bfloat16() / 8, torch.randn(32)
    weights, ids = launch_router(x, w, bias, TEST_RULE, invariant=True)
    for rows in (torch.tensor([13]), torch.randperm(20)):
        again, again_ids = launch_router(x[rows], w, bias, TEST_RULE, invariant=True)
        assert same(again, weights[rows]) and torch.equal(again_ids, ids[rows])


def test_the_router_leaves_its_counters_at_zero() -> None:
    """Given counters serve one launch after another; where there are too few, others are made."""
    counters = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    x, w, bias = torch.randn(40, 320).bfloat16(), torch.randn(32, 320).bfloat16() / 8, torch.randn(32)
    expected = launch_router(x, w, bias, TEST_RULE)
    for tokens in (20, 3, 40, 20):
        found = launch_router(x[:tokens], w, bias, TEST_RULE, counters=counters)
        assert torch.equal(found[1], expected[1][:tokens]) and not counters.any()
    assert len(counters) == 2


def test_router_of_no_tokens() -> None:
    weights, ids = router.router(torch.zeros(0, 128), torch.zeros(32, 128), None, LITE)
    assert weights.shape == ids.shape == (0, 6)


# Sort


def routed(tokens: int, top_k: int, n_experts: int, kind: str = "uniform") -> torch.Tensor:
    """ids (T, K), distinct in each row. "skewed": half of the experts get none, and one gets every token."""
    scores = torch.rand(tokens, n_experts)
    if kind == "skewed":
        scores[:, ::2] -= 1
        scores[:, n_experts // 2 + 1] += 2
    return scores.topk(top_k, dim=-1).indices


@pytest.mark.parametrize("kind, block_m", [("uniform", 16), ("skewed", 16), ("skewed", 64)])
@pytest.mark.parametrize("first, n_local", [(0, 20), (5, 7), (12, 8)])
def test_sort(first: int, n_local: int, kind: str, block_m: int) -> None:
    for tokens in TOKENS:
        ids = routed(tokens, 6, 20, kind)
        order, row_tiles = (t.cpu() for t in sorting.sort(guarded(ids), first, n_local, block_m))
        expected_order, expected_tiles = reference.sort(ids, first, n_local, block_m)
        used, here = expected_tiles[:, 0] >= 0, expected_order >= 0
        assert order.shape == expected_order.shape and torch.equal(order[here], expected_order[here])
        assert torch.equal(row_tiles[:, 0], expected_tiles[:, 0]) and torch.equal(row_tiles[used], expected_tiles[used])
        assert here.sum() == ((ids >= first) & (ids < first + n_local)).sum()


@pytest.mark.parametrize("n", [sorting.CHUNKS[0] + 1, sorting.ONE_CHUNK, sorting.ONE_CHUNK + 300])
@pytest.mark.parametrize("first, n_local, n_experts", [(1, 3, 5), (0, 40, 40)])
def test_sort_of_many(n: int, first: int, n_local: int, n_experts: int) -> None:
    """In one launch and in two: with chunks whose last is ragged, and more tiles than a program writes at a time."""
    ids = torch.randint(0, n_experts, (n, 1), dtype=torch.int32)
    ids[ids == first + 1] = first
    order, row_tiles = sorting.sort(guarded(ids), first, n_local, 16)
    expected_order, expected_tiles = reference.sort(ids, first, n_local, 16)
    here, used = expected_order >= 0, expected_tiles[:, 0] >= 0
    assert torch.equal(order.cpu()[here], expected_order[here]) and torch.equal(row_tiles.cpu()[used], expected_tiles[used])
    assert torch.equal(row_tiles.cpu()[:, 0], expected_tiles[:, 0])


def test_there_are_always_tiles_enough() -> None:
    """The worst there is: one assignment for each expert but one, which takes all the others."""
    for n_local, n, block_m in ((7, 40, 16), (7, 22, 16), (7, 7, 16), (7, 3, 16), (1, 33, 16)):
        spread = min(n, n_local)
        counts = [n - spread + 1, *[1] * (spread - 1)]
        needed = sum(-(-count // block_m) for count in counts)
        assert needed <= sorting.max_tiles(n, n_local, block_m)


# Grouped GEMM

needs_fp8 = pytest.mark.skipif(
    not INTERPRETED and not device.has_fp8(torch.device(DEVICE)), reason="this GPU has no FP8 tensor cores"
)
UNPACKED = [pytest.param("w8a8", marks=needs_fp8), "w8a16", "bf16", "float32"]  # which the reference takes as they are
KINDS = [*UNPACKED, "w4a16"]
TABLES = {"w8a8": tiles.GROUPED_W8A8, "w8a16": tiles.GROUPED_W8A16, "bf16": tiles.GROUPED_PLAIN}
TABLES |= {"w4a16": tiles.GROUPED_W4A16}
TABLES |= {"float32": {arch: tiles.GROUPED_FLOAT32 for arch in tiles.GROUPED_PLAIN}}
LIMITS = {"w8a8": PRECISE} | dict.fromkeys(("w8a16", "w4a16", "bf16", "float32"), PRECISE_BF16)


def stacked(kind: str, *shape: int) -> tuple[Weight, torch.Tensor]:
    """Experts' weights (E, N, K) of a kind, and their exact values in float64."""
    if kind in ("bf16", "float32"):
        w = (torch.randn(shape) / math.sqrt(shape[-1])).to(torch.bfloat16 if kind == "bf16" else torch.float32)
        return Weight(guarded(w)), w.double()
    if kind == "w4a16":
        packed = random_weight(FORMS["int4 groups of 32, zero points"], *shape)
        meant, (data, s, zero) = exact_values(packed), (guarded(t) for t in (packed.data, packed.scale, packed.zero))
        return GpuBackend().pack_weight(packed._replace(data=data, scale=s, zero=zero)), meant
    w, s = quantised_weights(*shape)
    s /= 16 * math.sqrt(shape[-1])
    exact = w.double() * torch.stack([wide(s[e], w[e].shape, BLOCK_SIZE) for e in range(shape[0])])
    return Weight(guarded(w), guarded(s), "fp8" if kind == "w8a8" else "bf16"), exact


def inputs(kind: str, rows: int, k: int) -> tuple[torch.Tensor | Quantised, torch.Tensor]:
    if kind == "w8a8":
        q, s = quantised_activations(rows, k)
        return Quantised(guarded(q), guarded(s), dtype=torch.float32), q.double() * wide(s, q.shape, 1)
    x = torch.randn(rows, k).to(torch.float32 if kind == "float32" else torch.bfloat16)
    return guarded(x), x.double()


EVERY_TILE = [
    pytest.param(kind, *p.values, id=f"{kind} {p.id}", marks=[*p.marks, *([needs_fp8] if kind == "w8a8" else [])])
    for kind, tables in TABLES.items()
    for p in brief(tables)
    if not p.values[0].persistent
]


@pytest.mark.parametrize("kind, tile", EVERY_TILE)
def test_every_grouped_tile(kind: str, tile: Tile) -> None:
    """Gate and up's product of shared rows and down's of rows of their own: an expert with more than a tile, one with
    none, experts of other ranks; half blocks of channels and a ragged last column tile."""
    check_grouped(kind, tile)


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_gemm_in_parts(kind: str, split: int) -> None:
    """Two and a half blocks of channels, so that the last part is a short one, or has nothing."""
    [row, *_] = TABLES[kind][device.architecture(torch.device(DEVICE))]
    check_grouped(kind, replace(row, split=split))


@needs_fp8
@pytest.mark.parametrize("tile", brief({arch: [t for t in table if t.persistent] for arch, table in tiles.GROUPED_W8A8.items()}))
def test_rows_in_the_order_of_experts(tile: Tile) -> None:
    """Of experts 1 to 3: one with more than a tile, one with half a tile, one with none, and rows that are elsewhere."""
    tokens, top_k, first, n_local, n, k = tile.block_m + 5, 2, 1, 3, tile.block_n + 28, 320
    ids = torch.randint(2, 6, (tokens, top_k))
    ids[:, 0], ids[ids == 3] = 1, 5
    order, row_tiles = sorting.sort(guarded(ids), first, n_local, tile.block_m)
    w, exact = stacked("w8a8", n_local, n, k)
    x, exact_x = inputs("w8a8", tokens, k)
    here = ((ids >= first) & (ids < first + n_local)).flatten()
    layout = reference.sort(ids, first, n_local, tile.block_m)
    expected = reference.grouped_gemm(exact_x, *layout, top_k, lambda e, rows: rows @ exact[e].T)
    size = reference.grouped_gemm(exact_x.abs(), *layout, top_k, lambda e, rows: rows @ exact[e].abs().T)
    ordered = ordered_gemm.gather_rows(x, order, row_tiles, top_k, tile.block_m)
    n_here = int(here.sum())
    by_place = layout[0][:n_here].long()
    assert same(ordered.q[:n_here], x.q.cpu()[by_place // top_k]) and same(ordered.s[:n_here], x.s.cpu()[by_place // top_k])
    assert ordered_gemm.can_order(ordered, w, tile)
    scattered = ordered_gemm.grouped_gemm_in_order(ordered, w, row_tiles, tile, order).cpu()
    assert scattered[~here].isnan().all()
    assert ((scattered[here].double() - expected[here]).abs() <= PRECISE * size[here]).all()
    kept = ordered_gemm.grouped_gemm_in_order(ordered, w, row_tiles, tile).cpu()
    assert same(kept[:n_here], scattered[by_place]) and kept[n_here:].isnan().all()


@needs_fp8
@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("tokens, top_k, n_local, split", [(1, 6, 20, 1), (1, 8, 256, 4), (7, 6, 7, 2), (10, 6, 3, 1), (64, 1, 2, 1), (33, 6, 10, 1)])
def test_grouped_gemm_in_place(tokens: int, top_k: int, n_local: int, split: int, with_shared: bool) -> None:
    """Both products as sorted beforehand, to the bit; and a shared expert's are those of an expert which every token
    has."""
    first, n, k = 2, 92, 320
    tile = replace(tiles.GROUPED_W8A8[device.architecture(torch.device(DEVICE))][0], split=split)
    ids = routed(tokens, top_k, max(n_local + 5, 20), "skewed" if tokens > 16 else "uniform").flip(1) if top_k > 1 else torch.randint(0, 5, (tokens, 1))
    stack, _ = stacked("w8a8", n_local + 1, n, k)
    w, shared = (stack._replace(data=stack.data[a:b].clone(), scale=stack.scale[a:b].clone()) for a, b in ((0, -1), (-1, None)))
    own = shared.expert(0) if with_shared else None
    order, row_tiles = sorting.sort(guarded(ids), first, n_local, tile.block_m)
    everybody = sorting.sort(guarded(torch.zeros(tokens, 1, dtype=torch.int64)), 0, 1, tile.block_m)
    here = ((ids >= first) & (ids < first + n_local)).flatten()
    ids = guarded(ids)
    found = None
    for share in (top_k, 1):
        x, _ = inputs("w8a8", tokens if share > 1 or found is None else tokens * (top_k + with_shared), k)
        if found is None:
            y, found = grouped_gemm.grouped_gemm_in_place(x, w, own, ids, first, tile)
            routed_x, shared_x = x, x
        else:
            y = grouped_gemm.grouped_gemm_of_found(x, w, own, found, ids, tile)
            routed_x, shared_x = (x.take(part) for part in (slice(0, tokens * top_k), slice(tokens * top_k, None)))
        expected = grouped_gemm.grouped_gemm(routed_x, w, order, row_tiles, share, tile)
        assert isinstance(y, PartialSums) == isinstance(expected, PartialSums) == (split > 1)
        y, expected = (reference.summed(one).cpu() for one in (y, expected))
        assert len(y) == tokens * (top_k + with_shared)
        assert same(y[: len(expected)][here], expected[here]) and y[: len(expected)][~here].isnan().all()
        if with_shared:
            alone = reference.summed(grouped_gemm.grouped_gemm(shared_x, shared, *everybody, 1, tile))
            assert same(y[len(expected) :], alone)


def check_grouped(kind: str, tile: Tile) -> None:
    tokens, top_k, first, n_local, n, k = tile.block_m + 5, 2, 1, 3, tile.block_n + 28, 320
    ids = torch.randint(3, 6, (tokens, top_k))
    ids[:, 0] = 1
    order, row_tiles = sorting.sort(guarded(ids), first, n_local, tile.block_m)
    w, exact = stacked(kind, n_local, n, k)
    for share in (top_k, 1):
        x, exact_x = inputs(kind, tokens * top_k // share, k)
        y = grouped_gemm.grouped_gemm(x, w, order, row_tiles, share, tile)
        if isinstance(y, PartialSums):
            assert len(y.parts) == tile.split and y.parts.dtype == torch.float32
            y = y.parts.sum(0)
        y = y.cpu()
        layout = reference.sort(ids, first, n_local, tile.block_m)
        expected = reference.grouped_gemm(exact_x, *layout, share, lambda e, rows: rows @ exact[e].T)
        size = reference.grouped_gemm(exact_x.abs(), *layout, share, lambda e, rows: rows @ exact[e].abs().T)
        here = ((ids >= first) & (ids < first + n_local)).flatten()
        assert y.shape == expected.shape and y[~here].isnan().all()
        wide_out = y.dtype == torch.float32
        bound = LIMITS[kind] * size[here] + (0 if wide_out else expected[here].abs() / 256)
        assert ((y[here].double() - expected[here]).abs() <= bound).all()


def test_few_rows_are_cut_in_as_many_parts_as_occupy_the_gpu() -> None:
    """Gate and up of V3, split over eight and sixteen ranks, of whole experts, and where there is nothing to gain."""

    def parts(tokens: int, n: int, n_local: int = 256, k: int = 7168, arch: str = "sm_90") -> int:
        table = tiles.GROUPED_W8A8[arch]
        return tiles.split_for_few_rows(table[0], tokens * 8 * n_local / 256, n_local, n, k, arch).split

    assert [parts(tokens, 512) for tokens in (1, 2, 4, 64)] == [2, 1, 1, 1]  # 64 programs and 128
    assert [parts(tokens, 256) for tokens in (1, 2, 4, 64)] == [4, 2, 1, 1]
    assert [parts(tokens, 4096, 32) for tokens in (1, 2, 16)] == [2, 1, 1]  # one expert here, two, sixteen
    assert parts(1, 512, k=512) == 1 and parts(1, 512, arch="gfx942") == 2


@pytest.mark.parametrize("n_local, tokens", [(12, 24), (3, 24)])
def test_a_tile_is_as_high_as_the_rows_of_an_expert(
    n_local: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six rows to each, whichever part of the experts is here."""
    heights = []
    sort = sorting.sort
    monkeypatch.setattr(moe, "sort", lambda *args: heights.append(args[-1]) or sort(*args))
    x, ids = token_rows("bf16", tokens).to(DEVICE), routed(tokens, TOP_K, N_EXPERTS).to(DEVICE)
    rest = torch.rand(tokens, TOP_K, device=DEVICE), ids, 0, *layer("bf16", n_local), INTER
    moe.experts(x, *rest, n_experts=N_EXPERTS)
    table = tiles.GROUPED_PLAIN[device.architecture(torch.device(DEVICE))]
    assert heights == [tiles.tile_for(table, tokens * TOP_K / N_EXPERTS).block_m]


def test_grouped_gemm_refuses_mistaken_shapes() -> None:
    tile = tiles.GROUPED_FLOAT32[0]
    order, row_tiles = sorting.sort(guarded(torch.zeros(4, 1, dtype=torch.int64)), 0, 2, 16)
    w, _ = stacked("float32", 2, 32, 64)
    for x, share in ((torch.zeros(4, 60), 1), (torch.zeros(3, 64), 1), (torch.zeros(4, 64), 2)):
        with pytest.raises(AssertionError):
            grouped_gemm.grouped_gemm(x.to(DEVICE), w, order, row_tiles, share, tile)
    with pytest.raises(AssertionError):
        grouped_gemm.grouped_gemm(torch.zeros(4, 64, device=DEVICE).bfloat16(), w, order, row_tiles, 1, tile)


# Combine


@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("first, n_local", [(0, 10), (3, 4)])
def test_combine(first: int, n_local: int, with_shared: bool) -> None:
    """More columns than a program takes. Rows and weights of experts that are not here are NaN and change nothing."""
    for tokens in (0, 1, 17):
        h = moe.COMBINE_COLUMNS + 100
        ids, weights = routed(tokens, 3, 10), torch.rand(tokens, 3)
        y = torch.randn(tokens * 3, h).bfloat16()
        elsewhere = (ids < first) | (ids >= first + n_local)
        y[elsewhere.flatten()], weights[elsewhere] = math.nan, math.nan
        shared = torch.randn(tokens, h).bfloat16() if with_shared else None
        expected = reference.combine(y, weights, ids, first, n_local, shared)
        found = moe.combine(
            guarded(y), guarded(weights), guarded(ids), first, n_local, None if shared is None else guarded(shared)
        )
        assert found.dtype == torch.bfloat16 and not expected.isnan().any()
        exact = (y.double() * weights.double().reshape(-1, 1)).unflatten(0, ids.shape)
        exact = exact.masked_fill(elsewhere.unsqueeze(-1), 0).sum(dim=1) + (0 if shared is None else shared.double())
        for result in (found.cpu(), expected):
            torch.testing.assert_close(result.double(), exact, rtol=1 / 256, atol=1e-6)
        found = moe.combine(guarded(y.float()), guarded(weights), guarded(ids), first, n_local, None)
        expected = reference.combine(y.float(), weights, ids, first, n_local, None)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


# The layer

H, INTER, N_EXPERTS, TOP_K = 192, 96, 12, 3  # one and a half blocks of channels, and three quarters


def layer(kind: str, n_local: int = N_EXPERTS) -> tuple[Weight, Weight]:
    """w13 and w2; the rows between gate and up are there when it keeps FP8, and hold zeros."""
    width = -(-INTER // BLOCK_SIZE) * BLOCK_SIZE if kind in ("w8a8", "w8a16") else INTER
    w13, _ = stacked(kind, n_local, 2 * width, H)
    w2, _ = stacked(kind, n_local, H, INTER)
    for half in (0, width):
        w13.data.view(torch.uint8)[:, half + INTER : half + width] = 0
    return w13, w2


def compare(found: torch.Tensor, expected: torch.Tensor, kind: str) -> None:
    """By relative norm: two roundings in bfloat16, or to FP8, may fall to either side."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    distance = (found.cpu().double() - expected.cpu().double()).norm() / expected.cpu().double().norm().clamp(min=1e-30)
    assert distance < (1e-5 if kind == "float32" else 5e-3), distance


def token_rows(kind: str, tokens: int) -> torch.Tensor:
    return torch.randn(tokens, H).to(torch.float32 if kind == "float32" else torch.bfloat16)


@pytest.mark.parametrize("kind", UNPACKED)
@pytest.mark.parametrize("first, n_local", [(0, N_EXPERTS), (5, 4)])
def test_experts(kind: str, first: int, n_local: int) -> None:
    w13, w2 = layer(kind, n_local)
    for tokens in TOKENS if kind == "w8a8" and first == 0 else (0, 17):
        x, weights = token_rows(kind, tokens).to(DEVICE), torch.rand(tokens, TOP_K, device=DEVICE)
        ids = routed(tokens, TOP_K, N_EXPERTS, "skewed" if tokens == 70 else "uniform").to(DEVICE)
        shared = token_rows(kind, tokens).to(DEVICE)
        arguments = x, weights, ids, first, w13, w2, INTER, partial(torch.clone, shared) if tokens != 3 else None
        expected = ReferenceBackend().experts(*arguments)
        compare(moe.experts(*arguments), expected, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up's partial sums go through silu_mul, quantised or not; another order of adding up is all it changes."""
    w13, w2 = layer(kind)
    x, weights = token_rows(kind, 1).to(DEVICE), torch.rand(1, TOP_K, device=DEVICE)
    arguments = x, weights, routed(1, TOP_K, N_EXPERTS).to(DEVICE), 0, w13, w2, INTER
    shapes = []
    silu_mul = moe.fused.silu_mul
    monkeypatch.setattr(
        moe.fused, "silu_mul", lambda y, *a, **how: shapes.append(type(y)) or silu_mul(y, *a, **how)
    )
    whole = moe.experts(*arguments)
    monkeypatch.setattr(tiles, "split_for", lambda *_: 2)
    compare(moe.experts(*arguments), whole, kind)
    moe.experts(*arguments, invariant=True)
    assert shapes == [torch.Tensor, PartialSums, torch.Tensor]


@needs_fp8
def test_shared_experts_that_are_like_the_others_are_computed_with_them() -> None:
    """With few assignments; with more, or of another shape, or batch-invariant, they are computed apart."""
    w13, w2 = layer("w8a8")
    own = tuple(w.expert(0)._replace(data=w.data[0].clone()) for w in layer("w8a8"))
    other = own[0]._replace(data=own[0].data[:, :128].contiguous(), scale=own[0].scale[:, :1].contiguous()), own[1]
    ops, calls = ReferenceBackend(), []

    def shared(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return ops.linear(ops.silu_mul(ops.linear(x, own[0]), INTER, own[1].fp8), own[1])

    ways = [(own, {}, 0), (other, {}, 1), (None, {}, 1), (own, {"invariant": True}, 1)]
    for tokens in (1, 22, 86):
        x, weights = token_rows("w8a8", tokens).to(DEVICE), torch.rand(tokens, TOP_K, device=DEVICE)
        arguments = x, weights, routed(tokens, TOP_K, N_EXPERTS).to(DEVICE), 0, w13, w2, INTER, partial(shared, x)
        expected = ops.experts(*arguments)
        for given, how, n_calls in ways if tokens == 1 else ways[:1]:
            calls.clear()
            compare(moe.experts(*arguments, shared_weights=given, **how), expected, "w8a8")
            assert len(calls) == (n_calls if tokens < 86 else 1)


@needs_fp8
def test_many_rows_are_put_in_the_order_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where rows do not begin at multiples of 16 bytes, the plain kernel takes over."""
    arch = device.architecture(torch.device(DEVICE))
    table = tiles.GROUPED_W8A8[arch]
    if not table[-1].persistent:
        pytest.skip("this GPU has no tensor memory accelerator")
    monkeypatch.setitem(tiles.GROUPED_W8A8, arch, (replace(table[-2], max_rows=1), table[-1]))
    called = []
    for name in ("grouped_gemm", "grouped_gemm_in_order"):
        plain = getattr(moe, name)
        monkeypatch.setattr(moe, name, lambda *a, plain=plain, name=name: called.append(name) or plain(*a))
    w13, w2 = layer("w8a8")
    x, weights = token_rows("w8a8", 70).to(DEVICE), torch.rand(70, TOP_K, device=DEVICE)
    here = (w._replace(data=w.data[2:9], scale=w.scale[2:9]) for w in (w13, w2))
    arguments = x, weights, routed(70, TOP_K, N_EXPERTS, "skewed").to(DEVICE), 2, *here, INTER
    compare(moe.experts(*arguments), ReferenceBackend().experts(*arguments), "w8a8")
    assert called == ["grouped_gemm_in_order"] * 2
    shifted = torch.zeros(w13.data.numel() + 8, dtype=torch.uint8, device=DEVICE)[8:].view(w13.data.shape)
    shifted.copy_(w13.data.view(torch.uint8))
    moved = w13._replace(data=shifted.view(w13.data.dtype))
    arguments = x, weights, routed(70, TOP_K, N_EXPERTS).to(DEVICE), 0
    compare(moe.experts(*arguments, moved, w2, INTER), moe.experts(*arguments, w13, w2, INTER), "w8a8")
    assert called[2:] == ["grouped_gemm"] * 2 + ["grouped_gemm_in_order"] * 2


@needs_fp8
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_experts_take_quantised_tokens(scale_fmt: str | None) -> None:
    w13, w2 = (w._replace(scale_fmt=scale_fmt) for w in layer("w8a8"))
    x, weights = token_rows("w8a8", 2).to(DEVICE), torch.rand(2, TOP_K, device=DEVICE)
    ids = routed(2, TOP_K, N_EXPERTS).to(DEVICE)
    rest = weights, ids, 0, w13, w2, INTER
    q, s = quantisation.act_quant(x, scale_fmt=scale_fmt)
    found = moe.experts(x, *rest)
    assert same(moe.experts(Quantised(q, s, dtype=x.dtype), *rest), found)
    compare(found, ReferenceBackend().experts(Quantised(q, s, x), *rest), "w8a8")
    plain = layer("bf16")
    assert same(
        moe.experts(Quantised(q, s, x), weights, ids, 0, *plain, INTER),
        moe.experts(x, weights, ids, 0, *plain, INTER),
    )


@needs_fp8
def test_scale_format_reaches_both_products() -> None:
    """With scales that are powers of two the result is another one than without."""
    w13, w2 = layer("w8a8")
    x, weights, ids = token_rows("w8a8", 2).to(DEVICE), torch.rand(2, TOP_K, device=DEVICE), routed(2, TOP_K, N_EXPERTS)
    outs = [
        moe.experts(x, weights, ids.to(DEVICE), 0, w13._replace(scale_fmt=a), w2._replace(scale_fmt=b), INTER)
        for a in (None, "ue8m0")
        for b in (None, "ue8m0")
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_independent_of_batch_composition(kind: str, own_sums: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tile fixed, a token's bits are its own: alone, in another order, or among others. (The interpreter adds
    up alike in every tile, so that the tile itself is looked at too.)"""
    heights = []
    sort = sorting.sort
    monkeypatch.setattr(moe, "sort", lambda *args: heights.append(args[-1]) or sort(*args))
    w13, w2 = layer(kind, 3)
    x, weights, ids = token_rows(kind, 20), torch.rand(20, 2), routed(20, 2, 3)

    def run(rows: torch.Tensor) -> torch.Tensor:
        parts = (guarded(t[rows]) for t in (x, weights, ids))
        return moe.experts(*parts, 0, w13, w2, INTER, invariant=True).cpu()

    together = run(torch.arange(20))
    for rows in (torch.tensor([13]), torch.randperm(20)):
        assert same(run(rows), together[rows])
    assert len(set(heights)) == (kind != "w8a8")  # which finds its rows in place, by the same tile


def test_the_reference_s_experts() -> None:
    """The loop over experts, against the sum spelled out."""
    w13, w2 = layer("float32")
    x, weights, ids = token_rows("float32", 9), torch.rand(9, TOP_K), routed(9, TOP_K, N_EXPERTS)
    shared = torch.randn(9, H)
    w13, w2 = (w._replace(data=w.data.cpu()) for w in (w13, w2))
    expected = shared.double()
    for t in range(9):
        for weight, e in zip(weights[t].double(), ids[t].tolist(), strict=True):
            if 5 <= e < 9:
                gate, up = (w13.data[e - 5].double() @ x[t].double()).chunk(2)
                expected[t] += weight * (w2.data[e - 5].double() @ (torch.nn.functional.silu(gate) * up))
    experts = ReferenceBackend().experts
    compare(experts(x, weights, ids, 5, *(w._replace(data=w.data[:4]) for w in (w13, w2)), INTER, lambda: shared),
            expected.float(), "float32")  # fmt: skip


def test_shared_experts_run_between_fork_and_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stream waits for the first before it starts, the first for the second before the result is read."""
    said: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name, self.device = name, None

        def wait_stream(self, other: "Stream") -> None:
            said.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream: Stream) -> Any:
        said.append(f"on {stream.name}")
        yield
        said.append("back")

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(moe, "side_stream", lambda of: Stream())
    join = moe.run_on_side_stream(lambda: said.append("work") or torch.ones(1), torch.device("cuda"))
    said.append("routed")
    assert join() == 1
    assert said == ["side waits for main", "on side", "work", "back", "routed", "main waits for side"]


# The tables


def test_tables_serve_every_size() -> None:
    for table in (t for tables in (*TABLES.values(), router.ROUTER) for t in tables.values()):
        bounds = [tile.max_rows for tile in table]
        assert bounds == sorted(set(bounds)) and bounds[-1] == math.inf
    for tables in (tiles.GROUPED_W8A8, tiles.GROUPED_W8A16, tiles.GROUPED_W4A16):
        assert all(BLOCK_SIZE % tile.block_n == 0 for table in tables.values() for tile in table)  # one scale to a tile
    assert tiles.GROUPED_W8A8.keys() < tiles.GROUPED_W8A16.keys() == tiles.GROUPED_W4A16.keys()
    assert tiles.GROUPED_W8A16.keys() == tiles.GROUPED_PLAIN.keys() == router.ROUTER.keys()


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter takes the rows of sm_90")
def test_launches_ask_for_listed_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = GpuBackend()
    with (
        only_listed_launches(moe, monkeypatch), only_listed_launches(router, monkeypatch),
        only_listed_launches(sorting, monkeypatch), only_listed_launches(grouped_gemm, monkeypatch),
        only_listed_launches(ordered_gemm, monkeypatch),
    ):  # fmt: skip
        for n_experts, rule in RELEASED_RULES.values():
            for tokens in (1, 4, 5, 64, 65, 512, 513, None):
                dtype = torch.bfloat16 if tokens else torch.float32
                x, w = torch.zeros(tokens or 1, 7168, dtype=dtype), torch.zeros(n_experts, 7168, dtype=dtype)
                router.router(x, w, gate_bias(n_experts, rule) if rule.score_func == "sigmoid" else None, rule)
        for tokens in (64, 128):
            sorting.sort(torch.zeros(tokens, 8, dtype=torch.int64), 0, 256, 16)
        for tokens, k, share in ((1, 7168, 8), (600, 7168, 8), (2000, 7168, 8), (4000, 7168, 8), (1, 256, 1), (600, 256, 1),
                                 (2000, 256, 1), (4000, 256, 1)):  # fmt: skip
            ids = torch.zeros(tokens, 8, dtype=torch.int64)
            rows = tokens * 8 // share
            for w in (
                Weight(torch.zeros(256, 1, k, dtype=E4M3), torch.zeros(256, 1, k // BLOCK_SIZE), "fp8"),
                Weight(torch.zeros(256, 1, k, dtype=E4M3), torch.zeros(256, 1, k // BLOCK_SIZE)),
                Weight(torch.zeros(256, 1, k, dtype=torch.bfloat16)),
                Weight(torch.zeros(256, 1, k)),
                *(ops.pack_weight(random_weight(form, 256, 1, k)) for form in FORMS.values() if form.block[0] == 1),
            ):
                tile = tiles.tile_for(moe.grouped_tiles(w, ids.device), ids.numel() // 256)
                order, row_tiles = sorting.sort(ids, 0, 256, tile.block_m)
                x = torch.zeros(rows, k, dtype=torch.float32 if w.data.dtype == torch.float32 else torch.bfloat16)
                if w.fp8:
                    x = Quantised(torch.zeros(rows, k, dtype=E4M3), torch.zeros(rows, k // BLOCK_SIZE))
                if tile.persistent:
                    assert isinstance(x, Quantised)
                    in_order = ordered_gemm.gather_rows(x, order, row_tiles, share, tile.block_m) if share > 1 else x
                    ordered_gemm.grouped_gemm_in_order(in_order, w, row_tiles, tile, order if share == 1 else None)
                    continue
                grouped_gemm.grouped_gemm(x, w, order, row_tiles, share, tile)
                if tokens == 1 and share == 8:
                    grouped_gemm.grouped_gemm(x, w, order, row_tiles, share, replace(tile, split=8))
                if tokens == 1 and w.fp8:
                    for n in (1, 32):
                        some = torch.zeros(n, 8, dtype=torch.int64)
                        x = (torch.zeros(n if share == 8 else 9 * n, size) for size in (k, k // BLOCK_SIZE))
                        q, s = x
                        x = Quantised(q.to(E4M3), s)
                        if share == 8:
                            for one in (tile, replace(tile, split=8)):
                                _, found = grouped_gemm.grouped_gemm_in_place(x, w, w.expert(0), some, 0, one)
                        else:
                            grouped_gemm.grouped_gemm_of_found(x, w, w.expert(0), found, some, tile)
            moe.combine(torch.zeros(tokens * 8, 1).bfloat16(), torch.zeros(tokens, 8), ids, 0, 256, torch.zeros(tokens, 1))

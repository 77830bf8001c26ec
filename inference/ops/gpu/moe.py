"""A mixture-of-experts layer in Triton, as reference.py specifies it: router, sort, the two grouped GEMMs, combine.

Every shape depends on the number of tokens alone and nothing is read back to the host, so that a CUDA graph can hold
the layer. What is different from token to token, which expert gets how many rows, stands in device memory as a table
of row tiles; it is launched as long as it can possibly be, and programs without a tile return at once.

Launches of a layer in W8A8, its input quantised beforehand: the router's counters zeroed 1, `router` 1, `sort` 1,
`grouped_gemm` up 1, fused.silu_mul 1, `grouped_gemm` down 1, `combine` 1, in all 7, whatever the number of
tokens and experts. What the shared experts launch runs beside them on a second stream.

Names: T tokens, K experts a token, E experts, H the model's width. The assignment a = t * K + k is token t's k-th
expert.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.formats import Quantised, Routing, Weight
from ops.gpu import fused
from ops.gpu.casts import SCALE_BLOCK, cast, dot_operand
from ops.gpu.device import architecture, kernel_view
from ops.gpu.gemm import multiply_rows
from ops.gpu.quantisation import act_quant
from ops.gpu.tiles import PROCESSORS, Tile, split_for

LEAST = tl.constexpr(-(2**31))  # below the key of every float


# --------------------------------------------------------------------------------------------------------------------
# Router
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def sortable(x):
    """Integers in the order of the float32 x; both zeros are one, and NaN is the greatest, as for torch.topk."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def take_best(key, index, NONE: tl.constexpr):
    """Each row's greatest key and its index, the lowest of equals, and the keys without it."""
    best = tl.max(key, axis=1)
    at = tl.min(tl.where(key == best[:, None], index[None, :], NONE), axis=1)
    return best, at, tl.where(index[None, :] == at[:, None], LEAST, key)


@triton.jit(do_not_specialize=["T"])
def router_kernel(
    x_ptr, w_ptr, bias_ptr, weights_ptr, ids_ptr, partial_ptr, counter_ptr, T, H, route_scale,
    E: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    SIGMOID: tl.constexpr, TOP2: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK_T tokens by BLOCK_E experts over CHUNK blocks of channels; the last program of a row of tiles to
    arrive adds up its tokens' partial logits, in the order of the channels, and chooses. See reference.route.

    GROUPS > 1: all but the KEPT best groups of experts are left out, a group being worth its best choice, or with TOP2
    the sum of its two best. counter (row tiles,) starts at zero.
    """
    SIZE: tl.constexpr = E // GROUPS
    # Experts lie in columns: a group's in a power of two of them, so that groups are rows of a reshaped tile.
    PADDED_GROUPS: tl.constexpr = triton.next_power_of_2(GROUPS)
    PADDED_SIZE: tl.constexpr = triton.next_power_of_2(SIZE)
    COLUMNS: tl.constexpr = PADDED_GROUPS * PADDED_SIZE
    PADDED_K: tl.constexpr = triton.next_power_of_2(TOP_K)

    pid_t, pid_e, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    e = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    h = split * CHUNK * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)
    x_ptrs = x_ptr + tl.minimum(t, T - 1).to(tl.int64)[:, None] * H + h[None, :]
    w_ptrs = w_ptr + tl.minimum(e, E - 1)[:, None] * H + h[None, :]
    acc = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    for i in tl.range(0, CHUNK, num_stages=STAGES):
        inside = (h + i * SCALE_BLOCK < H)[None, :]
        x, w = tl.load(x_ptrs, mask=inside, other=0.0), tl.load(w_ptrs, mask=inside, other=0.0)
        if w.dtype != tl.float32:
            x, w = dot_operand(x, False), dot_operand(w, False)
        acc = tl.dot(w, x.T, acc, input_precision="ieee")
        x_ptrs += SCALE_BLOCK
        w_ptrs += SCALE_BLOCK
    out_ptrs = partial_ptr + (split * T + t).to(tl.int64)[:, None] * E + e[None, :]
    tl.store(out_ptrs, acc.T, mask=(t < T)[:, None] & (e < E)[None, :])

    tl.debug_barrier()  # all of this program's partial logits are written before it reports them
    n_splits = tl.num_programs(2)
    arrived = tl.atomic_add(counter_ptr + pid_t, 1, sem="acq_rel")
    if arrived == tl.num_programs(1) * n_splits - 1:
        column = tl.arange(0, COLUMNS)
        expert = column // PADDED_SIZE * SIZE + column % PADDED_SIZE
        exists = (column % PADDED_SIZE < SIZE) & (column // PADDED_SIZE < GROUPS)
        group = tl.arange(0, PADDED_GROUPS)
        rank = tl.arange(0, PADDED_K)
        for first in range(0, BLOCK_T, ROWS):
            row = pid_t * BLOCK_T + first + tl.arange(0, ROWS)
            read = (row < T)[:, None] & exists[None, :]
            logits = tl.zeros((ROWS, COLUMNS), tl.float32)
            for s in tl.range(0, n_splits, loop_unroll_factor=4):
                ptrs = partial_ptr + (s * T + row).to(tl.int64)[:, None] * E + expert[None, :]
                logits += tl.load(ptrs, mask=read, other=0.0, cache_modifier=".cg")  # past the first-level cache

            if SIGMOID:
                scores = tl.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1.0 + tl.exp(-logits))
            else:
                peak = tl.max(tl.where(exists[None, :], logits, float("-inf")), axis=1)
                scores = tl.where(exists[None, :], tl.exp(logits - peak[:, None]), 0.0)
                scores = tl.div_rn(scores, tl.broadcast_to(tl.sum(scores, axis=1)[:, None], scores.shape))
            choice = scores
            if bias_ptr is not None:
                choice += tl.load(bias_ptr + expert, mask=exists, other=0.0)[None, :]
            key = tl.where(exists[None, :], sortable(choice), LEAST)

            if GROUPS > 1:
                grouped = tl.reshape(key, (ROWS * PADDED_GROUPS, PADDED_SIZE))
                member = tl.arange(0, PADDED_SIZE)
                worth, _member, rest = take_best(grouped, member, PADDED_SIZE)
                if TOP2:
                    worth = sortable(unsorted(worth) + unsorted(tl.max(rest, axis=1)))
                worth = tl.reshape(worth, (ROWS, PADDED_GROUPS))
                worth = tl.where((group < GROUPS)[None, :], worth, LEAST)
                # A group's place is the number of groups that beat it, as those of lower number do at a tie.
                here, there = worth[:, :, None], worth[:, None, :]
                earlier = group[None, None, :] < group[None, :, None]
                beaten = (there > here) | ((there == here) & earlier)
                kept = tl.sum(beaten.to(tl.int32), axis=2) < KEPT  # (ROWS, PADDED_GROUPS)
                kept = tl.broadcast_to(kept[:, :, None], (ROWS, PADDED_GROUPS, PADDED_SIZE))
                kept = tl.reshape(kept, (ROWS, COLUMNS))
                key = tl.where(kept, key, LEAST)

            ids = tl.zeros((ROWS, PADDED_K), tl.int32)
            weights = tl.zeros((ROWS, PADDED_K), tl.float32)
            for k in range(TOP_K):
                _, at, key = take_best(key, column, COLUMNS)
                mine = column[None, :] == at[:, None]
                weight = tl.sum(tl.where(mine, scores, 0.0), axis=1)
                chosen = at // PADDED_SIZE * SIZE + at % PADDED_SIZE
                ids = tl.where((rank == k)[None, :], chosen[:, None], ids)
                weights = tl.where((rank == k)[None, :], weight[:, None], weights)
            if NORMALISE:
                total = tl.sum(weights, axis=1) + 1e-20
                weights = tl.div_rn(weights, tl.broadcast_to(total[:, None], weights.shape))
            place = row.to(tl.int64)[:, None] * TOP_K + rank[None, :]
            written = (row < T)[:, None] & (rank < TOP_K)[None, :]
            tl.store(weights_ptr + place, weights * route_scale, mask=written)
            tl.store(ids_ptr + place, ids.to(tl.int64), mask=written)


@triton.jit
def unsorted(key):
    """The float32 whose `sortable` key it is."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@dataclass(frozen=True)
class RouterTile:
    """How router_kernel computes: a program's tokens and experts, into how many parts the channels are cut at most,
    how many tokens choose at a time, the warps and the pipeline's stages."""

    up_to: float  # the most tokens it is for
    block_t: int
    block_e: int
    splits: int
    rows: int
    warps: int
    stages: int

    def chunk(self, h: int) -> int:
        """Blocks of channels to a program."""
        return triton.cdiv(triton.cdiv(h, BLOCK_SIZE), self.splits)

    def constexprs(self) -> dict[str, Any]:
        return {"BLOCK_T": self.block_t, "BLOCK_E": self.block_e, "ROWS": self.rows, "STAGES": self.stages}


# With few tokens the weights (3.7 MB in V3) are read by as many programs as there are multiprocessors; the more tokens,
# the fewer parts, as each part's logits are written and read again.
ROUTER = {
    "sm_80": (
        RouterTile(4, 16, 64, 28, 4, 4, 3),
        RouterTile(64, 16, 64, 14, 8, 4, 3),
        RouterTile(512, 32, 64, 4, 8, 4, 3),
        RouterTile(math.inf, 64, 128, 1, 16, 8, 3),
    ),
    "sm_89": (
        RouterTile(4, 16, 64, 28, 4, 4, 3),
        RouterTile(64, 16, 64, 14, 8, 4, 3),
        RouterTile(512, 32, 64, 4, 8, 4, 3),
        RouterTile(math.inf, 64, 64, 1, 16, 8, 3),
    ),
    "gfx942": (
        RouterTile(4, 16, 64, 28, 4, 4, 2),
        RouterTile(64, 16, 64, 14, 8, 4, 2),
        RouterTile(512, 32, 64, 4, 8, 4, 2),
        RouterTile(math.inf, 64, 64, 1, 16, 8, 2),
    ),
}
ROUTER |= {"sm_90": ROUTER["sm_80"], "sm_100": ROUTER["sm_80"]}
ROUTER_FLOAT32 = (RouterTile(math.inf, 16, 32, 8, 8, 4, 2),)  # for comparisons, not for speed


def rule_constexprs(n_experts: int, rule: Routing) -> dict[str, Any]:
    groups = 1 if rule.topk_method == "greedy" else rule.n_groups
    return {
        "E": n_experts, "TOP_K": rule.top_k, "GROUPS": groups, "KEPT": rule.n_limited_groups,
        "SIGMOID": rule.score_func == "sigmoid", "TOP2": rule.topk_method == "noaux_tc", "NORMALISE": rule.normalise,
    }  # fmt: skip


def router(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    rule: Routing,
    invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.router: x (T, H), w (E, H) both bfloat16 or both float32, bias (E,) float32, to weights (T, K)
    float32 and ids (T, K) int64.

    With `invariant` the channels are cut alike for any T, so that a token's bits do not depend on its company.
    """
    (n, h), n_experts = x.shape, w.shape[0]
    assert w.shape == (n_experts, h) and x.dtype == w.dtype, (x.shape, x.dtype, w.shape, w.dtype)
    assert x.is_contiguous() and w.is_contiguous() and (bias is None or bias.dtype == torch.float32)
    weights = torch.empty(n, rule.top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(n, rule.top_k, dtype=torch.int64, device=x.device)
    if n:
        table = ROUTER_FLOAT32 if x.dtype == torch.float32 else ROUTER[architecture(x.device)]
        tile = table[0] if invariant else tile_for(table, n)
        chunk = tile.chunk(h)
        grid = triton.cdiv(n, tile.block_t), triton.cdiv(n_experts, tile.block_e), triton.cdiv(h, chunk * BLOCK_SIZE)
        partial = torch.empty(grid[2], n, n_experts, dtype=torch.float32, device=x.device)
        counter = torch.zeros(grid[0], dtype=torch.int32, device=x.device)
        router_kernel[grid](
            x, w, bias, weights, ids, partial, counter, n, h, rule.route_scale,
            CHUNK=chunk, **rule_constexprs(n_experts, rule), **tile.constexprs(), num_warps=tile.warps,
        )  # fmt: skip
    return weights, ids


# --------------------------------------------------------------------------------------------------------------------
# Sorting assignments by expert
# --------------------------------------------------------------------------------------------------------------------

UNUSED = tl.constexpr(-1)  # in a tile's place for the expert


@triton.jit(do_not_specialize=["n", "first", "n_tiles", "block_m"])
def sort_kernel(ids_ptr, order_ptr, tiles_ptr, n, first, n_tiles, block_m, N_LOCAL: tl.constexpr, CHUNK: tl.constexpr):
    """One program per local expert: counts all assignments, then writes its own, in order, and its tiles.

    No atomics, so nothing depends on which program is faster. See reference.sort.
    """
    BINS: tl.constexpr = triton.next_power_of_2(N_LOCAL)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for at in range(0, n, CHUNK):
        a = at + tl.arange(0, CHUNK)
        local = (tl.load(ids_ptr + a, mask=a < n, other=-1) - first).to(tl.int32)
        here = (a < n) & (local >= 0) & (local < N_LOCAL)
        counts += tl.histogram(tl.where(here, local, 0), BINS, mask=here)
    needed = (counts + block_m - 1) // block_m
    count = tl.sum(tl.where(bins == expert, counts, 0))
    start = tl.sum(tl.where(bins < expert, counts, 0))
    tile = tl.sum(tl.where(bins < expert, needed, 0))

    if count > 0:
        place = start
        for at in range(0, n, CHUNK):
            a = at + tl.arange(0, CHUNK)
            local = (tl.load(ids_ptr + a, mask=a < n, other=-1) - first).to(tl.int32)
            mine = (a < n) & (local == expert)
            tl.store(order_ptr + place + tl.cumsum(mine.to(tl.int32)) - 1, a, mask=mine)
            place += tl.sum(mine.to(tl.int32))
        for done in range(0, count, block_m):
            ptr = tiles_ptr + 3 * (tile + done // block_m)
            tl.store(ptr, expert)
            tl.store(ptr + 1, start + done)
            tl.store(ptr + 2, tl.minimum(count - done, block_m))
    if expert == N_LOCAL - 1:
        for at in range(tl.sum(needed), n_tiles, 128):
            unused = at + tl.arange(0, 128)
            tl.store(tiles_ptr + 3 * unused, UNUSED, mask=unused < n_tiles)


SORT_CHUNKS = (128, 2048)  # assignments a program looks at at a time: the first that takes all, or the last


def max_tiles(n: int, n_local: int, block_m: int) -> int:
    """The most row tiles n assignments can need: every expert has one that is not full, the rest are full."""
    return min(n, n_local) + n // block_m


def sort(ids: torch.Tensor, first: int, n_local: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.sort, except that what that fills with -1 here is not written, but for an unused tile's expert."""
    n = ids.numel()
    order = torch.empty(n, dtype=torch.int32, device=ids.device)
    tiles = torch.empty(max_tiles(n, n_local, block_m), 3, dtype=torch.int32, device=ids.device)
    chunk = next((c for c in SORT_CHUNKS if n <= c), SORT_CHUNKS[-1])
    assert ids.is_contiguous()
    if n:
        sort_kernel[(n_local,)](ids, order, tiles, n, first, len(tiles), block_m, N_LOCAL=n_local, CHUNK=chunk)
    return order, tiles


# --------------------------------------------------------------------------------------------------------------------
# Grouped GEMM
# --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["m_tiles", "assignments"])
def grouped_gemm_kernel(
    x_ptr, x_s_ptr, w_ptr, w_s_ptr, out_ptr, order_ptr, tiles_ptr, m_tiles, assignments, N, K, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """out[a] = x[a // SHARE] times its expert's w (N, K) transposed, for the assignments a of one row tile.

    FP8 by FP8; without x_s_ptr bfloat16 by FP8; without w_s_ptr as well, bfloat16 or float32 by the same. See
    reference.grouped_gemm. Rows past a tile's end repeat its last one and are not stored. With SPLIT out[part, a] takes
    the sum of each part of K.
    """
    n_tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    pid_m, pid_n = tl.swizzle2d(pid // n_tiles, pid % n_tiles, m_tiles, n_tiles, GROUP_M)
    expert = tl.load(tiles_ptr + 3 * pid_m).to(tl.int64)
    if expert < 0:
        return
    start = tl.load(tiles_ptr + 3 * pid_m + 1)
    rows = tl.load(tiles_ptr + 3 * pid_m + 2)
    m = tl.arange(0, BLOCK_M)
    a = tl.load(order_ptr + start + tl.minimum(m, rows - 1)).to(tl.int64)
    x_row = a // SHARE
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    w_row = expert * N + tl.minimum(n, N - 1).to(tl.int64)
    if w_s_ptr is not None:  # BLOCK_N divides 128: one scale to a tile
        s_row = expert * tl.cdiv(N, SCALE_BLOCK) + pid_n * BLOCK_N // SCALE_BLOCK
        w_s_ptr += s_row * tl.cdiv(K, SCALE_BLOCK)
    acc = multiply_rows(
        x_ptr, x_s_ptr, x_row, w_ptr, w_s_ptr, w_row, K, BLOCK_M, BLOCK_N, STAGES, SWAP, SPLIT
    )  # fmt: skip

    out = cast(acc, out_ptr.dtype.element_ty)
    if SPLIT:
        a += tl.program_id(1).to(tl.int64) * assignments
    out_ptrs = out_ptr + a[:, None] * N + n[None, :]
    tl.store(out_ptrs, out.T if SWAP else out, mask=(m < rows)[:, None] & (n < N)[None, :])


# Keyed on the mean number of rows an expert gets; the rest as in tiles.py. Both products of a layer share a row's
# block_m, since they share its table of tiles. tests/test_compile.py holds every row to the limits and to its
# tensor-core instruction.
W8A8 = {
    "sm_89": (
        Tile(32, 16, 64, False, 4, 4),
        Tile(math.inf, 64, 128, False, 4, 3),
    ),
    "sm_90": (
        Tile(12, 16, 64, True, 4, 6),
        Tile(32, 32, 64, True, 4, 6),
        Tile(math.inf, 64, 128, False, 4, 3),
    ),
    "sm_100": (
        Tile(12, 16, 64, True, 4, 6),
        Tile(32, 32, 64, True, 4, 5),
        Tile(math.inf, 64, 128, False, 4, 4),
    ),
    "gfx942": (
        Tile(64, 32, 32, False, 4, 2),
        Tile(math.inf, 64, 64, False, 4, 2),
    ),
}
W8A16 = {
    "sm_80": (
        Tile(12, 16, 64, False, 4, 5),
        Tile(math.inf, 64, 64, False, 4, 4),
    ),
    "sm_89": (
        Tile(12, 16, 64, False, 4, 5),
        Tile(math.inf, 64, 64, False, 4, 4),
    ),
    "sm_90": (
        Tile(12, 16, 64, True, 4, 5),
        Tile(32, 32, 64, True, 4, 4),
        Tile(math.inf, 64, 64, True, 4, 4),
    ),
    "sm_100": (
        Tile(12, 16, 64, True, 4, 5),
        Tile(32, 32, 64, True, 4, 4),
        Tile(math.inf, 64, 64, True, 4, 4),
    ),
    "gfx942": (
        Tile(12, 16, 64, False, 4, 2),
        Tile(math.inf, 64, 64, False, 4, 2),
    ),
}
PLAIN = {
    "sm_80": (
        Tile(12, 16, 64, False, 4, 4),
        Tile(math.inf, 64, 128, False, 4, 3),
    ),
    "sm_89": (
        Tile(12, 16, 64, False, 4, 4),
        Tile(math.inf, 64, 64, False, 4, 3),
    ),
    "sm_90": (
        Tile(12, 16, 64, True, 4, 5),
        Tile(32, 32, 64, True, 4, 5),
        Tile(math.inf, 64, 128, False, 4, 4),
    ),
    "sm_100": (
        Tile(12, 16, 64, True, 4, 5),
        Tile(32, 32, 64, True, 4, 5),
        Tile(math.inf, 64, 128, False, 4, 4),
    ),
    "gfx942": (
        Tile(12, 16, 64, False, 4, 2),
        Tile(math.inf, 64, 64, False, 4, 2),
    ),
}
GROUP_M = 16  # row tiles whose programs run together, so that an expert's weights stay in the L2 cache
FLOAT32 = (Tile(math.inf, 16, 32, False, 4, 2),)  # for comparisons, not for speed


def table_for(w: Weight, device: torch.device) -> tuple[Tile, ...]:
    """The tiles that serve a weight, by what it is multiplied with."""
    if w.data.dtype == torch.float32:
        return FLOAT32
    tables = PLAIN if w.scale is None else W8A8 if w.fp8 else W8A16
    return tables[architecture(device)]


def grouped_gemm(
    x: torch.Tensor | Quantised,
    w: Weight,
    order: torch.Tensor,
    tiles: torch.Tensor,
    share: int,
    tile: Tile,
) -> torch.Tensor:
    """As reference.grouped_gemm, with the table of tiles in the place of bounds: x (R, K) and w (E, N, K) to
    (R * share, N) in x's dtype, of which only the rows in `order` are written. tiles are `sort`'s for tile.block_m.
    Where the tile splits K: to float32 sums (parts, R * share, N), which silu_mul adds up.
    """
    values, scales, dtype = (x.q, x.s, x.dtype) if isinstance(x, Quantised) else (x, None, x.dtype)
    (rows, k), (n_experts, n, _) = values.shape, w.data.shape
    blocks = triton.cdiv(n, BLOCK_SIZE), triton.cdiv(k, BLOCK_SIZE)
    assert w.data.shape == (n_experts, n, k), (values.shape, w.data.shape)
    assert w.scale is None or w.scale.shape == (n_experts, *blocks), (w.data.shape, w.scale.shape)
    assert (scales is not None) == (w.fp8 is not None) and (scales is None or scales.shape == (rows, blocks[1]))
    assert len(order) == rows * share and all(t.is_contiguous() for t in (values, w.data, order, tiles))
    assert values.dtype == (w.data.dtype if w.scale is None or w.fp8 else torch.bfloat16), (values.dtype, w.data.dtype)
    shape, dtype = ((tile.split, rows * share, n), torch.float32) if tile.split > 1 else ((rows * share, n), dtype)
    out = torch.empty(shape, dtype=dtype, device=values.device)
    if out.numel():
        grouped_gemm_kernel[(len(tiles) * triton.cdiv(n, tile.block_n), tile.split)](
            values if scales is None else kernel_view(values), scales,
            w.data if w.scale is None else kernel_view(w.data), w.scale,
            out, order, tiles, len(tiles), rows * share, n, k, SHARE=share, **constexprs(tile, k), **tile.options(),
        )  # fmt: skip
    return out


def constexprs(tile: Tile, k: int) -> dict[str, Any]:
    """A tile's, with no more stages than there are steps: an expert cut on its inner width has two of them."""
    stages = max(2, min(tile.stages, triton.cdiv(k, BLOCK_SIZE)))
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "GROUP_M": GROUP_M}
    return sizes | {"SWAP": tile.swap, "STAGES": stages, "SPLIT": tile.split > 1}


def tile_for(table: tuple[Any, ...], size: float) -> Any:
    """The row of a table that serves so many tokens, or rows to an expert."""
    return next(tile for tile in table if size <= tile.up_to)


def split_up(tile: Tile, rows: float, n_local: int, n: int, k: int, arch: str) -> Tile:
    """For gate and up, of the tile for the fewest rows to an expert: with K in so many parts that (nearly) every
    multiprocessor has a program, when all experts together are expected to have so many rows here."""
    used = min(math.ceil(rows), n_local)  # row tiles: with few rows hardly one falls to an expert that has one already
    programs = used * triton.cdiv(n, tile.block_n)
    return replace(tile, split=split_for(programs, triton.cdiv(k, BLOCK_SIZE), PROCESSORS[arch]))


def quantise(x: torch.Tensor, w: Weight) -> torch.Tensor | Quantised:
    """x as w's product takes it."""
    return Quantised(*act_quant(x, scale_fmt=w.scale_fmt), dtype=x.dtype) if w.fp8 else x


# --------------------------------------------------------------------------------------------------------------------
# Combine
# --------------------------------------------------------------------------------------------------------------------

COMBINE_COLUMNS = 512  # of a token to a program


@triton.jit(do_not_specialize=["first", "n_local"])
def combine_kernel(
    y_ptr, weights_ptr, ids_ptr, shared_ptr, out_ptr, H, first, n_local, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr
):
    """BLOCK_H columns of one token. See reference.combine."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):
        a = t * TOP_K + k
        local = tl.load(ids_ptr + a) - first
        here = (local >= 0) & (local < n_local)  # what is not here has no row: nothing wrote it
        y = tl.load(y_ptr + a * H + h, mask=(h < H) & here, other=0.0).to(tl.float32)
        acc += tl.load(weights_ptr + a, mask=here, other=0.0) * y
    if shared_ptr is not None:
        acc += tl.load(shared_ptr + t * H + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * H + h, cast(acc, out_ptr.dtype.element_ty), mask=h < H)


def combine(
    y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, first: int, n_local: int, shared: torch.Tensor | None
) -> torch.Tensor:
    """As reference.combine."""
    (n, top_k), h = ids.shape, y.shape[1]
    assert y.shape == (n * top_k, h) and weights.shape == ids.shape and weights.dtype == torch.float32
    assert shared is None or shared.shape == (n, h)
    assert all(t is None or t.is_contiguous() for t in (y, weights, ids, shared))
    out = torch.empty(n, h, dtype=y.dtype, device=y.device)
    if out.numel():
        combine_kernel[(n, triton.cdiv(h, COMBINE_COLUMNS))](
            y, weights, ids, shared, out, h, first, n_local, TOP_K=top_k, BLOCK_H=COMBINE_COLUMNS
        )
    return out


# --------------------------------------------------------------------------------------------------------------------
# The layer
# --------------------------------------------------------------------------------------------------------------------


def experts(
    x: torch.Tensor | Quantised,
    weights: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    w13: Weight,
    w2: Weight,
    inter: int,
    shared: Callable[[], torch.Tensor] | None = None,
    n_experts: int | None = None,
    invariant: bool = False,
) -> torch.Tensor:
    """As ReferenceBackend.experts. With `invariant` the tile is the same for any T and K is not split, so that a
    token's bits do not depend on the rest of its batch."""
    n_local, (n, k) = len(w13.data), w13.data.shape[1:]
    table = table_for(w13, weights.device)
    rows = ids.numel() / (n_experts or n_local)  # to an expert, in the mean
    tile = up_tile = table[0] if invariant else tile_for(table, math.ceil(rows))
    if tile is table[0] and not invariant:
        up_tile = split_up(tile, rows * n_local, n_local, n, k, architecture(weights.device))
    join = beside(shared, weights.device) if shared else None
    if isinstance(x, torch.Tensor):
        x = quantise(x, w13)
    elif not w13.fp8:
        assert x.x is not None, "activations that are only there quantised, by weights that take plain ones"
        x = x.x
    order, tiles = sort(ids, first, n_local, tile.block_m)
    gate_up = grouped_gemm(x, w13, order, tiles, ids.shape[1], up_tile)
    y = grouped_gemm(fused.silu_mul(gate_up, inter, w2.fp8, rounded=x.dtype), w2, order, tiles, 1, tile)
    return combine(y, weights, ids, first, n_local, join() if join else None)


def beside(work: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """Runs `work` on a second stream of the GPU; what comes back waits for it, and gives its result.

    Safe without record_stream, and so under graph capture: the second stream belongs to one first stream, never starts
    before that has come this far, and is joined by it before the result is read. Whatever memory one of them
    frees is therefore written again only after the other has done with it; what `work` reads, the caller must hold.
    """
    if device.type != "cuda":
        return work
    main = torch.cuda.current_stream(device)
    side = second_stream(main)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = work()

    def join() -> torch.Tensor:
        main.wait_stream(side)
        return result

    return join


@cache
def second_stream(main: torch.cuda.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(main.device)

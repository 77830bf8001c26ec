"""The experts of a mixture-of-experts layer in Triton, as reference.py specifies them: sort, grouped GEMMs, combine.

Every shape depends on the number of tokens alone and nothing is read back to the host, so that a CUDA graph can record
the layer. How many rows each expert gets differs from batch to batch: it is in device memory, as a table of row tiles.
The grid covers the longest table possible, and programs without a tile return at once.

A layer in W8A8 whose input is quantised takes 7 launches, whatever the number of tokens and experts: the router's
counters zeroed, the router, sort, grouped_gemm up, fused.silu_mul, grouped_gemm down, combine. The shared experts run
at the same time on a second stream.

Names: T tokens, K experts a token, E experts, H the model's width. The assignment a = t * K + k is token t's k-th
expert.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.formats import Quantised, Weight
from ops.gpu import fused, tiles
from ops.gpu.casts import SCALE_BLOCK, cast
from ops.gpu.device import architecture, kernel_view
from ops.gpu.gemm import multiply_rows, weight_scales
from ops.gpu.quantisation import act_quant
from ops.gpu.tiles import Tile, split_for_few_rows, tile_for
from ops.reference import BLOCK

# --------------------------------------------------------------------------------------------------------------------
# Sorting assignments by expert
# --------------------------------------------------------------------------------------------------------------------

UNUSED = tl.constexpr(-1)  # the expert of an unused tile


@triton.jit(do_not_specialize=["n", "first", "n_tiles", "block_m"])
def sort_kernel(ids_ptr, order_ptr, tiles_ptr, n, first, n_tiles, block_m, N_LOCAL: tl.constexpr, CHUNK: tl.constexpr):
    """One program per local expert counts all assignments, then writes its own in order, and their tiles.

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


SORT_CHUNKS = (128, 2048)  # assignments a program reads at a time: the first that holds all of them, or the last


def max_tiles(n: int, n_local: int, block_m: int) -> int:
    """The most row tiles that n assignments can need: one partial tile for every expert, and full ones."""
    return min(n, n_local) + n // block_m


def sort(ids: torch.Tensor, first: int, n_local: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.sort, but entries without an assignment are not written, except an unused tile's expert, -1."""
    n = ids.numel()
    order = torch.empty(n, dtype=torch.int32, device=ids.device)
    row_tiles = torch.empty(max_tiles(n, n_local, block_m), 3, dtype=torch.int32, device=ids.device)
    chunk = next((c for c in SORT_CHUNKS if n <= c), SORT_CHUNKS[-1])
    assert ids.is_contiguous()
    if n:
        sort_kernel[(n_local,)](ids, order, row_tiles, n, first, len(row_tiles), block_m, N_LOCAL=n_local, CHUNK=chunk)
    return order, row_tiles


# --------------------------------------------------------------------------------------------------------------------
# Grouped GEMM
# --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["m_tiles", "assignments"])
def grouped_gemm_kernel(
    x_ptr, x_s_ptr, w_ptr, w_s_ptr, w_z_ptr, out_ptr, order_ptr, tiles_ptr, m_tiles, assignments, N, K,
    GROUP: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out[a] = x[a // SHARE] times its expert's w (N, K) transposed, for the assignments a of one row tile.

    FP8 by FP8; without x_s_ptr bfloat16 by 8 or 4 bits; without w_s_ptr as well, bfloat16 or float32 by the same. See
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
    if GROUP:
        w_s_ptr += expert * (K // GROUP) * N
        if w_z_ptr is not None:
            w_z_ptr += expert * (K // GROUP) * N
    elif w_s_ptr is not None:  # BLOCK_N divides 128: one scale to a tile
        s_row = expert * tl.cdiv(N, SCALE_BLOCK) + pid_n * BLOCK_N // SCALE_BLOCK
        w_s_ptr += s_row * tl.cdiv(K, SCALE_BLOCK)
    acc = multiply_rows(
        x_ptr, x_s_ptr, x_row, w_ptr, w_s_ptr, w_z_ptr, w_row, n, N, K, GROUP, BLOCK_M, BLOCK_N, STAGES, SWAP, SPLIT
    )  # fmt: skip

    out = cast(acc, out_ptr.dtype.element_ty)
    if SPLIT:
        a += tl.program_id(1).to(tl.int64) * assignments
    out_ptrs = out_ptr + a[:, None] * N + n[None, :]
    tl.store(out_ptrs, out.T if SWAP else out, mask=(m < rows)[:, None] & (n < N)[None, :])


def grouped_tiles(w: Weight, device: torch.device) -> tuple[Tile, ...]:
    """The table of tiles for a weight, by the type of its product."""
    if w.data.dtype == torch.float32:
        return tiles.GROUPED_FLOAT32
    if w.scale is None:
        return tiles.GROUPED_PLAIN[architecture(device)]
    if w.fp8:
        return tiles.GROUPED_W8A8[architecture(device)]
    return (tiles.GROUPED_W8A16 if w.block == BLOCK else tiles.GROUPED_W4A16)[architecture(device)]


def grouped_gemm(
    x: torch.Tensor | Quantised,
    w: Weight,
    order: torch.Tensor,
    row_tiles: torch.Tensor,
    share: int,
    tile: Tile,
) -> torch.Tensor:
    """As reference.grouped_gemm: x (R, K) and w (E, N, K) to
    (R * share, N) in x's dtype, of which only the rows in `order` are written. row_tiles are `sort`'s for tile.block_m.
    Where the tile splits K: to float32 sums (parts, R * share, N), which silu_mul adds up.
    """
    values, scales, dtype = (x.q, x.s, x.dtype) if isinstance(x, Quantised) else (x, None, x.dtype)
    (rows, k), n = values.shape, w.data.shape[1]
    w_s, w_z, group = (None, None, 0) if w.scale is None else weight_scales(k, w.data, w.scale, w.block, w.zero)
    assert w.scale is not None or w.data.shape[2] == k, (values.shape, w.data.shape)
    assert (scales is not None) == (w.fp8 is not None)
    assert scales is None or scales.shape == (rows, triton.cdiv(k, BLOCK_SIZE)), scales.shape
    assert len(order) == rows * share and all(t.is_contiguous() for t in (values, w.data, order, row_tiles))
    assert values.dtype == (w.data.dtype if w.scale is None or w.fp8 else torch.bfloat16), (values.dtype, w.data.dtype)
    shape, dtype = ((tile.split, rows * share, n), torch.float32) if tile.split > 1 else ((rows * share, n), dtype)
    out = torch.empty(shape, dtype=dtype, device=values.device)
    if out.numel():
        grouped_gemm_kernel[(len(row_tiles) * triton.cdiv(n, tile.block_n), tile.split)](
            kernel_view(values), scales,
            kernel_view(w.data), w_s, w_z, out, order, row_tiles, len(row_tiles), rows * share, n, k,
            GROUP=group, SHARE=share,
            **tile.for_channels(k).constexprs(), **tile.options(),
        )  # fmt: skip
    return out


def quantised_for(w: Weight, x: torch.Tensor) -> torch.Tensor | Quantised:
    """x, quantised if w's product is W8A8."""
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
        here = (local >= 0) & (local < n_local)  # other assignments have no row: nothing wrote it
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
    (n_local, n), k = w13.data.shape[:2], (x if isinstance(x, torch.Tensor) else x.q).shape[1]
    table = grouped_tiles(w13, weights.device)
    rows = ids.numel() / (n_experts or n_local)  # of an expert, in the mean
    tile = up_tile = table[0] if invariant else tile_for(table, math.ceil(rows))
    if tile is table[0] and not invariant:
        up_tile = split_for_few_rows(tile, rows * n_local, n_local, n, k, architecture(weights.device))
    join = run_on_side_stream(shared, weights.device) if shared else None
    if isinstance(x, torch.Tensor):
        x = quantised_for(w13, x)
    elif not w13.fp8:
        assert x.x is not None, "activations that are only there quantised, by weights that take plain ones"
        x = x.x
    order, row_tiles = sort(ids, first, n_local, tile.block_m)
    gate_up = grouped_gemm(x, w13, order, row_tiles, ids.shape[1], up_tile)
    y = grouped_gemm(fused.silu_mul(gate_up, inter, w2.fp8, rounded=x.dtype), w2, order, row_tiles, 1, tile)
    return combine(y, weights, ids, first, n_local, join() if join else None)


def run_on_side_stream(work: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """Runs `work` on a second stream of the GPU; the function returned waits for it and returns its result.

    Safe without record_stream, and so under graph capture: the second stream belongs to one first stream, never starts
    before that has come this far, and is joined by it before the result is read. Whatever memory one of them
    frees is therefore written again only after the other has done with it; what `work` reads, the caller must hold.
    """
    if device.type != "cuda":
        return work
    main = torch.cuda.current_stream(device)
    side = side_stream(main)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = work()

    def join() -> torch.Tensor:
        main.wait_stream(side)
        return result

    return join


@cache
def side_stream(main: torch.cuda.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(main.device)

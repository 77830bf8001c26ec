"""The products by every expert's own weight in Triton, as reference.grouped_gemm specifies them.

For rows in any order, whose tiles `sort` made or the first product finds. ordered_gemm.py has many rows' products.

Names: K input channels, N output channels, E experts. The assignment a = t * K + k is token t's k-th expert.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.formats import PartialSums, Quantised, Weight
from ops.gpu import pdl, tiles
from ops.gpu.casts import SCALE_BLOCK, cast
from ops.gpu.device import architecture, kernel_view
from ops.gpu.gemm import weight_scales
from ops.gpu.multiply import multiply_rows
from ops.gpu.pdl import wait_for_previous
from ops.gpu.sort import UNUSED, find_tile, max_tiles
from ops.gpu.tiles import Tile
from ops.reference import BLOCK


@triton.jit(do_not_specialize=["m_tiles", "assignments", "tokens", "first"])
def grouped_gemm_kernel(
    x_ptr, x_s_ptr, w_ptr, w_s_ptr, w_z_ptr, out_ptr, order_ptr, tiles_ptr, ids_ptr, shared_w_ptr, shared_s_ptr,
    m_tiles, assignments, tokens, first, N, K,
    GROUP: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, N_LOCAL: tl.constexpr, CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out[a] = x[a // SHARE] times its expert's w (N, K) transposed, for the assignments a of one row tile.

    FP8 by FP8; without x_s_ptr bfloat16 by 8 or 4 bits; without w_s_ptr as well, bfloat16 or float32 by the same. See
    reference.grouped_gemm. Rows past a tile's end repeat its last one and are not stored. With SPLIT out[part, a] takes
    the sum of each part of K.

    The row tiles are those of order_ptr and tiles_ptr, as `sort` makes them. With ids_ptr every program finds its own
    among ids for all N_LOCAL experts, and the first of a tile writes it there, for the second product, which reads it
    EARLY: between the two products is another kernel. shared_w_ptr may be the weight of one expert more, number
    N_LOCAL, which all tokens have: the assignment of token t is then assignments + t.
    """
    if not EARLY:
        wait_for_previous()
    n_tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    pid_m, pid_n = tl.swizzle2d(pid // n_tiles, pid % n_tiles, m_tiles, n_tiles, GROUP_M)
    m = tl.arange(0, BLOCK_M)
    out_rows = assignments
    if shared_w_ptr is not None:
        out_rows += tokens
    if ids_ptr is not None:
        shared_tiles = 0 if shared_w_ptr is None else tl.cdiv(tokens, BLOCK_M)
        expert, rows, a = find_tile(ids_ptr, assignments, first, pid_m - shared_tiles, BLOCK_M, N_LOCAL, CHUNK)
        expert = tl.where(expert < N_LOCAL, expert, UNUSED)
        x_row = a // SHARE
        if shared_w_ptr is not None:
            is_shared, left = pid_m < shared_tiles, tokens - pid_m * BLOCK_M
            token = pid_m * BLOCK_M + tl.minimum(m, left - 1)
            expert, rows = tl.where(is_shared, N_LOCAL, expert), tl.where(is_shared, tl.minimum(left, BLOCK_M), rows)
            a, x_row = tl.where(is_shared, assignments + token, a), tl.where(is_shared, token, x_row)
        if pid_n == 0 and tl.program_id(1) == 0:
            tl.store(tiles_ptr + 3 * pid_m, expert)
            tl.store(tiles_ptr + 3 * pid_m + 1, pid_m * BLOCK_M)
            tl.store(tiles_ptr + 3 * pid_m + 2, rows)
            tl.store(order_ptr + pid_m * BLOCK_M + m, a)
        if expert < 0:
            return
    else:
        expert = tl.load(tiles_ptr + 3 * pid_m)
        if expert < 0:
            return
        start = tl.load(tiles_ptr + 3 * pid_m + 1)
        rows = tl.load(tiles_ptr + 3 * pid_m + 2)
        a = tl.load(order_ptr + start + tl.minimum(m, rows - 1))
        x_row = a // SHARE
    a, x_row = a.to(tl.int64), x_row.to(tl.int64)
    if shared_w_ptr is not None:
        is_shared = expert == N_LOCAL
        w_ptr, w_s_ptr = tl.where(is_shared, shared_w_ptr, w_ptr), tl.where(is_shared, shared_s_ptr, w_s_ptr)
        expert = tl.where(is_shared, 0, expert)
    expert = expert.to(tl.int64)
    if EARLY:
        wait_for_previous()
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
        a += tl.program_id(1).to(tl.int64) * out_rows
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
) -> torch.Tensor | PartialSums:
    """As reference.grouped_gemm: x (R, K) and w (E, N, K) to
    (R * share, N) in x's dtype, of which only the rows in `order` are written. row_tiles are `sort`'s for tile.block_m.
    Where the tile splits K: to its partial sums.
    """
    n = len(order)
    assert order.is_contiguous() and row_tiles.is_contiguous()
    assert n == len(x.q if isinstance(x, Quantised) else x) * share
    constexprs = {"N_LOCAL": len(w.data), "CHUNK": 0, "EARLY": False}
    return _launch(x, w, None, (order, row_tiles, None), n, 0, 0, share, tile, constexprs)


# Assignments up to which each program of the first product finds its rows among all of them, and writes them down for
# the second. That takes instructions in proportion to them, but no launch of `sort`; see benchmarks/step_model.py.
SORTED_IN_PLACE = 256
CHUNKS = (64, SORTED_IN_PLACE)  # that it is compiled for

Rows = tuple[torch.Tensor, torch.Tensor]  # order and row tiles, as `sort` has them


def grouped_gemm_in_place(
    x: Quantised, w: Weight, shared: Weight | None, ids: torch.Tensor, first: int, tile: Tile
) -> tuple[torch.Tensor | PartialSums, Rows]:
    """grouped_gemm in W8A8 of x (T, K) for ids (T, top K) that nobody has sorted, up to SORTED_IN_PLACE of them, and
    the experts from `first` on; and the rows, for grouped_gemm_of_found. `shared` is an expert of every token, whose
    rows come after the assignments'."""
    (tokens, top_k), n, n_local = ids.shape, ids.numel(), len(w.data)
    assert n <= SORTED_IN_PLACE and w.fp8 and ids.is_contiguous() and (shared is None or is_alike(shared, w))
    assert len(x.q) == tokens
    count = max_tiles(n, n_local, tile.block_m) + (triton.cdiv(tokens, tile.block_m) if shared else 0)
    order = torch.empty(count * tile.block_m, dtype=torch.int32, device=ids.device)
    row_tiles = torch.empty(count, 3, dtype=torch.int32, device=ids.device)
    constexprs = {"N_LOCAL": n_local, "CHUNK": next(c for c in CHUNKS if n <= c), "EARLY": False}
    y = _launch(x, w, shared, (order, row_tiles, ids), n, tokens, first, top_k, tile, constexprs)
    return y, (order, row_tiles)


def grouped_gemm_of_found(
    x: Quantised, w: Weight, shared: Weight | None, rows: Rows, ids: torch.Tensor, tile: Tile
) -> torch.Tensor | PartialSums:
    """The second product after grouped_gemm_in_place, and after a kernel between the two: of x, a row to each of its
    rows, by a tile of the same height."""
    (tokens, _), n = ids.shape, ids.numel()
    assert w.fp8 and (shared is None or is_alike(shared, w)) and len(rows[0]) == len(rows[1]) * tile.block_m
    assert len(x.q) == n + (tokens if shared else 0)
    constexprs = {"N_LOCAL": len(w.data), "CHUNK": 0, "EARLY": True}
    return _launch(x, w, shared, (*rows, None), n, tokens, 0, 1, tile, constexprs)


def is_alike(shared: Weight, w: Weight) -> bool:
    """Whether the weight of a shared expert (N, K) can be one expert more of w (E, N, K), both W8A8."""
    alike = w.fp8 is not None and shared[2:] == w[2:] and shared.data.dtype == w.data.dtype
    return alike and shared.data.shape == w.data.shape[1:] and shared.data.is_contiguous()


def _launch(
    x: torch.Tensor | Quantised,
    w: Weight,
    shared: Weight | None,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    assignments: int,
    tokens: int,
    first: int,
    share: int,
    tile: Tile,
    constexprs: dict[str, Any],
) -> torch.Tensor | PartialSums:
    """`rows`: order, row tiles, and unsorted ids where those two are still to be written."""
    m_tiles, out_rows = len(rows[1]), assignments + (tokens if shared else 0)
    values, scales, dtype = (x.q, x.s, x.dtype) if isinstance(x, Quantised) else (x, None, x.dtype)
    k, n = values.shape[1], w.data.shape[1]
    w_s, w_z, group = (None, None, 0) if w.scale is None else weight_scales(k, w.data, w.scale, w.block, w.zero)
    assert w.scale is not None or w.data.shape[2] == k, (values.shape, w.data.shape)
    assert (scales is not None) == (w.fp8 is not None)
    assert scales is None or scales.shape == (len(values), triton.cdiv(k, BLOCK_SIZE)), scales.shape
    assert values.is_contiguous() and w.data.is_contiguous()
    assert values.dtype == (w.data.dtype if w.scale is None or w.fp8 else torch.bfloat16), (values.dtype, w.data.dtype)
    shape, kind = ((tile.split, out_rows, n), torch.float32) if tile.split > 1 else ((out_rows, n), dtype)
    out = torch.empty(shape, dtype=kind, device=values.device)
    if out.numel():
        grouped_gemm_kernel[(m_tiles * triton.cdiv(n, tile.block_n), tile.split)](
            kernel_view(values), scales, kernel_view(w.data), w_s, w_z, out, *rows,
            None if shared is None else kernel_view(shared.data), None if shared is None else shared.scale,
            m_tiles, assignments, tokens, first, n, k, GROUP=group, SHARE=share, **constexprs,
            **tile.for_channels(k).constexprs(), **tile.options(), **pdl.options(architecture(values.device)),
        )  # fmt: skip
    return PartialSums(out, dtype) if tile.split > 1 else out

"""The products by every expert's own weight of many rows, in Triton, as reference.grouped_gemm specifies them: rows are
put in the order of their experts, so that the tensor memory accelerator can copy them. W8A8.

Names: K input channels, N output channels, E experts, R rows. The assignment a = t * SHARE + k: token t's k-th expert.
"""

import torch
import triton
import triton.language as tl

from ops.formats import Quantised, Weight
from ops.gpu import tiles
from ops.gpu.casts import SCALE_BLOCK, cast, dot_operand
from ops.gpu.device import architecture, kernel_view
from ops.gpu.gemm import allow_descriptors, in_sixteens
from ops.gpu.tiles import Tile


@triton.jit
def gather_rows_kernel(
    x_ptr, x_s_ptr, out_ptr, out_s_ptr, order_ptr, tiles_ptr, K,
    SHARE: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out[p] = x[order[p] // SHARE] and its scales, for ROWS places p of a row tile."""
    tile_ptr = tiles_ptr + 3 * (tl.program_id(0) // (BLOCK_M // ROWS))
    skipped = tl.program_id(0) % (BLOCK_M // ROWS) * ROWS
    expert = tl.load(tile_ptr)
    if expert < 0:
        return
    row = skipped + tl.arange(0, ROWS)
    real, place = row < tl.load(tile_ptr + 2), (tl.load(tile_ptr + 1) + row).to(tl.int64)
    token = (tl.load(order_ptr + place, mask=real, other=0) // SHARE).to(tl.int64)
    for at in range(0, K, COLUMNS):
        k = at + tl.arange(0, COLUMNS)
        inside = real[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + token[:, None] * K + k[None, :], mask=inside)
        tl.store(out_ptr + place[:, None] * K + k[None, :], x, mask=inside)
    blocks, block = tl.cdiv(K, SCALE_BLOCK), tl.arange(0, BLOCKS)
    inside = real[:, None] & (block < blocks)[None, :]
    s = tl.load(x_s_ptr + token[:, None] * blocks + block[None, :], mask=inside)
    tl.store(out_s_ptr + place[:, None] * blocks + block[None, :], s, mask=inside)


@triton.jit(do_not_specialize=["m_tiles", "R"])
def grouped_persistent_kernel(
    x_ptr, x_s_ptr, w_ptr, w_s_ptr, out_ptr, order_ptr, tiles_ptr, m_tiles, R, E, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    """W8A8 of x (R, K) in the order of experts; see gemm.gemm_persistent_kernel. Rows that a tile reads of the next
    expert, and channels of its weight, are not stored. Row p goes to out[p], or to out[order[p]]."""
    n_tiles, k_blocks = tl.cdiv(N, BLOCK_N), tl.cdiv(K, SCALE_BLOCK)
    x_rows = tl.make_tensor_descriptor(x_ptr, [R, K], [K, 1], [BLOCK_M, SCALE_BLOCK])
    w_rows = tl.make_tensor_descriptor(w_ptr, [E * N, K], [K, 1], [BLOCK_N, SCALE_BLOCK])
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        pid_m, pid_n = tl.swizzle2d(tile // n_tiles, tile % n_tiles, m_tiles, n_tiles, GROUP_M)
        expert = tl.load(tiles_ptr + 3 * pid_m)
        used = expert >= 0
        start = tl.load(tiles_ptr + 3 * pid_m + 1, mask=used, other=0)
        rows = tl.load(tiles_ptr + 3 * pid_m + 2, mask=used, other=0)
        expert = tl.maximum(expert, 0)
        n, m = pid_n * BLOCK_N, tl.arange(0, BLOCK_M)
        w_row = expert * N + n
        x_s_ptrs = x_s_ptr + tl.minimum(start + m, R - 1).to(tl.int64) * k_blocks
        s_row = expert * tl.cdiv(N, SCALE_BLOCK) + n // SCALE_BLOCK  # BLOCK_N divides 128: one scale to a tile
        w_s_ptrs = w_s_ptr + s_row * k_blocks
        scale = tl.load(x_s_ptrs) * tl.load(w_s_ptrs)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        blocks = tl.where(used, k_blocks, 0)
        for i in tl.range(0, blocks, num_stages=STAGES, warp_specialize=SPECIALISED):
            x = dot_operand(x_rows.load([start, i * SCALE_BLOCK]), True)
            w = dot_operand(w_rows.load([w_row, i * SCALE_BLOCK]), True)
            ahead = tl.minimum(i + 1, k_blocks - 1)  # the warps that multiply have no pipeline
            next_scale = tl.load(x_s_ptrs + ahead) * tl.load(w_s_ptrs + ahead)
            acc += tl.dot(x, w.T) * scale[:, None]
            scale = next_scale
        columns = n + tl.arange(0, BLOCK_N)
        if order_ptr is not None:
            to = tl.load(order_ptr + start + m, mask=m < rows, other=0).to(tl.int64)
        else:
            to = (start + m).to(tl.int64)
        out_ptrs = out_ptr + to[:, None] * N + columns[None, :]
        tl.store(out_ptrs, cast(acc, out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (columns < N)[None, :])


GATHERED_ROWS, GATHERED_COLUMNS = 16, 512  # of a program of gather_rows_kernel, and of them at a time


def gather_rows(x: Quantised, order: torch.Tensor, row_tiles: torch.Tensor, share: int, block_m: int) -> Quantised:
    """The rows x (R, K) of assignments, x[a // share], in `sort`'s order; places without one are not written."""
    (_, k), n = x.q.shape, len(order)
    q = torch.empty(n, k, dtype=x.q.dtype, device=x.q.device)
    s = torch.empty(n, x.s.shape[1], dtype=torch.float32, device=x.q.device)
    gather_rows_kernel[(len(row_tiles) * (block_m // GATHERED_ROWS),)](
        x.q.view(torch.uint8), x.s, q.view(torch.uint8), s, order, row_tiles, k, SHARE=share, ROWS=GATHERED_ROWS,
        BLOCK_M=block_m, COLUMNS=GATHERED_COLUMNS, BLOCKS=triton.next_power_of_2(s.shape[1]),
    )  # fmt: skip
    return Quantised(q, s, None, x.dtype)


def can_order(x: Quantised, w: Weight, tile: Tile) -> bool:
    """Whether grouped_gemm_in_order takes these: rows that begin at multiples of 16 bytes, by a persistent tile."""
    return bool(tile.persistent) and in_sixteens(x.q) and in_sixteens(w.data)


def grouped_gemm_in_order(
    x: Quantised, w: Weight, row_tiles: torch.Tensor, tile: Tile, order: torch.Tensor | None = None
) -> torch.Tensor:
    """grouped_gemm in W8A8 of rows that gather_rows, or a product before, has put in order: (R, N) in that order, or
    where `order` is given each row at its assignment."""
    (r, k), (e, n) = x.q.shape, w.data.shape[:2]
    assert w.fp8 and w.scale is not None and can_order(x, w, tile)
    assert w.scale.is_contiguous() and w.data.is_contiguous()
    out = torch.empty(r, n, dtype=x.dtype, device=x.q.device)
    count = len(row_tiles) * triton.cdiv(n, tile.block_n)
    allow_descriptors(out.device)
    grouped_persistent_kernel[(min(count, tile.persistent * tiles.SM_COUNT[architecture(out.device)]),)](
        kernel_view(x.q), x.s, kernel_view(w.data), w.scale, out, order, row_tiles, len(row_tiles), r, e, n, k,
        **tile.for_channels(k).constexprs(), **tile.options(),
    )  # fmt: skip
    return out

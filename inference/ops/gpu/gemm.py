"""The two GEMMs by FP8 weights in Triton, as reference.py specifies them: fp8_gemm (W8A8) and w8a16_gemm.

Two things shape this file.

- Every choice of tile comes from tiles.py, keyed on the architecture, on N, K and a bucket of M, the number of tokens.
  Nothing is tuned at start-up.
- Hopper's FP8 tensor core wants at least 64 rows in its first operand; with fewer, Triton falls back to Ampere's
  half-precision instruction. For few tokens the weights therefore come first (`swap`): the transposed tile is computed.

Names: M tokens, N output channels, K input channels; BLOCK = 128 of them share a scale.
"""

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.gpu import tiles
from ops.gpu.casts import SCALE_BLOCK, cast, dot_operand
from ops.gpu.device import architecture, fp8_dtype, kernel_view
from ops.gpu.tiles import Tile

SUMS = 1024  # numbers to a sum_splits program


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def multiply_rows(
    x_ptr, x_s_ptr, x_row, w_ptr, w_s_ptr, w_row, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Rows x_row (BLOCK_M,) of x (…, K) times rows w_row (BLOCK_N,) of w (…, K) transposed: float32 (BLOCK_M, BLOCK_N),
    or with SWAP (BLOCK_N, BLOCK_M). The inner loop of the dense and of the grouped GEMM.

    FP8 by FP8, whose 128-channel products are promoted to float32 (W8A8); bfloat16 by FP8 widened in the loop where
    x_s_ptr is None (W8A16); bfloat16 or float32 by the same where w_s_ptr is None too. x_s_ptr: scales of x
    (…, K blocks), w_s_ptr: the row of block scales that all of w_row have. With SPLIT the grid's second axis cuts K in
    parts, and this is the sum of the program's own part. Channels past the end are zeros.
    """
    FP8: tl.constexpr = x_s_ptr is not None
    SCALED: tl.constexpr = w_s_ptr is not None
    k = tl.arange(0, SCALE_BLOCK)
    k_blocks = tl.cdiv(K, SCALE_BLOCK)  # in a row, that is; `blocks` are this program's, `channels` as far as the end
    blocks, channels = k_blocks, K
    if SPLIT:
        per_part = tl.cdiv(k_blocks, tl.num_programs(1))
        first = tl.program_id(1) * per_part
        blocks = tl.minimum(per_part, k_blocks - first)  # below 1 where earlier parts took them all
        channels -= first * SCALE_BLOCK
        x_ptr += first * SCALE_BLOCK
        w_ptr += first * SCALE_BLOCK
        if SCALED:
            w_s_ptr += first
        if FP8:
            x_s_ptr += first
    x_ptrs = x_ptr + x_row[:, None] * K + k[None, :]
    w_ptrs = w_ptr + w_row[:, None] * K + k[None, :]
    if FP8:
        x_s_ptrs = x_s_ptr + x_row * k_blocks

    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(0, blocks, num_stages=STAGES):  # said here, not at the launch, it holds for the scales too
        inside = (k < channels - i * SCALE_BLOCK)[None, :]
        x, w = tl.load(x_ptrs, mask=inside, other=0.0), tl.load(w_ptrs, mask=inside, other=0.0)
        if w.dtype != tl.float32:
            x, w = dot_operand(x, FP8), dot_operand(w, FP8)
        if SCALED:
            scale = tl.load(w_s_ptr + i)
            if FP8:
                scale = tl.load(x_s_ptrs + i) * scale
                scale = scale[None, :] if SWAP else scale[:, None]
            acc += (tl.dot(w, x.T) if SWAP else tl.dot(x, w.T)) * scale
        else:
            if SWAP:
                acc = tl.dot(w, x.T, acc, input_precision="ieee")
            else:
                acc = tl.dot(x, w.T, acc, input_precision="ieee")
        x_ptrs += SCALE_BLOCK
        w_ptrs += SCALE_BLOCK
    return acc


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr, x_s_ptr, w_ptr, w_s_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) times w (N, K) transposed; FP8 by FP8, or bfloat16 by FP8 where x_s_ptr is None.

    See reference.fp8_gemm and reference.w8a16_gemm. With SPLIT out (parts, M, N) takes the sum of each part of K, and
    sum_splits_kernel does the rest. Rows past the end repeat the last one and are not stored.
    """
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    # Programs that run together share GROUP_M row tiles, so that both operands stay in the L2 cache.
    pid_m, pid_n = tl.swizzle2d(pid // n_tiles, pid % n_tiles, m_tiles, n_tiles, GROUP_M)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = tl.minimum(m, M - 1).to(tl.int64)
    w_row = tl.minimum(n, N - 1).to(tl.int64)
    w_s_ptr += (pid_n * BLOCK_N // SCALE_BLOCK) * tl.cdiv(K, SCALE_BLOCK)  # BLOCK_N divides 128: one scale to a tile
    acc = multiply_rows(
        x_ptr, x_s_ptr, x_row, w_ptr, w_s_ptr, w_row, K, BLOCK_M, BLOCK_N, STAGES, SWAP, SPLIT
    )  # fmt: skip

    out = cast(acc, out_ptr.dtype.element_ty)
    if SPLIT:
        out_ptr += tl.program_id(1).to(tl.int64) * M * N
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptrs, out.T if SWAP else out, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def sum_splits_kernel(parts_ptr, out_ptr, M, N, PARTS: tl.constexpr, SUMS: tl.constexpr):
    """out (M, N) = the sum of parts (PARTS, M, N) float32, added in their order, whichever was ready first."""
    at = tl.program_id(0).to(tl.int64) * SUMS + tl.arange(0, SUMS)
    size = M.to(tl.int64) * N
    total = tl.load(parts_ptr + at, mask=at < size, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts_ptr + part * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, cast(total, out_ptr.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["M"])
def gemm_persistent_kernel(
    x_ptr, x_s_ptr, w_ptr, w_s_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    """fp8_gemm for many tokens: each program computes tile after tile, and the tensor memory accelerator copies.

    That wants rows of all three matrices to begin at multiples of 16 bytes. It reads zeros past the ends and writes
    nothing there. Descriptors are made here, not by the host: only these can Hopper's warp specialisation halve.
    """
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    k_blocks = tl.cdiv(K, SCALE_BLOCK)
    x_rows = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BLOCK_M, SCALE_BLOCK])
    w_rows = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BLOCK_N, SCALE_BLOCK])
    out_rows = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0), flatten=not SPECIALISED):
        pid_m, pid_n = tl.swizzle2d(tile // n_tiles, tile % n_tiles, m_tiles, n_tiles, GROUP_M)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        m_read = tl.minimum(m + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
        x_s_ptrs = x_s_ptr + m_read * k_blocks
        w_s_ptrs = w_s_ptr + (n // SCALE_BLOCK) * k_blocks  # BLOCK_N divides 128: one scale to a tile
        if SPECIALISED:
            scale = tl.load(x_s_ptrs) * tl.load(w_s_ptrs)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.range(0, k_blocks, num_stages=STAGES, warp_specialize=SPECIALISED):
            x = dot_operand(x_rows.load([m, i * SCALE_BLOCK]), True)
            w = dot_operand(w_rows.load([n, i * SCALE_BLOCK]), True)
            if SPECIALISED:  # the warps that multiply have no pipeline: they ask for the next scales beforehand
                ahead = tl.minimum(i + 1, k_blocks - 1)
                next_scale = tl.load(x_s_ptrs + ahead) * tl.load(w_s_ptrs + ahead)
                acc += tl.dot(x, w.T) * scale[:, None]
                scale = next_scale
            else:
                acc += tl.dot(x, w.T) * (tl.load(x_s_ptrs + i) * tl.load(w_s_ptrs + i))[:, None]
        out_rows.store([m, n], cast(acc, out_ptr.dtype.element_ty))


# --------------------------------------------------------------------------------------------------------------------
# The ops. Tensors are contiguous and on the current device.
# --------------------------------------------------------------------------------------------------------------------


def fp8_gemm(
    a: torch.Tensor,
    a_s: torch.Tensor,
    b: torch.Tensor,
    b_s: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    as_for: int | None = None,
) -> torch.Tensor:
    """As reference.fp8_gemm; a and b in the FP8 type of the device. `as_for`: by the tile for so many rows, whatever
    their number, so that a row's bits do not depend on it."""
    assert a.dtype == b.dtype == fp8_dtype(a.device), f"{a.dtype} by {b.dtype} on a device of {fp8_dtype(a.device)}"
    return gemm(a, a_s, b, b_s, out_dtype, _choose("fp8_gemm", a, b, as_for))


def w8a16_gemm(
    x: torch.Tensor,
    b: torch.Tensor,
    b_s: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    as_for: int | None = None,
) -> torch.Tensor:
    """As reference.w8a16_gemm, for bfloat16 x and float8_e4m3fn b; `as_for` as in fp8_gemm."""
    assert x.dtype == torch.bfloat16 and b.dtype == torch.float8_e4m3fn, (x.dtype, b.dtype)
    return gemm(x, None, b, b_s, out_dtype or x.dtype, _choose("w8a16_gemm", x, b, as_for))


def _choose(op: str, x: torch.Tensor, w: torch.Tensor, rows: int | None) -> Tile:
    n, k = w.shape
    return tiles.choose(op, architecture(x.device), n, k, rows or len(x))


def gemm(
    x: torch.Tensor,
    x_s: torch.Tensor | None,
    w: torch.Tensor,
    w_s: torch.Tensor,
    out_dtype: torch.dtype,
    tile: Tile,
) -> torch.Tensor:
    """fp8_gemm, or without x_s w8a16_gemm, by a tile of the caller's choice.

    With one and the same tile a row of the result does not depend, to the bit, on the other rows. A persistent tile
    gives way to a plain one where rows do not begin at multiples of 16 bytes.
    """
    (m, k), n = x.shape, w.shape[0]
    assert w.shape == (n, k) and w_s.shape == (triton.cdiv(n, BLOCK_SIZE), triton.cdiv(k, BLOCK_SIZE)), (
        w.shape,
        w_s.shape,
    )
    assert x_s is None or x_s.shape == (m, triton.cdiv(k, BLOCK_SIZE)), x_s.shape
    assert all(t is None or t.is_contiguous() for t in (x, x_s, w, w_s))
    out = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    if tile.persistent and not all(_in_sixteens(t) for t in (x, w, out)):
        tile = tiles.plain("fp8_gemm", architecture(x.device))
    constexprs, count = tile.constexprs() | tile.options(), tile.count(m, n)
    x, w = x if x_s is None else kernel_view(x), kernel_view(w)
    if tile.persistent:
        assert x_s is not None and not tile.swap and tile.split == 1, tile
        programs = min(count, tile.persistent * tiles.SM_COUNT[architecture(x.device)])
        device = out.device  # not a tensor's own name in there: the function stays, and would keep it alive
        # Triton asks for the memory its programs' descriptors lie in, 128 bytes each.
        triton.set_allocator(lambda size, _align, _stream: torch.empty(size, dtype=torch.uint8, device=device))
        gemm_persistent_kernel[(programs,)](x, x_s, w, w_s, out, m, n, k, **constexprs)
    elif tile.split == 1:
        gemm_kernel[(count,)](x, x_s, w, w_s, out, m, n, k, **constexprs)
    else:
        parts = torch.empty(tile.split, m, n, dtype=torch.float32, device=x.device)
        gemm_kernel[(count, tile.split)](x, x_s, w, w_s, parts, m, n, k, **constexprs)
        sum_splits_kernel[(triton.cdiv(m * n, SUMS),)](parts, out, m, n, PARTS=tile.split, SUMS=SUMS)
    return out


def _in_sixteens(t: torch.Tensor) -> bool:
    """Whether all rows of a contiguous matrix begin at multiples of 16 bytes."""
    return t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0

"""The GEMMs by weights of 8 and 4 bits in Triton, as reference.py specifies them: fp8_gemm (W8A8), w8a16_gemm and
w4a16_gemm.

Two things shape this file.

- Every choice of tile comes from tiles.py, keyed on the architecture, on N, K and a bucket of M, the number of tokens.
  Nothing is tuned at start-up.
- Hopper's FP8 tensor core wants at least 64 rows in its first operand; with fewer, Triton falls back to Ampere's
  half-precision instruction. For few tokens the weights therefore come first (`swap`): the transposed tile is computed.

Names: M tokens, N output channels, K input channels; 128 x 128 weights share a scale, or GROUP channels of a row.
"""

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from core.quantization_config import GROUP_SIZES
from ops.formats import PartialSums, Quantised, Weight
from ops.gpu import pdl, tiles
from ops.gpu.casts import SCALE_BLOCK, cast, dot_operand
from ops.gpu.device import architecture, fp8_dtype, kernel_view
from ops.gpu.multiply import multiply_rows
from ops.gpu.pdl import wait_for_previous
from ops.gpu.tiles import Tile
from ops.reference import BLOCK

SUMS = 1024  # numbers to a sum_splits program


# --------------------------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr, x_s_ptr, w_ptr, w_s_ptr, w_z_ptr, out_ptr, M, N, K, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) times w (N, K) transposed; FP8 by FP8, or bfloat16 by 8 or 4 bits where x_s_ptr is None.

    See reference.fp8_gemm, w8a16_gemm and w4a16_gemm. With SPLIT out (parts, M, N) takes the sum of each part of K, and
    sum_splits_kernel or the op that takes them does the rest. Rows past the end repeat the last one and are not stored.
    """
    wait_for_previous()
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    # Programs that run together share GROUP_M row tiles, so that both operands stay in the L2 cache.
    pid_m, pid_n = tl.swizzle2d(pid // n_tiles, pid % n_tiles, m_tiles, n_tiles, GROUP_M)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = tl.minimum(m, M - 1).to(tl.int64)
    w_row = tl.minimum(n, N - 1).to(tl.int64)
    if not GROUP:  # BLOCK_N divides 128: one scale to a tile
        w_s_ptr += (pid_n * BLOCK_N // SCALE_BLOCK) * tl.cdiv(K, SCALE_BLOCK)
    acc = multiply_rows(
        x_ptr, x_s_ptr, x_row, w_ptr, w_s_ptr, w_z_ptr, w_row, n, N, K, GROUP, BLOCK_M, BLOCK_N, STAGES, SWAP, SPLIT
    )  # fmt: skip

    out = cast(acc, out_ptr.dtype.element_ty)
    if SPLIT:
        out_ptr += tl.program_id(1).to(tl.int64) * M * N
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptrs, out.T if SWAP else out, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def sum_splits_kernel(parts_ptr, out_ptr, M, N, PARTS: tl.constexpr, SUMS: tl.constexpr):
    """out (M, N) = the sum of parts (PARTS, M, N) float32, added in their order, whichever was ready first."""
    wait_for_previous()
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
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """As reference.w8a16_gemm, for bfloat16 x and a block that `serves` takes; `as_for` as in fp8_gemm."""
    assert x.dtype == torch.bfloat16 and b.dtype in (torch.float8_e4m3fn, torch.int8), (x.dtype, b.dtype)
    tile = _choose("w8a16_gemm" if block == BLOCK else "w4a16_gemm", x, b, as_for)
    return gemm(x, None, b, b_s, out_dtype or x.dtype, tile, block)


def w4a16_gemm(
    x: torch.Tensor,
    b: torch.Tensor,
    b_s: torch.Tensor,
    zero: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    as_for: int | None = None,
) -> torch.Tensor:
    """As reference.w4a16_gemm, for bfloat16 x and b (N, K/8) as `interleave` made it; `as_for` as in fp8_gemm."""
    assert x.dtype == torch.bfloat16 and b.dtype == torch.int32, (x.dtype, b.dtype)
    tile = _choose("w4a16_gemm", x, b, as_for)
    return gemm(x, None, b, b_s, out_dtype or x.dtype, tile, (1, x.shape[1] // b_s.shape[1]), zero)


def serves(k: int, block: tuple[int, int]) -> bool:
    """Whether the kernels multiply by quantised weights (N, K) whose blocks (rows, columns) have scales."""
    return block == BLOCK or (block[0] == 1 and block[1] in GROUP_SIZES and k % block[1] == 0)


def _choose(op: str, x: torch.Tensor, w: torch.Tensor, rows: int | None) -> Tile:
    return tiles.choose(op, architecture(x.device), len(w), x.shape[1], rows or len(x))


def partial_linear(x: torch.Tensor | Quantised, w: Weight, as_for: int | None = None) -> torch.Tensor | PartialSums:
    """x (T, K) by a quantised weight, of W8A8 if x is Quantised; partial sums where the tile splits K."""
    values, scales, dtype = (x.q, x.s, x.dtype) if isinstance(x, Quantised) else (x, None, x.dtype)
    assert w.scale is not None and (scales is None) == (w.fp8 is None)
    op = "fp8_gemm" if w.fp8 else "w8a16_gemm" if w.block == BLOCK else "w4a16_gemm"
    tile = _choose(op, values, w.data, as_for)
    return partial_gemm(values, scales, w.data, w.scale, dtype, tile, w.block, w.zero)


def gemm(
    x: torch.Tensor,
    x_s: torch.Tensor | None,
    w: torch.Tensor,
    w_s: torch.Tensor,
    out_dtype: torch.dtype,
    tile: Tile,
    block: tuple[int, int] = BLOCK,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """partial_gemm, summed."""
    return summed(partial_gemm(x, x_s, w, w_s, out_dtype, tile, block, zero))


def partial_gemm(
    x: torch.Tensor,
    x_s: torch.Tensor | None,
    w: torch.Tensor,
    w_s: torch.Tensor,
    out_dtype: torch.dtype,
    tile: Tile,
    block: tuple[int, int] = BLOCK,
    zero: torch.Tensor | None = None,
) -> torch.Tensor | PartialSums:
    """fp8_gemm, or without x_s w8a16_gemm, or by int32 w w4a16_gemm, by a tile of the caller's choice; partial sums
    where that splits K.

    With one and the same tile a row of the result does not depend, to the bit, on the other rows. A persistent tile
    gives way to a plain one where rows do not begin at multiples of 16 bytes.
    """
    (m, k), n = x.shape, w.shape[0]
    assert x_s is None or x_s.shape == (m, triton.cdiv(k, BLOCK_SIZE)), x_s.shape
    assert all(t is None or t.is_contiguous() for t in (x, x_s, w))
    *w_scales, group = weight_scales(k, w, w_s, block, zero)
    if tile.split > 1 and m:
        assert not tile.persistent
        parts = torch.empty(tile.split, m, n, dtype=torch.float32, device=x.device)
        gemm_kernel[(tile.count(m, n), tile.split)](
            x if x_s is None else kernel_view(x), x_s, kernel_view(w), *w_scales, parts, m, n, k,
            GROUP=group, **tile.constexprs(), **tile.options(), **pdl.options(architecture(x.device)),
        )  # fmt: skip
        return PartialSums(parts, out_dtype)
    out = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    if tile.persistent and not all(in_sixteens(t) for t in (x, w, out)):
        tile = tiles.plain("fp8_gemm", architecture(x.device))
    constexprs, count = tile.constexprs() | tile.options(), tile.count(m, n)
    x, w = x if x_s is None else kernel_view(x), kernel_view(w)
    if tile.persistent:
        assert x_s is not None and not tile.swap, tile
        programs = min(count, tile.persistent * tiles.SM_COUNT[architecture(x.device)])
        allow_descriptors(out.device)
        gemm_persistent_kernel[(programs,)](x, x_s, w, w_s, out, m, n, k, **constexprs)
    else:
        constexprs |= pdl.options(architecture(x.device))
        gemm_kernel[(count,)](x, x_s, w, *w_scales, out, m, n, k, GROUP=group, **constexprs)
    return out


def summed(y: torch.Tensor | PartialSums) -> torch.Tensor:
    """As reference.summed."""
    if isinstance(y, torch.Tensor):
        return y
    parts, m, n = y.parts.shape
    assert y.parts.is_contiguous()
    out = torch.empty(m, n, dtype=y.dtype, device=y.parts.device)
    sum_splits_kernel[(triton.cdiv(m * n, SUMS),)](
        y.parts, out, m, n, PARTS=parts, SUMS=SUMS, **pdl.options(architecture(out.device))
    )
    return out


def weight_scales(
    k: int, w: torch.Tensor, s: torch.Tensor, block: tuple[int, int], zero: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Scales and zero points of w (…, N, K), or INT4 (…, N, K/8), as multiply_rows reads them, and its GROUP."""
    n, stored = w.shape[-2:]
    expected = (*w.shape[:-2], triton.cdiv(n, block[0]), triton.cdiv(k, block[1]))
    assert serves(k, block) and stored * (8 if w.dtype == torch.int32 else 1) == k, (w.shape, w.dtype, k, block)
    assert s.shape == expected and (zero is None or zero.shape == expected), (w.shape, s.shape)
    if block[0] != 1:
        assert s.is_contiguous() and zero is None
        return s, None, 0
    # What by_groups has put in order is contiguous already.
    return s.mT.contiguous(), None if zero is None else zero.mT.contiguous(), block[1]


def allow_descriptors(device: torch.device) -> None:
    """Before a launch of a kernel that makes descriptors: Triton asks for the memory they lie in, 128 bytes to each."""
    triton.set_allocator(lambda size, _align, _stream: torch.empty(size, dtype=torch.uint8, device=device))


def in_sixteens(t: torch.Tensor) -> bool:
    """Whether all rows of contiguous matrices begin at multiples of 16 bytes."""
    return t.data_ptr() % 16 == 0 and t.shape[-1] * t.element_size() % 16 == 0

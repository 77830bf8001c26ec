"""The quantised ops in Triton, as reference.py specifies them: act_quant, weight_dequant, fp8_gemm (W8A8), w8a16_gemm.

Three things shape this file.

- Every choice of tile comes from tiles.py, keyed on the architecture, on N, K and a bucket of M, the number of tokens.
  Nothing is tuned at start-up, and `configurations()` lists all there is to compile.
- Not every target can convert e4m3: sm_80 has no such type, gfx942 has another one, and Triton's interpreter rounds
  wrongly. There the tensors are passed as bytes and converted by `widen_e4m3` and `round_e4m3`, with integers.
- Hopper's FP8 tensor core wants at least 64 rows in its first operand; with fewer, Triton falls back to Ampere's
  half-precision instruction. For few tokens the weights therefore come first (`swap`): the transposed tile is computed.

Names: M tokens, N output channels, K input channels; BLOCK = 128 of them share a scale.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from core.errors import UserError
from ops.gpu import tiles
from ops.gpu.tiles import W8A8 as W8A8
from ops.gpu.tiles import W8A16 as W8A16
from ops.gpu.tiles import Tile as Tile
from ops.gpu.tiles import tile_for as tile_for

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
SCALE_BLOCK = tl.constexpr(BLOCK_SIZE)
TWO_TO_120 = tl.constexpr(2.0**120)


# --------------------------------------------------------------------------------------------------------------------
# Casts
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def widen_e4m3(byte):
    """e4m3fn bytes (uint8) to float32, exactly: subnormals, both zeros and both NaNs included.

    Sign, exponent and mantissa are put in a float32's places; what is left is the difference of the biases, 127 - 7,
    and a multiplication by 2**120 makes it up, for subnormals too.
    """
    word = byte.to(tl.int8, bitcast=True).to(tl.int32) << 24
    value = ((word >> 4) & -0x78100000).to(tl.float32, bitcast=True) * TWO_TO_120
    return tl.where((word & 0x7F000000) == 0x7F000000, float("nan"), value)


@triton.jit
def round_e4m3(x, FNUZ: tl.constexpr = False):
    """float32 to e4m3fn bytes (uint8): nearest, ties to even; beyond the largest number, that number; NaN stays NaN.

    With FNUZ to e4m3fnuz: the same bits mean half the value, zero has no sign and NaN is 0x80.
    """
    bits = (x * 2 if FNUZ else x).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Keep 3 of the 23 bits of mantissa: add half a unit, less one bit if the last kept bit is 0, and drop the rest.
    normal = ((magnitude + 0x0007FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2**-6 the unit is 2**-9, which is what the last bit of 2**14 is worth: this addition rounds to it.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    code = tl.minimum(code, 0x7F if FNUZ else 0x7E)
    sign = (bits >> 24) & 0x80
    if FNUZ:
        code = tl.where(magnitude > 0x7F800000, 0x80, tl.where(code == 0, 0, code | sign))
    else:
        code = tl.where(magnitude > 0x7F800000, 0x7F, code) | sign
    return code.to(tl.uint8)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 to dtype, to the nearest, ties to even (the interpreter by itself would cut a bfloat16 short)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def round_up_to_power_of_two(s):
    """The least power of two >= s, for positive normal float32 s; infinities and NaNs stay what they are."""
    bits = s.to(tl.int32, bitcast=True)
    return tl.where(bits < 0x7F800000, (bits + 0x007FFFFF) & 0x7F800000, bits).to(tl.float32, bitcast=True)


# --------------------------------------------------------------------------------------------------------------------
# Quantising activations, dequantising weights
# --------------------------------------------------------------------------------------------------------------------

GROUPS = 8  # blocks of 128 channels to an act_quant program
DEQUANT_ROWS = 64  # rows to a weight_dequant program
SUMS = 1024  # numbers to a sum_splits program


@triton.jit(do_not_specialize=["M"])
def act_quant_kernel(
    x_ptr, q_ptr, s_ptr, M, K, GROUPS: tl.constexpr, BLOCK: tl.constexpr, UE8M0: tl.constexpr, FNUZ: tl.constexpr
):
    """GROUPS blocks of BLOCK channels, numbered along the tokens' rows. See reference.act_quant."""
    blocks_per_row = tl.cdiv(K, BLOCK)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    row = group // blocks_per_row
    channel = ((group % blocks_per_row) * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = (row < M)[:, None] & (channel < K)
    offset = row.to(tl.int64)[:, None] * K + channel
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)

    # The order of positive floats is the order of their bits, where NaN comes last: unlike a float maximum this keeps
    # it. 0x38D1B717 is 1e-4.
    amax = tl.maximum(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), 0x38D1B717)
    s = tl.div_rn(amax.to(tl.float32, bitcast=True), 240.0 if FNUZ else 448.0)
    if UE8M0:
        s = round_up_to_power_of_two(s)
    y = tl.div_rn(x, tl.broadcast_to(s[:, None], x.shape))
    if q_ptr.dtype.element_ty == tl.uint8:
        q = round_e4m3(y, FNUZ)
    else:
        q = y.to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + offset, q, mask=inside)
    tl.store(s_ptr + group, s, mask=row < M)


@triton.jit
def weight_dequant_kernel(w_ptr, s_ptr, out_ptr, N, K, ROWS: tl.constexpr):
    """ROWS x 128 weights of one expert, all under one scale. See reference.weight_dequant."""
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)
    inside = (row < N)[:, None] & (channel < K)[None, :]
    offset = (expert * N + row)[:, None] * K + channel[None, :]
    s_row = expert * tl.cdiv(N, SCALE_BLOCK) + tl.program_id(1) * ROWS // SCALE_BLOCK
    s = tl.load(s_ptr + s_row * tl.cdiv(K, SCALE_BLOCK) + tl.program_id(0))
    w = tl.load(w_ptr + offset, mask=inside, other=0.0)
    w = widen_e4m3(w) if w.dtype == tl.uint8 else w.to(tl.float32)
    tl.store(out_ptr + offset, cast(w * s, out_ptr.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------------------------------
# The two GEMMs
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def dot_operand(tile, FP8: tl.constexpr):
    """A tile as the tensor core takes it: as it is in a product of FP8 by FP8, otherwise as bfloat16."""
    if tile.dtype == tl.uint8:
        tile = widen_e4m3(tile)
    if INTERPRETED:  # its products of anything but float32 are wrong
        return tile.to(tl.float32)
    else:
        return tile if FP8 else tile.to(tl.bfloat16)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr, x_s_ptr, w_ptr, w_s_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) times w (N, K) transposed; FP8 by FP8, or bfloat16 by FP8 where x_s_ptr is None.

    See reference.fp8_gemm and reference.w8a16_gemm. With SPLIT the grid's second axis cuts K in parts,
    out (parts, M, N) takes the sum of each, and sum_splits_kernel does the rest. Rows past the end repeat the last one
    and are not stored; channels past the end are zeros.
    """
    FP8: tl.constexpr = x_s_ptr is not None
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    # Programs that run together share GROUP_M row tiles, so that both operands stay in the L2 cache.
    pid_m, pid_n = tl.swizzle2d(pid // n_tiles, pid % n_tiles, m_tiles, n_tiles, GROUP_M)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, SCALE_BLOCK)
    m_read = tl.minimum(m, M - 1).to(tl.int64)
    n_read = tl.minimum(n, N - 1).to(tl.int64)

    k_blocks = tl.cdiv(K, SCALE_BLOCK)  # in a row, that is; `blocks` are this program's, `channels` as far as the end
    blocks, channels = k_blocks, K
    w_s_ptr += (pid_n * BLOCK_N // SCALE_BLOCK) * k_blocks  # BLOCK_N divides 128: one scale to a tile
    if SPLIT:
        per_part = tl.cdiv(k_blocks, tl.num_programs(1))
        first = tl.program_id(1) * per_part
        blocks = tl.minimum(per_part, k_blocks - first)  # below 1 where earlier parts took them all
        channels -= first * SCALE_BLOCK
        x_ptr += first * SCALE_BLOCK
        w_ptr += first * SCALE_BLOCK
        w_s_ptr += first
        if FP8:
            x_s_ptr += first
    x_ptrs = x_ptr + m_read[:, None] * K + k[None, :]
    w_ptrs = w_ptr + n_read[:, None] * K + k[None, :]
    if FP8:
        x_s_ptrs = x_s_ptr + m_read * k_blocks

    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(0, blocks, num_stages=STAGES):  # said here, not at the launch, it holds for the scales too
        inside = (k < channels - i * SCALE_BLOCK)[None, :]
        x = dot_operand(tl.load(x_ptrs, mask=inside, other=0.0), FP8)
        w = dot_operand(tl.load(w_ptrs, mask=inside, other=0.0), FP8)
        scale = tl.load(w_s_ptr + i)
        if FP8:
            scale = tl.load(x_s_ptrs + i) * scale
            scale = scale[None, :] if SWAP else scale[:, None]
        acc += (tl.dot(w, x.T) if SWAP else tl.dot(x, w.T)) * scale
        x_ptrs += SCALE_BLOCK
        w_ptrs += SCALE_BLOCK

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
# Devices
# --------------------------------------------------------------------------------------------------------------------


@cache
def architecture(device: torch.device) -> str:
    """The row of the tables that serves a device; "sm_90" for a CPU, that is for the interpreter.

    Raises UserError for a GPU that no row serves.
    """
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip:
        found = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        if major in (9, 10):
            found = f"sm_{major}0"
        elif (major, minor) >= (8, 9):
            found = "sm_89"  # and consumer Blackwell, sm_120, which has no more shared memory
        else:
            found = "sm_80" if major == 8 else f"sm_{major}{minor}"
    if found not in W8A16:
        raise UserError(
            f"{torch.cuda.get_device_name(device)} ({found}) is none of the GPUs served: {', '.join(W8A16)}"
        )
    return found


def has_fp8(device: torch.device) -> bool:
    """Whether the device has FP8 tensor cores, and fp8_gemm a table for them."""
    return architecture(device) in W8A8


def fp8_dtype(device: torch.device) -> torch.dtype:
    """The FP8 type that the device multiplies; weights for float8_e4m3fnuz must go through reference.to_fnuz."""
    return torch.float8_e4m3fnuz if architecture(device) == "gfx942" else torch.float8_e4m3fn


def _converts(dtype: torch.dtype, arch: str) -> bool:
    """Whether compiled code can convert to and from an FP8 type by itself; otherwise it gets the bytes."""
    if dtype == torch.float8_e4m3fnuz:
        return arch == "gfx942"
    return arch not in ("sm_80", "gfx942")  # gfx942 could, in thousands of instructions


def _view(t: torch.Tensor) -> torch.Tensor:
    """An FP8 tensor as the kernels take it: itself where the target can convert it, or its bytes."""
    if INTERPRETED.value or not _converts(t.dtype, architecture(t.device)):
        return t.view(torch.uint8)
    return t


# --------------------------------------------------------------------------------------------------------------------
# The ops. Tensors are contiguous and on the current device.
# --------------------------------------------------------------------------------------------------------------------


def act_quant(
    x: torch.Tensor, block_size: int = BLOCK_SIZE, scale_fmt: str | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.act_quant, in the FP8 type of the device unless dtype says another. block_size: a power of two."""
    assert scale_fmt in (None, "ue8m0"), scale_fmt
    x = x.contiguous()
    dtype = dtype or fp8_dtype(x.device)
    k = x.shape[-1]
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    s = torch.empty(*x.shape[:-1], triton.cdiv(k, block_size), dtype=torch.float32, device=x.device)
    if x.numel():
        act_quant_kernel[(triton.cdiv(s.numel(), GROUPS),)](
            x, _view(q), s, x.numel() // k, k,
            GROUPS=GROUPS, BLOCK=block_size, UE8M0=scale_fmt == "ue8m0", FNUZ=dtype == torch.float8_e4m3fnuz,
        )  # fmt: skip
    return q, s


def weight_dequant(w: torch.Tensor, s: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """As reference.weight_dequant, for w (N, K) or (E, N, K)."""
    n, k = w.shape[-2:]
    assert w.dim() in (2, 3) and w.is_contiguous() and s.is_contiguous()
    assert s.shape == (*w.shape[:-2], triton.cdiv(n, BLOCK_SIZE), triton.cdiv(k, BLOCK_SIZE)), (w.shape, s.shape)
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    if w.numel():
        grid = (triton.cdiv(k, BLOCK_SIZE), triton.cdiv(n, DEQUANT_ROWS), w.numel() // (n * k))
        weight_dequant_kernel[grid](_view(w), s, out, n, k, ROWS=DEQUANT_ROWS)
    return out


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
    x, w = x if x_s is None else _view(x), _view(w)
    if tile.persistent:
        assert x_s is not None and not tile.swap and tile.split == 1, tile
        programs = min(count, tile.persistent * tiles.PROCESSORS[architecture(x.device)])
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


# --------------------------------------------------------------------------------------------------------------------
# What there is to compile
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """One compilation that a launch in this file asks for."""

    name: str
    kernel: Any  # the @triton.jit function
    target: str  # a key of the tables
    types: dict[str, str]  # Triton's type of each run-time argument; pointers, N and K are multiples of 16
    constexprs: dict[str, Any]
    options: dict[str, int]  # num_warps and the like; what is not there is Triton's default


def _native(target: str) -> str:
    """Triton's type of pointers to the FP8 numbers that a target multiplies, or would."""
    return {"sm_80": "*u8", "gfx942": "*fp8e4b8"}.get(target, "*fp8e4nv")


def _e4m3(target: str) -> str:
    """Triton's type of pointers to float8_e4m3fn."""
    return "*fp8e4nv" if _converts(torch.float8_e4m3fn, target) else "*u8"


def configurations() -> Iterator[Configuration]:
    """Every kernel, as it is compiled for aligned sizes on each architecture of the tables."""
    scale, out = "*fp32", "*bf16"
    for target in W8A16:
        for ue8m0 in (False, True):
            yield Configuration(
                f"act_quant {target} {'ue8m0' if ue8m0 else 'float32'}",
                act_quant_kernel,
                target,
                {"x_ptr": out, "q_ptr": _native(target), "s_ptr": scale, "M": "i32", "K": "i32"},
                {"GROUPS": GROUPS, "BLOCK": BLOCK_SIZE, "UE8M0": ue8m0, "FNUZ": target == "gfx942"},
                {},
            )
        yield Configuration(
            f"weight_dequant {target}",
            weight_dequant_kernel,
            target,
            {"w_ptr": _e4m3(target), "s_ptr": scale, "out_ptr": out, "N": "i32", "K": "i32"},
            {"ROWS": DEQUANT_ROWS},
            {},
        )
        for split in tiles.SPLITS[1:]:
            yield Configuration(
                f"sum_splits {target} {split}",
                sum_splits_kernel,
                target,
                {"parts_ptr": scale, "out_ptr": out, "M": "i32", "N": "i32"},
                {"PARTS": split, "SUMS": SUMS},
                {},
            )
    gemms = [gemm_configuration(*reached) for reached in tiles.reachable()]
    yield from {c.name: c for c in gemms}.values()  # a tile can serve several buckets, and any number of parts


def gemm_configuration(op: str, target: str, tile: Tile) -> Configuration:
    """What `gemm` asks for with a tile: where it splits K, that is partial sums, otherwise bfloat16."""
    x, w = (_native(target), _native(target)) if op == "fp8_gemm" else ("*bf16", _e4m3(target))
    types = {"x_ptr": x, "w_ptr": w, "w_s_ptr": "*fp32", "out_ptr": "*fp32" if tile.split > 1 else "*bf16"}
    types |= {"M": "i32", "N": "i32", "K": "i32"}
    scale = {"x_s_ptr": "*fp32"} if op == "fp8_gemm" else {}
    return Configuration(
        f"{op} {target} {tile}",
        gemm_persistent_kernel if tile.persistent else gemm_kernel,
        target,
        types | scale,
        tile.constexprs() | ({} if scale else {"x_s_ptr": None}),
        tile.options(),
    )

"""Row-wise ops in Triton that are several in torch, one launch each: norm, silu_mul, latent_write. See reference.py.

With one token on the way a launch costs more than the bytes it moves, so what stands between two products is one
kernel: the residual add, the norm and the quantisation; SiLU, the product and the quantisation; the latent's norm,
both rotations and the cache write. Every value is rounded where the composed ops round it, and FP8 is made from the
rounded value, so a fused op gives the composed ops' bits, but for the order in which a row's squares are added up and
for the last bit of an exponential.

Tiles are (…, 128): one scale to a line.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.formats import Quantised, Scales, packed_latent_bytes
from ops.gpu.casts import SCALE_BLOCK, cast, quantise
from ops.gpu.device import fp8_dtype, kernel_view


@triton.jit
def rms_norm(x, weight, H, eps):
    """float32 x (rows, groups, 128), zero past its H channels, divided by its root mean square, times the weight."""
    mean = tl.div_rn(tl.sum(tl.sum(x * x, axis=2), axis=1), H.to(tl.float32))
    r = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    return x * r[:, None, None] * weight


@triton.jit
def rotate(x, cos, sin):
    """float32 pairs (…, 2), each turned by its angle."""
    a, b = tl.split(x)
    return tl.join(a * cos - b * sin, a * sin + b * cos)


# --------------------------------------------------------------------------------------------------------------------
# Residual add, RMSNorm, quantisation
# --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def norm_kernel(
    x_ptr, delta_ptr, weight_ptr, total_ptr, y_ptr, q_ptr, s_ptr, M, H, x_stride, eps,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, UE8M0: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """ROWS tokens, whole. What is None is left out: delta_ptr and total_ptr together, q_ptr and s_ptr together."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.arange(0, GROUPS)
    channel = group[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    inside = (row < M)[:, None, None] & (channel < H)[None, :, :]
    wide_row = row.to(tl.int64)[:, None, None]
    offset = wide_row * H + channel[None, :, :]

    x = tl.load(x_ptr + wide_row * x_stride + channel[None, :, :], mask=inside, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        x = cast(x + tl.load(delta_ptr + offset, mask=inside, other=0.0).to(tl.float32), total_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, x, mask=inside)
        x = x.to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < H, other=0.0).to(tl.float32)
    y = cast(rms_norm(x, weight[None, :, :], H, eps), x_ptr.dtype.element_ty)
    if y_ptr is not None:
        tl.store(y_ptr + offset, y, mask=inside)
    if q_ptr is not None:
        q, s = quantise(y.to(tl.float32), q_ptr.dtype.element_ty, UE8M0, FNUZ)
        tl.store(q_ptr + offset, q, mask=inside)
        blocks = tl.cdiv(H, SCALE_BLOCK)
        s_ptrs = s_ptr + row.to(tl.int64)[:, None] * blocks + group[None, :]
        tl.store(s_ptrs, s, mask=(row < M)[:, None] & (group < blocks)[None, :])


def norm_tile(h: int) -> tuple[dict[str, int], dict[str, int]]:
    """Rows and groups of a norm program, and its warps: about 16 channels to a thread, narrow rows several together."""
    groups = triton.next_power_of_2(triton.cdiv(h, BLOCK_SIZE))
    rows = max(1, 16 // groups)
    return {"ROWS": rows, "GROUPS": groups}, {"num_warps": min(16, rows * groups // 4)}


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    delta: torch.Tensor | None = None,
    fp8: Scales | None = None,
    keep: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor | Quantised, torch.Tensor]:
    """As reference.norm, in the FP8 type of the device unless dtype says another. x's rows may lie apart."""
    t, h = x.shape
    assert weight.shape == (h,) and (delta is None or (delta.shape == x.shape and delta.dtype == x.dtype))
    x = x if x.stride(1) == 1 else x.contiguous()
    total = x if delta is None else torch.empty(t, h, dtype=x.dtype, device=x.device)
    y = torch.empty(t, h, dtype=x.dtype, device=x.device) if keep or not fp8 else None
    q, s = _quantised_buffers(t, h, dtype, x.device) if fp8 else (None, None)
    if t:
        tile, options = norm_tile(h)
        norm_kernel[(triton.cdiv(t, tile["ROWS"]),)](
            x, None if delta is None else delta.contiguous(), weight, None if delta is None else total, y,
            None if q is None else kernel_view(q), s, t, h, x.stride(0), eps,
            **tile, UE8M0=fp8 == "ue8m0", FNUZ=q is not None and q.dtype == torch.float8_e4m3fnuz, **options,
        )  # fmt: skip
    if q is None or s is None:
        assert y is not None
        return y, total
    return Quantised(q, s, y, x.dtype), total


def _quantised_buffers(
    rows: int, k: int, dtype: torch.dtype | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.empty(rows, k, dtype=dtype or fp8_dtype(device), device=device)
    return q, torch.empty(rows, triton.cdiv(k, BLOCK_SIZE), dtype=torch.float32, device=device)


# --------------------------------------------------------------------------------------------------------------------
# SwiGLU's product, quantisation
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def sum_of_parts(ptrs, inside, part_stride, PARTS: tl.constexpr, ROUNDED: tl.constexpr):
    """float32: what is there, or the sum of PARTS, in their order, rounded as if it had been there."""
    total = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(ptrs + part * part_stride, mask=inside, other=0.0)
    return total if PARTS == 1 else cast(total, ROUNDED).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def silu_mul_kernel(
    gate_up_ptr, y_ptr, q_ptr, s_ptr, M, inter, up, stride, part_stride,
    GROUPS: tl.constexpr, UE8M0: tl.constexpr, FNUZ: tl.constexpr, PARTS: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """GROUPS blocks of 128 channels, numbered along the rows; either y_ptr or q_ptr and s_ptr is None. gate_up comes
    in PARTS float32 to be added up, or is one of type ROUNDED."""
    blocks = tl.cdiv(inter, SCALE_BLOCK)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    row = group // blocks
    channel = ((group % blocks) * SCALE_BLOCK)[:, None] + tl.arange(0, SCALE_BLOCK)[None, :]
    inside = (row < M)[:, None] & (channel < inter)
    gate_ptrs = gate_up_ptr + row[:, None] * stride + channel
    gate = sum_of_parts(gate_ptrs, inside, part_stride, PARTS, ROUNDED)
    value = sum_of_parts(gate_ptrs + up, inside, part_stride, PARTS, ROUNDED)
    y = cast(tl.div_rn(gate, 1.0 + tl.exp(-gate)) * value, ROUNDED)
    offset = row[:, None] * inter + channel
    if y_ptr is not None:
        tl.store(y_ptr + offset, y, mask=inside)
    else:
        q, s = quantise(y.to(tl.float32), q_ptr.dtype.element_ty, UE8M0, FNUZ)
        tl.store(q_ptr + offset, q, mask=inside)
        tl.store(s_ptr + group, s, mask=row < M)


TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
FEW_BLOCKS = 1024  # of 128 channels: up to here each gets a program of its own, to occupy the whole GPU


def silu_mul_tile(blocks: int) -> tuple[dict[str, int], dict[str, int]]:
    return ({"GROUPS": 1}, {"num_warps": 1}) if blocks <= FEW_BLOCKS else ({"GROUPS": 8}, {"num_warps": 4})


def silu_mul(
    gate_up: torch.Tensor,
    inter: int,
    fp8: Scales | None = None,
    dtype: torch.dtype | None = None,
    rounded: torch.dtype | None = None,
) -> torch.Tensor | Quantised:
    """As reference.silu_mul, in the FP8 type of the device unless dtype says another. Rows may lie apart.

    gate_up may be float32 sums over parts of K (parts, T, 2 I'): they are added up, and rounded to `rounded`.
    """
    parts, rows, width = gate_up.shape if gate_up.dim() == 3 else (1, *gate_up.shape)
    rounded = gate_up.dtype if parts == 1 or rounded is None else rounded
    assert width % 2 == 0 and inter <= width // 2, (gate_up.shape, inter)
    assert parts == 1 or (gate_up.dtype == torch.float32 and gate_up.numel() < 1 << 31), (gate_up.shape, gate_up.dtype)
    gate_up = gate_up if gate_up.stride(-1) == 1 else gate_up.contiguous()
    y = None if fp8 else torch.empty(rows, inter, dtype=rounded, device=gate_up.device)
    q, s = _quantised_buffers(rows, inter, dtype, gate_up.device) if fp8 else (None, None)
    if rows:
        blocks = rows * triton.cdiv(inter, BLOCK_SIZE)
        tile, options = silu_mul_tile(blocks)
        silu_mul_kernel[(triton.cdiv(blocks, tile["GROUPS"]),)](
            gate_up, y, None if q is None else kernel_view(q), s, rows, inter, width // 2, gate_up.stride(-2),
            gate_up.stride(0), PARTS=parts, ROUNDED=TYPES[rounded],
            **tile, UE8M0=fp8 == "ue8m0", FNUZ=q is not None and q.dtype == torch.float8_e4m3fnuz, **options,
        )  # fmt: skip
    if q is None or s is None:
        assert y is not None
        return y
    return Quantised(q, s, None, rounded)


# --------------------------------------------------------------------------------------------------------------------
# The latent's norm, both rotations, the cache write
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def latent_write_kernel(
    c_kv_ptr, k_pe_ptr, weight_ptr, cos_ptr, sin_ptr, q_pe_ptr, slots_ptr,
    latents_ptr, scales_ptr, k_latents_ptr, out_ptr,
    C, R, N, c_kv_stride, k_pe_stride, q_token_stride, q_head_stride, eps,
    GROUPS: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token (program 0 of the first axis), its latent (0 of the second) or HEADS of its heads' queries."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    cos = tl.load(cos_ptr + token * (R // 2) + pair, mask=pair < R // 2, other=0.0)
    sin = tl.load(sin_ptr + token * (R // 2) + pair, mask=pair < R // 2, other=0.0)
    place = pair[:, None] * 2 + tl.arange(0, 2)[None, :]  # (PAIRS, 2), of R values

    if tl.program_id(1) > 0:
        head = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)
        inside = (head < N)[:, None, None] & (place < R)[None, :, :]
        q_ptrs = q_pe_ptr + token * q_token_stride + head[:, None, None] * q_head_stride + place[None, :, :]
        q = tl.load(q_ptrs, mask=inside, other=0.0).to(tl.float32)
        q = rotate(q, tl.broadcast_to(cos[None, :], (HEADS, PAIRS)), tl.broadcast_to(sin[None, :], (HEADS, PAIRS)))
        out_ptrs = out_ptr + (token * N + head[:, None, None]) * R + place[None, :, :]
        tl.store(out_ptrs, cast(q, out_ptr.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            group = tl.arange(0, GROUPS)
            # (1, GROUPS, 128) as in norm_kernel: reshaped to two dimensions it would be quantised through the stack.
            channel = (group[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :])[None, :, :]
            c_kv = tl.load(c_kv_ptr + token * c_kv_stride + channel, mask=channel < C, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
            c_kv = cast(rms_norm(c_kv, weight, C, eps), c_kv_ptr.dtype.element_ty)
            k_pe = tl.load(k_pe_ptr + token * k_pe_stride + place, mask=place < R, other=0.0).to(tl.float32)
            k_pe = cast(rotate(k_pe, cos, sin), k_pe_ptr.dtype.element_ty)
            if scales_ptr is not None:  # as reference.pack_latents; the scales and k_pe through views of their types
                blocks = tl.cdiv(C, SCALE_BLOCK)
                q, s = quantise(c_kv.to(tl.float32), tl.uint8, False, False)
                start = slot * (C + 4 * blocks + 2 * R)
                tl.store(latents_ptr + start + channel, q, mask=channel < C)
                tl.store(scales_ptr + (start + C) // 4 + group[None, :], s, mask=(group < blocks)[None, :])
                k_pe = cast(k_pe.to(tl.float32), tl.bfloat16)
                start = (start + C) // 2 + 2 * blocks
            else:
                start = slot * (C + R)
                tl.store(latents_ptr + start + channel, c_kv, mask=channel < C)
                start += C
            tl.store(k_latents_ptr + start + place, k_pe, mask=place < R)


HEADS = 16  # of the queries, to a program
UNFUSED = {"enable_fp_fusion": False}  # a * cos - b * sin rounds its products, as torch does


def latent_write_tile(c: int, rope: int) -> tuple[dict[str, int], dict[str, Any]]:
    groups = triton.next_power_of_2(triton.cdiv(c, BLOCK_SIZE))
    tile = {"GROUPS": groups, "PAIRS": triton.next_power_of_2(rope // 2), "HEADS": HEADS}
    return tile, {"num_warps": 4} | UNFUSED


def latent_write(
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_pe: torch.Tensor,
    slots: torch.Tensor,
    latents: torch.Tensor,
) -> torch.Tensor:
    """As reference.latent_write. c_kv, k_pe and q_pe may be slices: only their last dimension is contiguous.

    A pool of bytes needs C in multiples of 4, so that the scales are aligned.
    """
    (t, c), (n, rope) = c_kv.shape, q_pe.shape[1:]
    packed = latents.dtype == torch.uint8
    width = packed_latent_bytes(c, rope) if packed else c + rope
    assert k_pe.shape == (t, rope) and q_pe.shape[0] == t and cos.shape == sin.shape == (t, rope // 2)
    assert latents.is_contiguous() and latents.shape[-1] == width, (latents.shape, c, rope)
    assert c % 4 == 0 if packed else latents.dtype == c_kv.dtype == k_pe.dtype, (latents.dtype, c_kv.dtype, k_pe.dtype)
    assert all(x.stride(-1) == 1 for x in (c_kv, k_pe, q_pe)) and all(x.is_contiguous() for x in (cos, sin, slots))
    out = torch.empty(t, n, rope, dtype=q_pe.dtype, device=q_pe.device)
    if t:
        tile, options = latent_write_tile(c, rope)
        latent_write_kernel[(t, 1 + triton.cdiv(n, HEADS))](
            c_kv, k_pe, weight, cos, sin, q_pe, slots,
            latents, latents.view(torch.float32) if packed else None,
            latents.view(torch.bfloat16) if packed else latents, out,
            c, rope, n, c_kv.stride(0), k_pe.stride(0), q_pe.stride(0), q_pe.stride(1), eps, **tile, **options,
        )  # fmt: skip
    return out

"""What MLA computes between its first product and its second, in Triton, one launch: the norms of both latents, the
key's rotation, and the write of the cache. See reference.norm_latents.

It adds up the partial sums of the product before it, so that splitting K costs no launch. Every value is rounded where
the composed ops round it.

Names: C, R, Q as in model.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.formats import PartialSums, Quantised, Scales, packed_latent_bytes
from ops.gpu import pdl
from ops.gpu.casts import SCALE_BLOCK, cast, quantise
from ops.gpu.device import architecture, kernel_view
from ops.gpu.fused import TYPES, UNFUSED, norm_tile, operand, quantised_buffers, rms_norm, rotate, sum_of_parts
from ops.gpu.pdl import wait_for_previous


@triton.jit
def norm_latents_kernel(
    kv_ptr, weight_ptr, cos_ptr, sin_ptr, slots_ptr, latents_ptr, scales_ptr, k_latents_ptr,
    q_ptr, q_weight_ptr, y_ptr, y8_ptr, y_s_ptr,
    C, R, Q, kv_stride, kv_part_stride, q_stride, q_part_stride, eps,
    GROUPS: tl.constexpr, PAIRS: tl.constexpr, Q_GROUPS: tl.constexpr, PARTS: tl.constexpr, ROUNDED: tl.constexpr,
    UE8M0: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """One token (program 0 of the first axis): its latent and rotary key (0 of the second), or its query's latent."""
    wait_for_previous()
    token = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) > 0:
        # (1, GROUPS, 128) as in norm_kernel: reshaped to two dimensions it would be quantised through the stack.
        group = tl.arange(0, Q_GROUPS)
        channel = (group[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :])[None, :, :]
        q = sum_of_parts(q_ptr + token * q_stride + channel, channel < Q, q_part_stride, PARTS, ROUNDED)
        weight = tl.load(q_weight_ptr + channel, mask=channel < Q, other=0.0).to(tl.float32)
        y = cast(rms_norm(q, weight, Q, eps), ROUNDED)
        if y_ptr is not None:
            tl.store(y_ptr + token * Q + channel, y, mask=channel < Q)
        else:
            blocks = tl.cdiv(Q, SCALE_BLOCK)
            y8, s = quantise(y.to(tl.float32), y8_ptr.dtype.element_ty, UE8M0, FNUZ)
            tl.store(y8_ptr + token * Q + channel, y8, mask=channel < Q)
            tl.store(y_s_ptr + token * blocks + group[None, :], s, mask=(group < blocks)[None, :])
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            pair = tl.arange(0, PAIRS)
            place = pair[:, None] * 2 + tl.arange(0, 2)[None, :]  # (PAIRS, 2), of R values
            cos = tl.load(cos_ptr + token * (R // 2) + pair, mask=pair < R // 2, other=0.0)
            sin = tl.load(sin_ptr + token * (R // 2) + pair, mask=pair < R // 2, other=0.0)
            group = tl.arange(0, GROUPS)
            channel = (group[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :])[None, :, :]
            kv_ptr += token * kv_stride
            c_kv = sum_of_parts(kv_ptr + channel, channel < C, kv_part_stride, PARTS, ROUNDED)
            weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
            c_kv = cast(rms_norm(c_kv, weight, C, eps), ROUNDED)
            k_pe = sum_of_parts(kv_ptr + C + place, place < R, kv_part_stride, PARTS, ROUNDED)
            k_pe = cast(rotate(k_pe, cos, sin), ROUNDED)
            if scales_ptr is not None:  # as reference.pack_latents; the scales and k_pe through views of their types
                blocks = tl.cdiv(C, SCALE_BLOCK)
                c8, s = quantise(c_kv.to(tl.float32), tl.uint8, False, False)
                start = slot * (C + 4 * blocks + 2 * R)
                tl.store(latents_ptr + start + channel, c8, mask=channel < C)
                tl.store(scales_ptr + (start + C) // 4 + group[None, :], s, mask=(group < blocks)[None, :])
                k_pe = cast(k_pe.to(tl.float32), tl.bfloat16)
                start = (start + C) // 2 + 2 * blocks
            else:
                start = slot * (C + R)
                tl.store(latents_ptr + start + channel, c_kv, mask=channel < C)
                start += C
            tl.store(k_latents_ptr + start + place, k_pe, mask=place < R)


def norm_latents_tile(c: int, rope: int, q: int) -> tuple[dict[str, int], dict[str, Any]]:
    groups, q_groups = (triton.next_power_of_2(triton.cdiv(n, BLOCK_SIZE)) for n in (c, q or 1))
    tile = {"GROUPS": groups, "PAIRS": triton.next_power_of_2(rope // 2), "Q_GROUPS": q_groups}
    return tile, {"num_warps": max(4, norm_tile(q or 1)[1]["num_warps"])} | UNFUSED


def norm_latents(
    kv: torch.Tensor | PartialSums,
    kv_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    latents: torch.Tensor,
    q: torch.Tensor | PartialSums | None = None,
    q_weight: torch.Tensor | None = None,
    fp8: Scales | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | Quantised | None:
    """As reference.norm_latents, in the FP8 type of the device unless dtype says another. Rows may lie apart.

    A pool of bytes needs C in multiples of 4, so that the scales are aligned.
    """
    kv_data, parts, rounded = operand(kv)
    q_data, q_parts, _ = (kv_data, parts, rounded) if q is None else operand(q)
    (t, width), c, rope = kv_data.shape[-2:], len(kv_weight), 2 * cos.shape[1]
    packed, device, wide = latents.dtype == torch.uint8, kv_data.device, 0 if q is None else q_data.shape[-1]
    assert width == c + rope and cos.shape == sin.shape == (t, rope // 2) and parts == q_parts
    assert latents.is_contiguous() and latents.shape[-1] == (packed_latent_bytes(c, rope) if packed else width)
    assert c % 4 == 0 if packed else latents.dtype == rounded, (latents.dtype, rounded)
    assert all(x.is_contiguous() for x in (cos, sin, slots))
    assert q is None or (q_weight is not None and q_weight.shape == (wide,) and q_data.shape[-2] == t)
    y = None if q is None or fp8 else torch.empty(t, wide, dtype=rounded, device=device)
    y8, s = quantised_buffers(t, wide, dtype, device) if fp8 and q is not None else (None, None)
    if t:
        tile, options = norm_latents_tile(c, rope, wide)
        norm_latents_kernel[(t, 1 if q is None else 2)](
            kv_data, kv_weight, cos, sin, slots, latents, latents.view(torch.float32) if packed else None,
            latents.view(torch.bfloat16) if packed else latents, None if q is None else q_data, q_weight, y,
            None if y8 is None else kernel_view(y8), s, c, rope, wide, kv_data.stride(-2), kv_data.stride(0),
            q_data.stride(-2), q_data.stride(0), eps, **tile, PARTS=parts, ROUNDED=TYPES[rounded],
            UE8M0=fp8 == "ue8m0", FNUZ=y8 is not None and y8.dtype == torch.float8_e4m3fnuz, **options,
            **pdl.options(architecture(device)),
        )  # fmt: skip
    return y if y8 is None or s is None else Quantised(y8, s, None, rounded)

"""What MLA computes around its attention, in Triton: the latents' norms and the cache write before the queries'
projection, then W^UK and the queries' rotation, and W^UV behind decode's sums. One launch each; see reference.py.

Each adds up the partial sums of the product before it, so that splitting K costs no launch. Every value is rounded
where the composed ops round it.

Names: T, N, C, R, dn, dv as in model.py. *_PAD is the power of two that a tile's side is padded to.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.formats import PartialSums, Quantised, Scales, packed_latent_bytes
from ops.gpu import pdl
from ops.gpu.casts import SCALE_BLOCK, cast, dot_operand, quantise
from ops.gpu.device import architecture, kernel_view
from ops.gpu.fused import TYPES, norm_tile, operand, quantised_buffers, rms_norm, rotate, sum_of_parts
from ops.gpu.pdl import wait_for_previous

# --------------------------------------------------------------------------------------------------------------------
# Both latents' norms, the key's rotation, the cache write
# --------------------------------------------------------------------------------------------------------------------


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


UNFUSED = {"enable_fp_fusion": False}  # a * cos - b * sin rounds its products, as torch does


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


# --------------------------------------------------------------------------------------------------------------------
# The queries: W^UK, rotation
# --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def absorb_kernel(
    q_ptr, w_uk_ptr, cos_ptr, sin_ptr, out_ptr, pe_ptr, T, q_stride, q_part_stride,
    N: tl.constexpr, DN: tl.constexpr, R: tl.constexpr, C: tl.constexpr, DN_PAD: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """ROWS tokens' queries of one head: COLUMNS of their product by W^UK (N, dn, C), or, the last program of the third
    axis, their rotary channels, rotated. Without w_uk_ptr these alone."""
    wait_for_previous()
    head = tl.program_id(0)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = t.to(tl.int64)
    q_ptr += head * (DN + R)
    if tl.program_id(2) == tl.num_programs(2) - 1:
        pair = tl.arange(0, PAIRS)
        place = (pair[:, None] * 2 + tl.arange(0, 2)[None, :])[None, :, :]
        rotary = (t < T)[:, None, None] & (place < R)
        angle, known = token[:, None] * (R // 2) + pair[None, :], (t < T)[:, None] & (pair < R // 2)[None, :]
        pe_ptrs = q_ptr + token[:, None, None] * q_stride + DN + place
        pe = sum_of_parts(pe_ptrs, rotary, q_part_stride, PARTS, ROUNDED)
        cos, sin = tl.load(cos_ptr + angle, mask=known, other=0.0), tl.load(sin_ptr + angle, mask=known, other=0.0)
        pe = cast(rotate(pe, cos, sin), ROUNDED)
        tl.store(pe_ptr + (token[:, None, None] * N + head) * R + place, pe, mask=rotary)
    elif w_uk_ptr is not None:
        d = tl.arange(0, DN_PAD)
        c = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (t < T)[:, None] & (d < DN)[None, :]
        q = sum_of_parts(q_ptr + token[:, None] * q_stride + d[None, :], inside, q_part_stride, PARTS, ROUNDED)
        w_ptrs = w_uk_ptr + (head * DN + d[:, None]) * C + c[None, :]
        w = tl.load(w_ptrs, mask=(d < DN)[:, None] & (c < C)[None, :], other=0.0)
        # the weights come first: the tensor core wants 64 rows of its first operand
        out = tl.dot(dot_operand(w, False).T, dot_operand(q, False).T)
        out_ptrs = out_ptr + (token[:, None] * N + head) * C + c[None, :]
        tl.store(out_ptrs, cast(out.T, ROUNDED), mask=(t < T)[:, None] & (c < C)[None, :])


def padded(size: int) -> int:
    """A side of a tile: a power of two, and what a product takes at least."""
    return max(16, triton.next_power_of_2(size))


def query_rows(tokens: int) -> int:
    """Tokens to a program of absorb_kernel."""
    return 16 if tokens <= 64 else 32


def absorb_tile(dn: int, rope: int, c: int, rows: int) -> tuple[dict[str, int], dict[str, Any]]:
    columns = min(128, padded(c))
    tile = {"DN_PAD": padded(dn), "PAIRS": triton.next_power_of_2(rope // 2), "ROWS": rows, "COLUMNS": columns}
    return tile, {"num_warps": 4 if rows == 16 else 8} | UNFUSED


def absorb(
    q: torch.Tensor | PartialSums,
    w_uk: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_heads: int,
    dn: int,
    c: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (T, N (dn + R)) by W^UK (N, dn, C), rounded once: (T, N, C); and their rotary channels, rotated as
    reference.rotary does: (T, N, R). Without w_uk the first is empty."""
    data, parts, rounded = operand(q)
    t, rope = data.shape[-2], 2 * cos.shape[1]
    assert data.shape[-1] == n_heads * (dn + rope) and cos.shape == sin.shape == (t, rope // 2)
    assert w_uk is None or (w_uk.shape == (n_heads, dn, c) and w_uk.is_contiguous() and w_uk.dtype == rounded)
    assert cos.is_contiguous() and sin.is_contiguous()
    out = torch.empty(t if w_uk is not None else 0, n_heads, c, dtype=rounded, device=data.device)
    pe = torch.empty(t, n_heads, rope, dtype=rounded, device=data.device)
    if t:
        rows = query_rows(t)
        tile, options = absorb_tile(dn, rope, c, rows)
        tiles = 1 if w_uk is None else 1 + triton.cdiv(c, tile["COLUMNS"])
        absorb_kernel[(n_heads, triton.cdiv(t, rows), tiles)](
            data, w_uk, cos, sin, out, pe, t, data.stride(-2), data.stride(0), N=n_heads, DN=dn, R=rope, C=c, **tile,
            PARTS=parts, ROUNDED=TYPES[rounded], **options, **pdl.options(architecture(data.device)),
        )  # fmt: skip
    return out, pe


# --------------------------------------------------------------------------------------------------------------------
# The values: the sum of decode's splits, W^UV, quantisation
# --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first", "last", "stride"])
def values_kernel(
    partial_ptr, lse_ptr, parts_ptr, w_uv_ptr, y_ptr, y8_ptr, y_s_ptr, first, last, stride,
    N: tl.constexpr, C: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, ROUNDED: tl.constexpr, UE8M0: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """ROWS of the tokens [first, last) and one head: their parts (see decode.decode_kernel), `stride` apart, added up
    SPLITS at a time, rounded, times W^UV (N, dv, C) transposed, COLUMNS of the latent at a time."""
    wait_for_previous()
    M: tl.constexpr = 16 if ROWS < 16 else ROWS  # rows of the product, which repeats what it has too few of
    head = tl.program_id(0)
    t = first + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = (t - first) * N + head
    start = tl.load(parts_ptr + 2 * row, mask=t < last, other=0)
    n = tl.load(parts_ptr + 2 * row + 1, mask=t < last, other=0)
    most = tl.max(n)
    best = tl.full((ROWS, SPLITS), float("-inf"), tl.float32)
    for at in range(0, most, SPLITS):
        split = (at + tl.arange(0, SPLITS))[None, :]
        ptrs = lse_ptr + start[:, None] + split * stride
        best = tl.maximum(best, tl.load(ptrs, mask=split < n[:, None], other=float("-inf")))
    peak = tl.max(best, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)  # rows past the end

    product = tl.zeros((DV_PAD, M), tl.float32)
    d = tl.arange(0, DV_PAD)
    for low in tl.static_range(0, C, COLUMNS):
        c = low + tl.arange(0, COLUMNS)
        w_ptrs = w_uv_ptr + (head * DV + d[:, None]) * C + c[None, :]
        w = tl.load(w_ptrs, mask=(d < DV)[:, None] & (c < C)[None, :], other=0.0)
        total = tl.zeros((ROWS, SPLITS), tl.float32)
        acc = tl.zeros((ROWS, SPLITS, COLUMNS), tl.float32)
        for at in tl.range(0, most, SPLITS, num_stages=2):
            split = (at + tl.arange(0, SPLITS))[None, :]
            inside, place = split < n[:, None], (start[:, None] + split * stride).to(tl.int64)
            weight = tl.exp2(tl.load(lse_ptr + place, mask=inside, other=float("-inf")) - peak[:, None])
            ptrs = partial_ptr + place[:, :, None] * C + c[None, None, :]
            acc += weight[:, :, None] * tl.load(ptrs, mask=inside[:, :, None] & (c < C)[None, None, :], other=0.0)
            total += weight
        total = tl.sum(total, 1)
        o = tl.sum(acc, 1) / tl.where(total == 0, 1.0, total)[:, None]
        o = cast(tl.reshape(tl.broadcast_to(o[:, None, :], (ROWS, M // ROWS, COLUMNS)), (M, COLUMNS)), ROUNDED)
        product = tl.dot(dot_operand(w, False), dot_operand(o, False).T, product)

    copy = tl.arange(0, M)
    token = (first + tl.program_id(1) * ROWS + copy // (M // ROWS)).to(tl.int64)
    kept = (token < last) & (copy % (M // ROWS) == 0)
    y = cast(product, ROUNDED)
    offset = (token[None, :] * N + head) * DV + d[:, None]
    inside = kept[None, :] & (d < DV)[:, None]
    if y_ptr is not None:
        tl.store(y_ptr + offset, y, mask=inside)
    else:  # whole blocks of channels
        GROUPS: tl.constexpr = DV // SCALE_BLOCK
        blocks = tl.reshape(y.to(tl.float32).T, (M, GROUPS, SCALE_BLOCK))
        y8, s = quantise(blocks, y8_ptr.dtype.element_ty, UE8M0, FNUZ)
        group, channel = tl.arange(0, GROUPS), tl.arange(0, SCALE_BLOCK)
        place = ((token[:, None] * N + head) * GROUPS + group[None, :])
        tl.store(y_s_ptr + place, s, mask=kept[:, None] & (group >= 0)[None, :])
        ptrs = y8_ptr + place[:, :, None] * SCALE_BLOCK + channel[None, None, :]
        tl.store(ptrs, y8, mask=kept[:, None, None] & (group >= 0)[None, :, None] & (channel >= 0)[None, None, :])


def values_tile(tokens: int, dv: int, c: int) -> tuple[dict[str, int], dict[str, int]]:
    """Fewer tokens have more splits: their results, ROWS times SPLITS of them, occupy the same registers."""
    rows = 1 if tokens <= 4 else 4 if tokens <= 32 else 16
    tile = {"DV_PAD": padded(dv), "COLUMNS": min(128, padded(c)), "ROWS": rows, "SPLITS": 32 // rows}
    return tile, {"num_warps": 4 if dv <= 128 else 8}


def makes_blocks(dv: int) -> bool:
    """Whether values_kernel can quantise heads of dv channels: a power of two of whole blocks."""
    return dv % BLOCK_SIZE == 0 and dv & (dv - 1) == 0


class Values:
    """The result (T, N dv) of decode's tokens, which `add` computes from the splits of some of them."""

    def __init__(self, tokens: int, w_uv: torch.Tensor, fp8: Scales | None, dtype: torch.dtype | None = None):
        """w_uv (N, dv, C) in the result's type; `fp8`: quantised, of a dv that makes_blocks."""
        n_heads, dv, _ = w_uv.shape
        assert w_uv.is_contiguous() and (not fp8 or makes_blocks(dv))
        self.w_uv, self.fp8, self.n, self.s = w_uv, fp8, tokens, None
        if fp8:
            self.y, self.s = quantised_buffers(tokens, n_heads * dv, dtype, w_uv.device)
        else:
            self.y = torch.empty(tokens, n_heads * dv, dtype=w_uv.dtype, device=w_uv.device)

    def add(
        self,
        partial: torch.Tensor,
        lse: torch.Tensor,
        parts: torch.Tensor,
        first: int,
        last: int,
        stride: int,
    ) -> None:
        """For the tokens [first, last): what decode.decode_kernel wrote for them, each one's parts `stride` apart."""
        (n_heads, dv, c), y8 = self.w_uv.shape, self.y if self.fp8 else None
        tile, options = values_tile(last - first, dv, c)
        values_kernel[(n_heads, triton.cdiv(last - first, tile["ROWS"]))](
            partial, lse, parts, self.w_uv, None if self.fp8 else self.y,
            None if y8 is None else kernel_view(y8), self.s, first, last, stride, N=n_heads, C=c, DV=dv, **tile,
            ROUNDED=TYPES[self.w_uv.dtype], UE8M0=self.fp8 == "ue8m0",
            FNUZ=self.fp8 is not None and self.y.dtype == torch.float8_e4m3fnuz, **options,
            **pdl.options(architecture(self.y.device)),
        )  # fmt: skip

    def result(self) -> torch.Tensor | Quantised:
        return self.y if self.s is None else Quantised(self.y, self.s, None, self.w_uv.dtype)

"""What MLA computes around decode's attention, in Triton: W^UK and the queries' rotation before it, and behind it the
sum of its splits, W^UV and the quantisation. One launch each; see reference.py.

Each adds up the partial sums of what is before it, so that a split costs no launch. Every value is rounded where the
composed ops round it.

Names: T, N, C, R, dn, dv as in model.py. *_PAD is the power of two that a tile's side is padded to.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.formats import PartialSums, Quantised, Scales
from ops.gpu import pdl
from ops.gpu.casts import SCALE_BLOCK, cast, dot_operand, quantise
from ops.gpu.device import architecture, kernel_view
from ops.gpu.fused import TYPES, UNFUSED, operand, quantised_buffers, rotate, sum_of_parts
from ops.gpu.latents import padded
from ops.gpu.pdl import wait_for_previous

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

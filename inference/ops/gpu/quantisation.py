"""act_quant and weight_dequant in Triton, as reference.py specifies them; the order of packed weights.

Tensors are on the current device.
"""

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.gpu import pdl
from ops.gpu.casts import SCALE_BLOCK, cast, quantise, widen_e4m3
from ops.gpu.device import architecture, fp8_dtype, kernel_view
from ops.gpu.pdl import wait_for_previous

GROUPS = 8  # blocks of 128 channels to an act_quant program
DEQUANT_ROWS = 64  # rows to a weight_dequant program
UNIT = 32  # channels of INT4 that are put in order together, 16 bytes
AT_A_TIME = 1 << 26  # bytes of INT4 that are put in order


@triton.jit(do_not_specialize=["M"])
def act_quant_kernel(
    x_ptr, q_ptr, s_ptr, M, K, GROUPS: tl.constexpr, BLOCK: tl.constexpr, UE8M0: tl.constexpr, FNUZ: tl.constexpr
):
    """GROUPS blocks of BLOCK channels, numbered along the tokens' rows. See reference.act_quant."""
    wait_for_previous()
    blocks_per_row = tl.cdiv(K, BLOCK)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    row = group // blocks_per_row
    channel = ((group % blocks_per_row) * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = (row < M)[:, None] & (channel < K)
    offset = row.to(tl.int64)[:, None] * K + channel
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)

    q, s = quantise(x, q_ptr.dtype.element_ty, UE8M0, FNUZ)
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
            x, kernel_view(q), s, x.numel() // k, k,
            GROUPS=GROUPS, BLOCK=block_size, UE8M0=scale_fmt == "ue8m0", FNUZ=dtype == torch.float8_e4m3fnuz,
            **pdl.options(architecture(x.device)),
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
        weight_dequant_kernel[grid](kernel_view(w), s, out, n, k, ROWS=DEQUANT_ROWS)
    return out


# --------------------------------------------------------------------------------------------------------------------
# INT4 in the order of casts.widen_int4
# --------------------------------------------------------------------------------------------------------------------


def interleave(w: torch.Tensor) -> torch.Tensor:
    """INT4 uint8 (…, N, K/2) in the kernels' order, in place: the same memory as int32 (…, N, K/8). K: whole UNITs.

    Of each 32 channels, k = 16 t + 8 h + 2 q + e, word q has k in its nibble 4 e + 2 t + h, counted from the lowest.
    """
    for part in _rows(w):
        units = part.unflatten(-1, (-1, 2, 2, 4))  # rows, units, t, h, q; e is the nibble
        even, odd = ((nibble[:, :, :, 0] | nibble[:, :, :, 1] << 4) for nibble in (units & 15, units >> 4))
        part.copy_(torch.stack((even, odd), 2).permute(0, 1, 4, 2, 3).reshape(part.shape))  # rows, units, q, e, t
    return w.view(torch.int32)


def natural(words: torch.Tensor) -> torch.Tensor:
    """What was given to `interleave`, as a tensor of its own: uint8 (…, N, K/2)."""
    even, odd = words.view(torch.uint8).unflatten(-1, (-1, 4, 2, 2)).movedim(-3, -1).unbind(-3)  # …, units, t, q
    halves = [even >> 4 * h & 15 | (odd >> 4 * h & 15) << 4 for h in (0, 1)]
    return torch.stack(halves, -2).flatten(-4)  # …, units, t, h, q


def _rows(w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return w.view(-1, w.shape[-1]).split(max(1, AT_A_TIME // w.shape[-1]))


def by_groups(s: torch.Tensor) -> torch.Tensor:
    """Scales or zero points (…, N, K/G) with all rows' of one group behind one another, in place: the same shape, and
    other strides."""
    assert s.is_contiguous(), s.stride()
    for one in s.view(-1, *s.shape[-2:]):
        one.view(-1).copy_(one.mT.reshape(-1))
    return s.view(*s.shape[:-2], s.shape[-1], s.shape[-2]).mT

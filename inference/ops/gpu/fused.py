"""Row-wise ops in Triton that are several in torch, one launch each: norm and silu_mul. See reference.py.

With one token on the way a launch costs more than the bytes it moves, so what stands between two products is one
kernel: the residual add, the norm and the quantisation; the sum of split K's parts, SiLU, the product and the
quantisation. (norm_latents.py and around_attention.py have those next to attention.)

Every value is rounded where the composed ops round it, and FP8 is made from the rounded value, so a fused op gives the
composed ops' bits, but for the order in which a row's squares are added up and for the last bit of an exponential.

Tiles are (…, 128): one scale to a line.
"""

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.formats import PartialSums, Quantised, Scales
from ops.gpu import pdl
from ops.gpu.casts import SCALE_BLOCK, cast, quantise
from ops.gpu.device import architecture, fp8_dtype, kernel_view
from ops.gpu.pdl import wait_for_previous


@triton.jit
def rms_norm(x, weight, H, eps):
    """float32 x (rows, groups, 128), zero past its H channels, divided by its root mean square, times the weight."""
    mean = tl.div_rn(tl.sum(tl.sum(x * x, axis=2), axis=1), H.to(tl.float32))
    r = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    return x * r[:, None, None] * weight


UNFUSED = {"enable_fp_fusion": False}  # of what rotates: a * cos - b * sin rounds its products, as torch does


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
    wait_for_previous()
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
    q, s = quantised_buffers(t, h, dtype, x.device) if fp8 else (None, None)
    if t:
        tile, options = norm_tile(h)
        norm_kernel[(triton.cdiv(t, tile["ROWS"]),)](
            x, None if delta is None else delta.contiguous(), weight, None if delta is None else total, y,
            None if q is None else kernel_view(q), s, t, h, x.stride(0), eps,
            **tile, UE8M0=fp8 == "ue8m0", FNUZ=q is not None and q.dtype == torch.float8_e4m3fnuz, **options,
            **pdl.options(architecture(x.device)),
        )  # fmt: skip
    if q is None or s is None:
        assert y is not None
        return y, total
    return Quantised(q, s, y, x.dtype), total


def quantised_buffers(
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
    wait_for_previous()
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


def operand(x: torch.Tensor | PartialSums) -> tuple[torch.Tensor, int, torch.dtype]:
    """A product (T, N), or the sums of its parts (parts, T, N), for sum_of_parts: the numbers, with stride 1 in the
    last dimension, how many parts there are, and the product's type."""
    if isinstance(x, PartialSums):
        assert x.parts.dtype == torch.float32 and x.parts.stride(-1) == 1 and len(x.parts) > 1
        assert x.parts.stride(0) * len(x.parts) < 1 << 31  # offsets are of 32 bits
        return x.parts, len(x.parts), x.dtype
    return x if x.stride(-1) == 1 else x.contiguous(), 1, x.dtype


def silu_mul(
    gate_up: torch.Tensor | PartialSums, inter: int, fp8: Scales | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor | Quantised:
    """As reference.silu_mul, in the FP8 type of the device unless dtype says another. Rows may lie apart."""
    data, parts, rounded = operand(gate_up)
    rows, width = data.shape[-2:]
    assert width % 2 == 0 and inter <= width // 2, (data.shape, inter)
    y = None if fp8 else torch.empty(rows, inter, dtype=rounded, device=data.device)
    q, s = quantised_buffers(rows, inter, dtype, data.device) if fp8 else (None, None)
    if rows:
        blocks = rows * triton.cdiv(inter, BLOCK_SIZE)
        tile, options = silu_mul_tile(blocks)
        silu_mul_kernel[(triton.cdiv(blocks, tile["GROUPS"]),)](
            data, y, None if q is None else kernel_view(q), s, rows, inter, width // 2, data.stride(-2),
            data.stride(0), PARTS=parts, ROUNDED=TYPES[rounded],
            **tile, UE8M0=fp8 == "ue8m0", FNUZ=q is not None and q.dtype == torch.float8_e4m3fnuz, **options,
            **pdl.options(architecture(data.device)),
        )  # fmt: skip
    if q is None or s is None:
        assert y is not None
        return y
    return Quantised(q, s, None, rounded)

"""The pool of cached latents as the attention kernels read it.

Names: C, R as in model.py. *_PAD is the power of two that a tile's side is padded to.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from core.config import BLOCK_SIZE
from ops.gpu.casts import INTERPRETED, SCALE_BLOCK, dot_operand, widen_e4m3
from ops.gpu.device import architecture, converts_fp8


@triton.jit
def load_latents(
    latents_ptr, scales_ptr, k_pe_ptr, row, inside,
    C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """Rows of the pool as operands of a product, c_kv (rows, C_PAD) and k_pe (rows, R_PAD); zeros where not `inside`.

    With scales_ptr the rows are reference.pack_latents' bytes, of which the three pointers see values, scales and
    rotary keys, each in its own type.
    """
    GROUPS: tl.constexpr = (C + SCALE_BLOCK - 1) // SCALE_BLOCK
    PACKED: tl.constexpr = scales_ptr is not None
    WIDTH: tl.constexpr = C + 4 * GROUPS + 2 * R if PACKED else C + R
    PE_WIDTH: tl.constexpr = WIDTH // 2 if PACKED else WIDTH
    c, r = tl.arange(0, C_PAD)[None, :], tl.arange(0, R_PAD)[None, :]
    c_kv = tl.load(latents_ptr + row[:, None] * WIDTH + c, mask=inside[:, None] & (c < C), other=0.0)
    if PACKED:
        PARTS: tl.constexpr = C_PAD // SCALE_BLOCK if C_PAD > SCALE_BLOCK else 1
        g = tl.arange(0, PARTS)[None, :]
        s = tl.load(scales_ptr + row[:, None] * (WIDTH // 4) + g, mask=inside[:, None] & (g < GROUPS), other=0.0)
        c_kv = widen_e4m3(c_kv) if c_kv.dtype == tl.uint8 else c_kv.to(tl.float32)
        scaled = c_kv.reshape(row.shape[0], PARTS, C_PAD // PARTS) * s[:, :, None]
        c_kv = scaled.reshape(row.shape[0], C_PAD)
    k_pe = tl.load(k_pe_ptr + row[:, None] * PE_WIDTH + r, mask=inside[:, None] & (r < R), other=0.0)
    return dot_operand(c_kv, False), dot_operand(k_pe, False)


def pool(latents: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """A layer's latents (n_pages, page, width) as load_latents takes them: compressed values, scales if packed, rotary
    keys."""
    flat = latents.view(-1)
    if latents.dtype != torch.uint8:
        return flat, None, flat[c:]
    after = c + 4 * triton.cdiv(c, BLOCK_SIZE)
    native = converts_fp8(torch.float8_e4m3fn, architecture(latents.device)) and not INTERPRETED.value
    values = flat.view(torch.float8_e4m3fn) if native else flat
    return values, flat.view(torch.float32)[c // 4 :], flat.view(torch.bfloat16)[after // 2 :]


def padded(size: int) -> int:
    """A side of a tile: a power of two, and what a product takes at least."""
    return max(16, triton.next_power_of_2(size))


def page_descriptor(latents: torch.Tensor, c: int) -> TensorDescriptor | None:
    """The values of one page at a time (1, page, c padded) of a layer's latents (n_pages, page, width), for the tensor
    memory accelerator; None where its rows do not begin at multiples of 16 bytes."""
    n_pages, page, width = latents.shape
    if width * latents.itemsize % 16 or latents.data_ptr() % 16:
        return None
    values = pool(latents, c)[0].view(n_pages, page, -1)
    return TensorDescriptor(values, list(values.shape), list(values.stride()), [1, page, padded(c)])

"""Weights quantised, in plain torch: FP8 in blocks, as the released checkpoints have them, and integers in groups.

They run once for a weight, as a checkpoint is written, on whichever device the weight is: no backend has them faster.
A NaN or an infinity in a block or a group makes its scale not finite, so a look at the scales finds them.
"""

import torch
import torch.nn.functional as F

from core.config import BLOCK_SIZE

SMALLEST = 2.0**-126  # of a scale: below that, float32 and bfloat16 have fewer digits, and some processors none
CANDIDATES = 5  # scales that are tried for a group of integers
CHUNK = 1 << 18  # weights that a CPU works on at a time: they and what is computed of them stay in its cache


def block_quant(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w (N, K), plain, to e4m3 (N, K) and float32 scales (ceil(N/128), ceil(K/128)): what weight_dequant turns back.

    A block's scale is max(|w|) / 448, the format's largest number, and 1 where the block is all zeros. Where bfloat16 w
    is itself e4m3 times some scale, rounded, it is one that gives w back bit for bit.
    """
    n, k = w.shape
    padded = F.pad(w, (0, -k % BLOCK_SIZE, 0, -n % BLOCK_SIZE))
    blocks = padded.unflatten(1, (-1, BLOCK_SIZE)).unflatten(0, (-1, BLOCK_SIZE)).transpose(1, 2)
    x = blocks.float()  # (N/128, K/128, 128, 128)
    amax = x.abs().amax(dim=(2, 3), keepdim=True)
    largest = amax.new_tensor(torch.finfo(torch.float8_e4m3fn).max)  # a tensor, as in act_quant
    s = torch.where(amax == 0, 1.0, (amax / largest).clamp(min=SMALLEST))
    q = (x / s).to(torch.float8_e4m3fn)
    if w.dtype == torch.bfloat16:
        exact = _lossless_scale(blocks, q.float())
        gives_back = ((q.float() * exact).bfloat16() == blocks).all(dim=3, keepdim=True).all(dim=2, keepdim=True)
        s = torch.where(gives_back, exact, s)
    return q.transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k].contiguous(), s[:, :, 0, 0]


def _lossless_scale(w: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A scale (..., 1, 1) with which q times it, rounded, is bfloat16 w (..., 128, 128), if there is one: the middle of
    those that round each element to its own, which are an interval around w / q."""
    bits, q = w.abs().view(torch.int16), q.abs()
    up, down = ((bits + 1).view(w.dtype), (bits - 1).clamp(min=0).view(w.dtype))
    low = torch.where(q == 0, 0.0, (w.abs().float() + down.float()) / 2 / q).amax(dim=(-2, -1), keepdim=True)
    high = torch.where(q == 0, torch.inf, (w.abs().float() + up.float()) / 2 / q).amin(dim=(-2, -1), keepdim=True)
    return ((low + high) / 2).clamp(min=SMALLEST)


def group_quant(w: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w (N, K), plain, to int8 (N, K) in [-2^(bits-1), 2^(bits-1) - 1] and bfloat16 scales (N, K / group_size): w is
    about q * s. K must be a multiple of group_size.

    Usual is s = max(|w|) / (2^(bits-1) - 1/2). Here a few divisors around that are tried, and each group has the scale
    with the least squared error: a smaller one clips the largest weight, a larger one spares it, and either may suit
    the others better. Scales are rounded before q is. A group of zeros has scale 1.
    """
    groups = w.reshape(-1, group_size)
    chunk = max(CHUNK // group_size, 1) if w.device.type == "cpu" else len(groups)
    parts = [_group_quant(part.float(), 1 << (bits - 1)) for part in groups.split(chunk)]
    q, s = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return q.view(w.shape), s.view(len(w), -1)


def _group_quant(x: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of float32 groups (G, group_size): int8 (G, group_size) and bfloat16 (G, 1)."""
    amax = x.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(amax == 0, 1.0, amax)
    least = torch.full_like(amax, torch.inf)
    exact, q = torch.empty_like(x), torch.empty_like(x)
    for i in range(CANDIDATES):
        s = (amax / (half - 1 + i / 2)).clamp(min=SMALLEST).bfloat16().float()
        torch.div(x, s, out=exact)
        torch.round(exact, out=q).clamp_(-half, half - 1)
        # relative to the largest weight, so that no square leaves float32's range
        error = q.sub_(exact).square_().sum(dim=-1, keepdim=True) * (s / amax).square()
        better = error < least
        least, scale = torch.where(better, error, least), torch.where(better, s, scale)
    torch.div(x, scale, out=q).round_().clamp_(-half, half - 1)  # halves to even
    return q.to(torch.int8), scale.bfloat16()


def pack_int32(q: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (N, K) of 4 or 8 bits as compressed-tensors' "pack-quantized" has it: int32 (N, K * bits / 32), value i of
    each 32 / bits at bit bits * i, with 2^(bits-1) added so that none is negative. K is a multiple of 32 / bits."""
    unsigned = (q.view(torch.uint8) ^ (1 << (bits - 1))) & ((1 << bits) - 1)  # two's complement: the sign bit turned
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return unsigned.contiguous().view(torch.int32)  # little-endian, as safetensors files are

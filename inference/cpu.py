"""The few ops that have a faster form on a CPU than plain torch. Each is held to its reference by a test."""

import ctypes
import functools
import math
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

import reference
from reference import Quantised, Scales

if TYPE_CHECKING:
    from model import Batch

EXPANDED_BYTES = 1 << 30  # the most that one sequence's expanded keys and values may take
BUNDLE_ROWS = 64  # of several experts together: with more the two products are what takes the time
DECODE_ROWS = 16  # query rows of a sequence that still count as decoding: a token and its drafts


class Half(NamedTuple):
    """Bfloat16 weights as FBGEMM packs them in float16: each weight is data * scale.

    The scale is a power of two that brings the largest weight just below 2^16. Float16 has more bits of mantissa than
    bfloat16, so whatever is at least 2^-29 of the largest weight's power of two is held exactly, and what is smaller
    may be taken for zero, which is less than a float32 sum rounds off. The product is summed, and given, in float32.
    """

    data: Any
    scale: torch.Tensor  # (1,) float32


def has_half() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def half_bytes(n: int, k: int) -> int:
    """What (N, K) takes as Half: FBGEMM fills each row up to blocks of 512 values."""
    return 2 * n * -(-k // 512) * 512


def pack_half(w: torch.Tensor, scale: torch.Tensor | None = None) -> Half:
    """(N, K) as Half, with a scale that may have been chosen for several of them. All weights must be finite."""
    scale = _power_of_two(w) if scale is None else scale
    return Half(torch.ops.quantized.linear_prepack_fp16(w * scale.reciprocal(), None), scale)


def _power_of_two(w: torch.Tensor) -> torch.Tensor:
    """The scale (1,) that brings the largest of w to at least 2^15 and below 2^16; bfloat16 rounds none up to that."""
    return torch.ldexp(torch.ones(1), _largest(w).float().frexp().exponent.reshape(1) - 16)


def _largest(w: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in w, NaN if w holds one; nothing of w's size is made on the way."""
    return torch.maximum(w.amax(), -w.amin())


@functools.cache
def half_is_faster() -> bool:
    """Whether this processor multiplies many rows faster from float16 weights (as float32) than in bfloat16."""
    info = Path("/proc/cpuinfo")
    return has_half() and info.exists() and slow_bfloat16(info.read_text())


def slow_bfloat16(cpuinfo: str) -> bool:
    """Whether an x86 processor has no instruction for bfloat16 products, or one that is slower than float32's.

    Intel's cores without AMX take as long for a bfloat16 product instruction, of 32 pairs, as for four of float32, of
    16 each (measured on a Xeon of 2023: 83 GFLOPS a core against 160); AMD's and AMX are faster in bfloat16.
    """
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return bool(flags) and "amx_bf16" not in flags and ("avx512_bf16" not in flags or "GenuineIntel" in cpuinfo)


def pack(w: torch.Tensor) -> Any:
    """A bf16 weight (N, K), or each expert of a stack (E, N, K), laid out for matrix products: Half, or as oneDNN does.

    Packed once, a product with few rows reads the weights at the memory's speed, where F.linear repacks them every
    time. Other dtypes, and builds of torch with neither library, keep the plain tensor.
    """
    if w.dtype != torch.bfloat16:
        return w
    if half_is_faster() and _largest(w).isfinite():
        scale = _power_of_two(w)
        if w.dim() == 2:
            return pack_half(w, scale)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # FBGEMM packs on one thread
            packed = list(pool.map(lambda e: pack_half(e, scale), w))
        _return_freed_memory()
        return packed
    if not torch.backends.mkldnn.is_available():
        return w
    pack_one = torch.ops.mkldnn._reorder_linear_weight
    return [pack_one(e) for e in w] if w.dim() == 3 else pack_one(w)


def _return_freed_memory() -> None:
    """What packing took on the way, float32 copies on several threads, lies between what it made: the C library would
    keep it, nearly as much again as the weights, unless asked to give it back (glibc alone can be asked)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def pack_float32(w: torch.Tensor) -> Any:
    """A weight (N, K) for products in float32: Half reads half the bytes of widened ones."""
    return pack_half(w) if w.dtype == torch.bfloat16 and has_half() and _largest(w).isfinite() else w.float()


def is_packed(w: Any) -> bool:
    return isinstance(w, Half) or (isinstance(w, torch.Tensor) and w.is_mkldnn)


def linear(x: torch.Tensor, w: Any) -> torch.Tensor:
    """x (T, K) by a packed (N, K), in x's dtype."""
    return _product(x, w).to(x.dtype)


def linear_float32(x: torch.Tensor, w: Half) -> torch.Tensor:
    """x (T, K) by (N, K), in float32."""
    return _product(x, w)


def _product(x: torch.Tensor, w: Any) -> torch.Tensor:
    if isinstance(w, Half):
        return torch.ops.quantized.linear_dynamic_fp16(x * w.scale, w.data)
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def silu_mul(gate_up: torch.Tensor, inter: int, fp8: Scales | None = None) -> torch.Tensor | Quantised:
    """As reference.silu_mul, with one float32 tensor instead of three."""
    y = _swiglu(gate_up, inter).to(gate_up.dtype)
    return reference.quantised(y, fp8) if fp8 else y


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    w13: list,
    w2: list,
    inter: int,
) -> torch.Tensor:
    """As reference.experts on packed weights: float32 (T, H). Half keeps float32 between its two products, and experts
    with few rows share what lies there."""
    half = isinstance(w13[0], Half)
    if half:
        x, weights = x * w13[0].scale, weights * w2[0].scale
    product = _unscaled if half else _product
    flat = ids.flatten()
    order = flat.argsort(stable=True)  # the assignments, expert by expert, tokens in order within each
    counts = torch.bincount(flat, minlength=first + len(w13)).tolist()
    begin, counts = sum(counts[:first]), counts[first : first + len(w13)]
    mine = order[begin : begin + sum(counts)]
    tokens, factors = mine // ids.shape[1], weights.flatten()[mine].unsqueeze(-1)
    rows, factor, parts = x[tokens].split(counts), factors.split(counts), []  # (A, H), A assignments
    for some in _bundles(counts):
        middle = _swiglu(_cat([product(rows[e], w13[e]) for e in some]), inter)
        middle = middle.mul_(_cat([factor[e] for e in some])) if half else middle.to(x.dtype)
        parts += [product(m, w2[e]) for m, e in zip(middle.split([counts[e] for e in some]), some, strict=True)]
    out = torch.zeros(x.shape, dtype=torch.float32)
    if not parts:
        return out
    every = torch.cat(parts)
    return out.index_add_(0, tokens, every if half else every.float().mul_(factors))


def _unscaled(x: torch.Tensor, w: Half) -> torch.Tensor:
    return torch.ops.quantized.linear_dynamic_fp16(x, w.data)


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _bundles(counts: list[int]) -> Iterator[list[int]]:
    """The experts that have rows: several together while they have no more than BUNDLE_ROWS, else one at a time."""
    some: list[int] = []
    for e in (e for e, n in enumerate(counts) if n):
        if some and sum(counts[other] for other in some) + counts[e] > BUNDLE_ROWS:
            yield some
            some = []
        some.append(e)
    if some:
        yield some


def _swiglu(gate_up: torch.Tensor, inter: int) -> torch.Tensor:
    """silu(gate) * up in float32, (n, inter), of gate_up (n, 2 I')."""
    gate, up = reference.halves(gate_up, inter)
    return F.silu(gate.float()).mul_(up)


def mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: "Batch",
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As reference.mla. Sequences with a few query rows, those that decode, are absorbed together, so that W^UK and
    W^UV are read once for all; many rows go through torch's fused attention."""
    out = q_nope.new_empty(*q_nope.shape[:2], w_uv.shape[1])
    bounds, lengths = batch.cu_seqlens_q.tolist(), batch.kv_lens.tolist()
    few = reference.absorbed_rows(w_uk, w_uv, q_pe.shape[-1])
    c = w_uk.shape[2]
    cached = [reference.gather(latents, batch.pages[b], n, c, q_pe.dtype) for b, n in enumerate(lengths)]
    decoding: list[int] = []  # rows
    for b in range(len(lengths)):
        n = bounds[b + 1] - bounds[b]
        if n <= min(few, DECODE_ROWS):
            decoding += range(bounds[b], bounds[b + 1])
            continue
        rows = slice(bounds[b], bounds[b + 1])
        form = reference.mla_absorbed if n <= few else mla_expanded
        out[rows] = form(q_nope[rows], q_pe[rows], cached[b], batch.positions[rows], w_uk, w_uv, scale)
    if not decoding:
        return out
    some = len(decoding) < len(out)
    at = torch.tensor(decoding) if some else slice(None)
    q = torch.cat((torch.einsum("nhd,hdc->nhc", q_nope[at], w_uk), q_pe[at]), dim=-1)  # (rows, N, C + R)
    o, begin = [], 0
    while begin < len(decoding):
        b = bisect_right(bounds, decoding[begin]) - 1
        n = bounds[b + 1] - bounds[b]
        o.append(_attend(q[begin : begin + n], cached[b], batch.positions[bounds[b] : bounds[b + 1]], scale)[..., :c])
        begin += n
    values = torch.einsum("nhc,hvc->nhv", torch.cat(o), w_uv)
    if not some:
        return values
    out[at] = values
    return out


def _attend(q: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence's absorbed queries (n, N, d) over its latents (L, d): (n, N, d).

    The heads share their keys, so they are rows of one query, split up only for the threads to share them out.
    """
    n, n_heads, d = q.shape
    groups = math.gcd(n_heads, torch.get_num_threads())
    rows = q.view(n, groups, -1, d).transpose(0, 1).reshape(1, groups, -1, d)
    keys = latents.expand(1, groups, -1, -1)
    mask = None
    if n > 1:
        seen = positions.unsqueeze(1) >= torch.arange(len(latents))  # (n, L)
        mask = seen.repeat_interleave(n_heads // groups, dim=0)
    o = F.scaled_dot_product_attention(rows, keys, keys, attn_mask=mask, scale=scale)
    return o.view(groups, n, -1, d).transpose(0, 1).reshape(n, n_heads, d)


def mla_expanded(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    positions: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As reference.mla_expanded: (n, N, dn), (n, N, R), (L, C + R) -> (n, N, dv), keys and values expanded at once,
    in float32 where the processor multiplies that faster."""
    n_heads, dv, c = w_uv.shape
    width = w_uk.shape[1] + q_pe.shape[-1]
    dtype = torch.float32 if half_is_faster() else latents.dtype
    if dv > width or len(latents) * n_heads * width * 2 * dtype.itemsize > EXPANDED_BYTES:
        return reference.mla_expanded(q_nope, q_pe, latents, positions, w_uk, w_uv, scale)
    c_kv, k_pe = latents.to(dtype).split([c, latents.shape[1] - c], dim=-1)
    k = torch.cat((_per_head(c_kv, w_uk.to(dtype)), k_pe.unsqueeze(1).expand(-1, n_heads, -1)), dim=-1)  # (L, N, dn+R)
    v = F.pad(_per_head(c_kv, w_uv.to(dtype)), (0, width - dv))  # fused attention wants keys and values of one width
    q = torch.cat((q_nope, q_pe), dim=-1).to(dtype)
    fresh = len(q) == len(k)
    mask = None if fresh else positions.unsqueeze(1) >= torch.arange(len(k))
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=fresh, scale=scale)
    return o[0, :, :, :dv].transpose(0, 1).to(q_nope.dtype)


def _per_head(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (L, C) by each head's w (N, d, C), as one product: (L, N, d)."""
    return F.linear(x, w.flatten(0, 1)).unflatten(-1, w.shape[:2])

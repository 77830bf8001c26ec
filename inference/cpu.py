"""The few ops that have a faster form on a CPU than plain torch. Each is held to its reference by a test."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import kernel_cpu
import reference
from kernel_cpu import Packed
from reference import Quantised, Scales

if TYPE_CHECKING:
    from model import Batch

EXPANDED_BYTES = 1 << 30  # the most that one sequence's expanded keys and values may take
BUNDLE_ROWS = 64  # of several experts together: with more the two products are what takes the time
DECODE_ROWS = 16  # query rows of a sequence that still count as decoding: a token and its drafts


@functools.cache
def float32_is_faster() -> bool:
    """Whether this processor multiplies many rows faster in float32 than in bfloat16."""
    info = Path("/proc/cpuinfo")
    return info.exists() and slow_bfloat16(info.read_text())


def slow_bfloat16(cpuinfo: str) -> bool:
    """Whether an x86 processor has no instruction for bfloat16 products, or one that is slower than float32's.

    Intel's cores without AMX take as long for a bfloat16 product instruction, of 32 pairs, as for four of float32, of
    16 each (measured on a Xeon of 2023: 83 GFLOPS a core against 160); AMD's and AMX are faster in bfloat16.
    """
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return bool(flags) and "amx_bf16" not in flags and ("avx512_bf16" not in flags or "GenuineIntel" in cpuinfo)


def _compiled(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and kernel_cpu.library() is not None


def pack(w: torch.Tensor) -> Any:
    """A bf16 weight (N, K), or each expert of a stack (E, N, K), laid out for matrix products: as kernel_cpu.c reads
    it, or as oneDNN does, where bfloat16 products are an instruction, or there is no compiler.

    Packed once, a product with few rows reads the weights at the memory's speed, where F.linear repacks them every
    time. Other dtypes, and builds of torch with neither, keep the plain tensor.
    """
    if w.dtype != torch.bfloat16:
        return w
    if _compiled(w) and float32_is_faster():
        return kernel_cpu.pack(w)
    if not torch.backends.mkldnn.is_available():
        return w
    pack_one = torch.ops.mkldnn._reorder_linear_weight
    return [pack_one(e) for e in w] if w.dim() == 3 else pack_one(w)


def pack_float32(w: torch.Tensor) -> Any:
    """A weight (N, K) for products in float32: kernel_cpu's have half the bytes of widened ones."""
    return kernel_cpu.pack(w) if _compiled(w) else w.float()


def is_packed(w: Any) -> bool:
    """Whether `pack` or `pack_float32` made this."""
    return isinstance(w, Packed | list) or w.is_mkldnn


def is_steady(w: Any) -> bool:
    """Whether a row's product with this does not depend, to the bit, on the other rows."""
    return isinstance(w, Packed)


def linear(x: torch.Tensor, w: Any) -> torch.Tensor:
    """x (T, K) by a packed (N, K), in x's dtype."""
    if isinstance(w, Packed):
        return kernel_cpu.linear(x, w, x.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def linear_float32(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """x (T, K) by (N, K), in float32."""
    return kernel_cpu.linear(x, w, torch.float32)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    delta: torch.Tensor | None = None,
    fp8: Scales | None = None,
    keep: bool = True,
) -> tuple[torch.Tensor | Quantised, torch.Tensor]:
    """As reference.norm."""
    if not _compiled(x):
        return reference.norm(x, weight, eps, delta, fp8, keep)
    y, total = kernel_cpu.norm(x, weight, eps, delta)
    return reference.quantised(y, fp8, keep) if fp8 else y, total


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
    """As reference.latent_write."""
    form = kernel_cpu if _compiled(c_kv) and latents.dtype == torch.bfloat16 else reference
    return form.latent_write(c_kv, k_pe, weight, eps, cos, sin, q_pe, slots, latents)


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, rule: reference.Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.route."""
    return (reference if kernel_cpu.library() is None else kernel_cpu).route(logits, bias, rule)


def silu_mul(gate_up: torch.Tensor, inter: int, fp8: Scales | None = None) -> torch.Tensor | Quantised:
    """As reference.silu_mul; without a compiler with one float32 tensor instead of three."""
    if _compiled(gate_up):
        y = kernel_cpu.silu_mul(gate_up, inter)
    else:
        y = _swiglu(gate_up, inter).to(gate_up.dtype)
    return reference.quantised(y, fp8) if fp8 else y


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    w13: Any,
    w2: Any,
    inter: int,
    shared: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """As ops.experts on packed weights."""
    if isinstance(w13, Packed):
        return kernel_cpu.experts(x, weights, ids, first, w13, w2, inter, None if shared is None else shared())
    flat = ids.flatten()
    order = flat.argsort(stable=True)  # the assignments, expert by expert, tokens in order within each
    counts = torch.bincount(flat, minlength=first + len(w13)).tolist()
    begin, counts = sum(counts[:first]), counts[first : first + len(w13)]
    mine = order[begin : begin + sum(counts)]
    tokens, factors = mine // ids.shape[1], weights.flatten()[mine].unsqueeze(-1)
    rows, parts = x[tokens].split(counts), []  # (A, H), A assignments
    for some in _bundles(counts):
        middle = _swiglu(_cat([linear(rows[e], w13[e]) for e in some]), inter).to(x.dtype)
        parts += [linear(m, w2[e]) for m, e in zip(middle.split([counts[e] for e in some]), some, strict=True)]
    out = torch.zeros(x.shape, dtype=torch.float32)
    if parts:
        out.index_add_(0, tokens, torch.cat(parts).float().mul_(factors))
    if shared is not None:
        out += shared()
    return out.to(x.dtype)


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
    if "lists" not in batch.memo:
        batch.memo["lists"] = batch.cu_seqlens_q.tolist(), batch.kv_lens.tolist()
    bounds, lengths = batch.memo["lists"]
    few = reference.absorbed_rows(w_uk, w_uv, q_pe.shape[-1])
    c, compiled = w_uk.shape[2], _compiled(q_nope) and latents.dtype == torch.bfloat16
    most = few if compiled else min(few, DECODE_ROWS)
    if compiled:
        kernel_cpu.mla(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, most, out)
    decoding: dict[int, torch.Tensor] = {}  # their latents
    for b, length in enumerate(lengths):
        rows = slice(bounds[b], bounds[b + 1])
        n = rows.stop - rows.start
        if n <= most and compiled:
            continue
        cached = reference.gather(latents, batch.pages[b], length, c, q_pe.dtype)
        if n <= most:
            decoding[b] = cached
            continue
        form = reference.mla_absorbed if n <= few else mla_expanded
        out[rows] = form(q_nope[rows], q_pe[rows], cached, batch.positions[rows], w_uk, w_uv, scale)
    if not decoding:
        return out
    together = [t for b in decoding for t in range(bounds[b], bounds[b + 1])]
    at = torch.tensor(together) if len(together) < len(out) else slice(None)
    q = torch.cat((torch.einsum("nhd,hdc->nhc", q_nope[at], w_uk), q_pe[at]), dim=-1)  # (rows, N, C + R)
    o, begin = [], 0
    for b, cached in decoding.items():
        n = bounds[b + 1] - bounds[b]
        o.append(_attend(q[begin : begin + n], cached, batch.positions[bounds[b] : bounds[b + 1]], scale)[..., :c])
        begin += n
    values = torch.einsum("nhc,hvc->nhv", torch.cat(o), w_uv)
    if len(together) == len(out):
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
    dtype = torch.float32 if float32_is_faster() else latents.dtype
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

"""The few ops that have a faster form on a CPU than plain torch. Each is held to its reference by a test."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from core.batch import Batch
from ops import reference
from ops.cpu import kernels as kernel_cpu
from ops.cpu.kernels import Packed
from ops.formats import Quantised, Routing, Scales

EXPANDED_BYTES = 1 << 30  # the most that one sequence's expanded keys and values may take
TORCH_DECODE_ROWS = 16  # query rows of a sequence that still count as decoding: a token and its drafts


def _compiled(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and kernel_cpu.library() is not None


def pack(w: torch.Tensor) -> Any:
    """A bf16 weight (N, K), or each expert of a stack (E, N, K), laid out as kernel_cpu.c reads it: a product with few
    rows then reads the weights at the memory's speed. Other dtypes keep the plain tensor, and so do all where nothing
    is compiled."""
    return kernel_cpu.pack(w) if _compiled(w) else w


def pack_float32(w: torch.Tensor) -> Any:
    """A weight (N, K) for products in float32: kernel_cpu's have half the bytes of widened ones."""
    return kernel_cpu.pack(w) if _compiled(w) else w.float()


def is_packed(w: Any) -> bool:
    """Whether `pack` or `pack_float32` made this: a row's product with it does not depend on other rows, to the bit."""
    return isinstance(w, Packed)


def linear(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """x (T, K) by a packed (N, K), in x's dtype."""
    return kernel_cpu.linear(x, w, x.dtype)


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


def route(logits: torch.Tensor, bias: torch.Tensor | None, rule: Routing) -> tuple[torch.Tensor, torch.Tensor]:
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
    w13: Packed,
    w2: Packed,
    inter: int,
    shared: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """As ops.experts on packed weights."""
    return kernel_cpu.experts(x, weights, ids, first, w13, w2, inter, None if shared is None else shared())


def _swiglu(gate_up: torch.Tensor, inter: int) -> torch.Tensor:
    """silu(gate) * up in float32, (n, inter), of gate_up (n, 2 I')."""
    gate, up = reference.halves(gate_up, inter)
    return F.silu(gate.float()).mul_(up)


def mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
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
    most = few if compiled else min(few, TORCH_DECODE_ROWS)
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
    in float32: without AMX a processor multiplies no other type faster."""
    n_heads, dv, c = w_uv.shape
    width = w_uk.shape[1] + q_pe.shape[-1]
    dtype = torch.float32
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

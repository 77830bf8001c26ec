"""MLA on torch's fused attention, for CPUs. Each function is held to its form in ops/reference.py by a test."""

import math

import torch
import torch.nn.functional as F

from core.batch import Batch
from ops import reference

EXPANDED_BYTES = 1 << 30  # the most that one sequence's expanded keys and values may take
TORCH_DECODE_ROWS = 16  # query rows of a sequence that still count as decoding: a token and its drafts


def lengths_of(batch: Batch) -> tuple[list[int], list[int]]:
    """cu_seqlens_q and kv_lens as lists, made once for all layers."""
    if "lists" not in batch.memo:
        batch.memo["lists"] = batch.cu_seqlens_q.tolist(), batch.kv_lens.tolist()
    return batch.memo["lists"]


def decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
    most: int,
    out: torch.Tensor,
) -> None:
    """reference.mla, absorbed, for sequences with at most `most` query rows: fills their rows of out (T, N, dv).

    W^UK and W^UV are read once for all these sequences together.
    """
    bounds, lengths = lengths_of(batch)
    c = w_uk.shape[2]
    few = [b for b in range(len(lengths)) if bounds[b + 1] - bounds[b] <= most]
    if not few:
        return
    cached = [reference.gather(latents, batch.pages[b], lengths[b], c, q_pe.dtype) for b in few]
    rows = [t for b in few for t in range(bounds[b], bounds[b + 1])]
    at = torch.tensor(rows) if len(rows) < len(out) else slice(None)
    q = torch.cat((torch.einsum("nhd,hdc->nhc", q_nope[at], w_uk), q_pe[at]), dim=-1)  # (rows, N, C + R)
    o, begin = [], 0
    for b, keys in zip(few, cached, strict=True):
        n = bounds[b + 1] - bounds[b]
        o.append(_attend(q[begin : begin + n], keys, batch.positions[bounds[b] : bounds[b + 1]], scale)[..., :c])
        begin += n
    out[at] = torch.einsum("nhc,hvc->nhv", torch.cat(o), w_uv)


def prefill(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
    most: int,
    out: torch.Tensor,
) -> None:
    """reference.mla for sequences with more than `most` query rows: fills their rows of out (T, N, dv)."""
    bounds, lengths = lengths_of(batch)
    absorbed = reference.absorbed_rows(w_uk, w_uv, q_pe.shape[-1])
    for b, length in enumerate(lengths):
        rows = slice(bounds[b], bounds[b + 1])
        n = rows.stop - rows.start
        if n > most:
            form = reference.mla_absorbed if n <= absorbed else mla_expanded
            cached = reference.gather(latents, batch.pages[b], length, w_uk.shape[2], q_pe.dtype)
            out[rows] = form(q_nope[rows], q_pe[rows], cached, batch.positions[rows], w_uk, w_uv, scale)


def _attend(q: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence's absorbed queries (n, N, d) over its latents (L, d): (n, N, d).

    The heads share their keys, so they are rows of one query, in one group per thread where the heads divide by it.
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
    """reference.mla_expanded with all keys and values at once: (n, N, dn), (n, N, R), (L, C + R) -> (n, N, dv).

    They are expanded in float32, the fastest type of the processors that were measured: AVX2 and AVX-512 without AMX.
    """
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

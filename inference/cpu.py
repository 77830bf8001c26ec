"""The few ops that have a faster form on a CPU than plain torch. Each is held to its reference by a test."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import reference
from reference import Quantised, Scales

if TYPE_CHECKING:
    from model import Batch

EXPANDED_BYTES = 1 << 30  # the most that one sequence's expanded keys and values may take


def pack(w: torch.Tensor) -> Any:
    """A bf16 weight (N, K), or each expert of a stack (E, N, K), in the layout oneDNN's matrix product wants.

    Packed once, a product with few rows reads the weights at the memory's speed, where F.linear repacks them every
    time. Other dtypes, and builds of torch without oneDNN, keep the plain tensor.
    """
    if w.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return w
    if w.dim() == 3:
        return [pack(e) for e in w]
    return torch.ops.mkldnn._reorder_linear_weight(w)


def is_packed(w: Any) -> bool:
    return isinstance(w, torch.Tensor) and w.is_mkldnn


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (T, K) by a packed (N, K)."""
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def silu_mul(gate_up: torch.Tensor, inter: int, fp8: Scales | None = None) -> torch.Tensor | Quantised:
    """As reference.silu_mul, with one float32 tensor instead of three."""
    gate, up = reference.halves(gate_up, inter)
    y = F.silu(gate.float()).mul_(up).to(gate.dtype)
    return reference.quantised(y, fp8) if fp8 else y


def mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: "Batch",
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As reference.mla, except that many query rows go through torch's fused attention."""
    return reference.mla(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, expanded=mla_expanded)


def mla_expanded(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    positions: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As reference.mla_expanded: (n, N, dn), (n, N, R), (L, C + R) -> (n, N, dv), keys and values expanded at once."""
    n_heads, dv, c = w_uv.shape
    width = w_uk.shape[1] + q_pe.shape[-1]
    if dv > width or len(latents) * n_heads * width * 2 * latents.itemsize > EXPANDED_BYTES:
        return reference.mla_expanded(q_nope, q_pe, latents, positions, w_uk, w_uv, scale)
    c_kv, k_pe = latents[:, :c], latents[:, c:]
    k = torch.cat((_per_head(c_kv, w_uk), k_pe.unsqueeze(1).expand(-1, n_heads, -1)), dim=-1)  # (L, N, dn + R)
    v = F.pad(_per_head(c_kv, w_uv), (0, width - dv))  # the fused kernel wants keys and values of one width
    q = torch.cat((q_nope, q_pe), dim=-1)
    fresh = len(q) == len(k)
    mask = None if fresh else positions.unsqueeze(1) >= torch.arange(len(k))
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=fresh, scale=scale)
    return o[0, :, :, :dv].transpose(0, 1)


def _per_head(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (L, C) by each head's w (N, d, C), as one product: (L, N, d)."""
    return F.linear(x, w.flatten(0, 1)).unflatten(-1, w.shape[:2])

"""Multi-head latent attention in Triton, as reference.mla specifies it: decode.py for sequences with few query rows,
prefill.py for those with many.

Neither reads from the device: the host knows bounds on sequences, rows and keys (core.batch.BatchBounds).
"""

from collections.abc import Callable

import torch

from core.batch import Batch
from ops.gpu.decode import decode
from ops.gpu.prefill import prefill

ByRows = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]


def mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
    by_rows: ByRows | None = None,
) -> torch.Tensor:
    """As reference.mla, for a batch whose `decode` and `prefill` bounds say what the host knows of it.

    `by_rows(product, x)` multiplies rows in blocks of one size. Given, every sequence goes through the absorbed form,
    with splits and tiles of one size, so that a token's result does not depend on the rest of its batch.
    """
    assert batch.whole.n == len(batch.kv_lens), "the host does not know the batch's bounds"
    few = batch.decode if by_rows is None else batch.whole
    n_heads, dv, c = w_uv.shape
    out = torch.empty(len(q_nope), n_heads, dv, dtype=q_nope.dtype, device=q_nope.device)
    if few.n:
        own = slice(0, few.tokens)
        q = torch.empty(few.tokens, n_heads, c, dtype=q_nope.dtype, device=q_nope.device)
        _per_head(q_nope[own], w_uk, q, by_rows)
        o = decode(q, q_pe[own], latents, batch, few, scale, fixed=by_rows is not None)
        _per_head(o, w_uv.mT, out[own], by_rows)
    if few.n < len(batch.kv_lens):
        prefill(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, out)
    return out


def _per_head(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, by_rows: ByRows | None) -> None:
    """out (T, N, b) = x (T, N, a) by each head's w (N, a, b)."""
    if by_rows is None:
        torch.bmm(x.transpose(0, 1), w, out=out.transpose(0, 1))
    else:
        out.copy_(by_rows(lambda rows: torch.bmm(rows.transpose(0, 1), w).transpose(0, 1), x))

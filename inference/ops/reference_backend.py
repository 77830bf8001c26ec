"""The backend that computes every op as ops/reference.py specifies it; those for CPUs and GPUs derive from it.

A backend is an object with one method per op. The model is given one when it is built (ops/backend.py chooses it) and
calls nothing else, so that two models in one process can compute in two ways.

Letters: T tokens, H the model's width, N and K a weight's output and input channels; model.py has the others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from core.batch import Batch
from ops import distributions, reference
from ops.distributions import SamplingMetadata
from ops.formats import PartialSums, Quantised, Routing, Scales, Weight

ROW_BLOCK = 16  # rows of every matrix product of a batch-invariant backend


class ReferenceBackend:
    """Every op in plain torch, on any device.

    With `batch_invariant` a token's result does not depend, to the bit, on the rest of its batch. The order in which a
    product adds up depends on the product's shape, so every product gets one shape: rows in blocks of ROW_BLOCK, the
    last one filled up with zeros; and attention takes one form, over key tiles of one size.
    """

    def __init__(self, batch_invariant: bool = False):
        self.batch_invariant = batch_invariant

    # ----------------------------------------------------------------------------------------------------------------
    # Weights, once after loading
    # ----------------------------------------------------------------------------------------------------------------

    def use_huge_pages(self, memory: torch.Tensor) -> None:
        """Asks for large pages under weights or latents that nothing was written to: fewer addresses to look up."""

    def pack_weight(self, w: Weight) -> Weight:
        """The weight of `linear` or `experts` in the layout that this backend multiplies. May overwrite w's data."""
        return w

    def pack_float32_weight(self, w: torch.Tensor) -> Any:
        """The weight (N, K) of `project_float32` or `router` in the layout that this backend multiplies."""
        return w

    def weight_dequant(
        self,
        w: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype = torch.bfloat16,
        block: tuple[int, int] = reference.BLOCK,
        zero: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Quantised w (..., N, K) times its block scales, rounded once to dtype. See reference.weight_dequant."""
        return reference.weight_dequant(w, scale, dtype, block, zero)

    # ----------------------------------------------------------------------------------------------------------------
    # Products
    # ----------------------------------------------------------------------------------------------------------------

    def act_quant(self, x: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x (..., K) to FP8 (..., K) and float32 scales (..., ceil(K/128)). See reference.act_quant."""
        return reference.act_quant(x, scale_fmt=scale_fmt)

    def linear(self, x: torch.Tensor | Quantised, w: Weight) -> torch.Tensor:
        """x (T, K) times w (N, K) transposed, in x's dtype: (T, N).

        By a plain weight, a matrix product. By an FP8 weight whose `gemm` is "fp8", W8A8, for which x is quantised
        unless it comes Quantised; by one whose `gemm` is "bf16", and by int8, W8A16; by INT4, W4A16.
        """
        if isinstance(x, Quantised):
            assert w.fp8, "quantised activations by a weight that takes plain ones"
            return self.fp8_gemm(x.q, x.s, w, x.dtype)
        if w.fp8:
            return self.fp8_gemm(*self.act_quant(x, w.scale_fmt), w, x.dtype)
        if w.scale is not None:
            return self.w4a16_gemm(x, w) if w.data.dtype == torch.uint8 else self.w8a16_gemm(x, w)
        return self._by_rows(lambda rows: F.linear(rows, w.data), x)

    def partial_linear(self, x: torch.Tensor | Quantised, w: Weight) -> torch.Tensor | PartialSums:
        """`linear` for an op that takes PartialSums, in which form a backend may leave the product."""
        return self.linear(x, w)

    def fp8_gemm(self, q: torch.Tensor, s: torch.Tensor, w: Weight, dtype: torch.dtype) -> torch.Tensor:
        """FP8 q (T, K) with its scales s (T, ceil(K/128)) times FP8 w (N, K) transposed: (T, N) in dtype."""
        assert w.scale is not None
        data, scale = w.data, w.scale
        return self._by_rows(lambda q, s: reference.fp8_gemm(q, s, data, scale, dtype), q, s)

    def w8a16_gemm(self, x: torch.Tensor, w: Weight) -> torch.Tensor:
        """x (T, K) times FP8 or int8 w (N, K) transposed, widened exactly: (T, N) in x's dtype."""
        assert w.scale is not None
        data, scale, block = w.data, w.scale, w.block
        return self._by_rows(lambda rows: reference.w8a16_gemm(rows, data, scale, block=block), x)

    def w4a16_gemm(self, x: torch.Tensor, w: Weight) -> torch.Tensor:
        """x (T, K) times INT4 w (N, K) transposed, widened exactly: (T, N) in x's dtype."""
        assert w.scale is not None
        data, scale, zero = w.data, w.scale, w.zero
        return self._by_rows(lambda rows: reference.w4a16_gemm(rows, data, scale, zero), x)

    def project_float32(self, x: torch.Tensor, w: Any) -> torch.Tensor:
        """x (T, K) times w (N, K) transposed, in float32 (T, N); w as pack_float32_weight made it."""
        return self._by_rows(lambda rows: reference.project_float32(rows, w), x)

    def _by_rows(self, product: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return in_row_blocks(product, *inputs) if self.batch_invariant else product(*inputs)

    # ----------------------------------------------------------------------------------------------------------------
    # Row by row
    # ----------------------------------------------------------------------------------------------------------------

    def norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        delta: torch.Tensor | None = None,
        fp8: Scales | None = None,
        keep: bool = True,
    ) -> tuple[torch.Tensor | Quantised, torch.Tensor]:
        """RMSNorm of x (T, H) + delta, quantised if `fp8` names the scales, and the sum. See reference.norm."""
        return reference.norm(x, weight, eps, delta, fp8, keep)

    def silu_mul(
        self, gate_up: torch.Tensor | PartialSums, inter: int, fp8: Scales | None = None
    ) -> torch.Tensor | Quantised:
        """silu(gate) * up of stacked gate_up (T, 2 I'): (T, inter), quantised if `fp8` names the scales."""
        return reference.silu_mul(gate_up, inter, fp8)

    # ----------------------------------------------------------------------------------------------------------------
    # Mixture of experts
    # ----------------------------------------------------------------------------------------------------------------

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, rule: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Router logits (T, E) float32 to weights (T, K) float32 and expert ids (T, K) int64. See reference.route."""
        n = len(logits)
        if self.batch_invariant:  # torch's sigmoid on a CPU computes the numbers behind the last whole vector otherwise
            logits = F.pad(logits, (0, 0, 0, -n % ROW_BLOCK))
        weights, ids = reference.route(logits, bias, rule)
        return weights[:n], ids[:n]

    def router(
        self, x: torch.Tensor, w: Any, bias: torch.Tensor | None, rule: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, H), w (E, H) as pack_float32_weight made it, bias (E,) float32 to weights (T, K) float32 and expert
        ids (T, K) int64. The logits are float32."""
        return self.route(self.project_float32(x, w), bias, rule)

    def experts(
        self,
        x: torch.Tensor | Quantised,
        weights: torch.Tensor,
        ids: torch.Tensor,
        first: int,
        w13: Weight,
        w2: Weight,
        inter: int,
        shared: Callable[[], torch.Tensor] | None = None,
        n_experts: int | None = None,
        shared_weights: tuple[Weight, Weight] | None = None,
    ) -> torch.Tensor:
        """The weighted sum of the SwiGLU experts this rank holds, numbered from `first`, plus what `shared` returns.

        x (T, H), weights (T, K) float32, ids (T, K); w13 stacked (E_local, 2 I', H), each expert's gate and up as
        silu_mul takes them, w2 (E_local, H, inter). Summed in float32, rounded once to x's dtype: (T, H). n_experts:
        how many there are on all ranks, for an estimate of the tokens per expert (default: those here are all).
        shared_weights: those of `shared`, where it is such an expert that every token has: a backend may compute it so.
        """
        x = x if w13.fp8 else plain_tokens(x)

        def run(e: int, rows: torch.Tensor | Quantised) -> torch.Tensor:
            return self.linear(self.silu_mul(self.linear(rows, w13.expert(e)), inter), w2.expert(e))

        y = reference.experts(x, weights, ids, first, len(w13.data), run)
        if shared is not None:
            y += shared()
        return y.to(x.dtype)

    # ----------------------------------------------------------------------------------------------------------------
    # Attention
    # ----------------------------------------------------------------------------------------------------------------

    def norm_latents(
        self,
        kv: torch.Tensor | PartialSums,
        kv_weight: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        latents: torch.Tensor,
        q: torch.Tensor | PartialSums | None = None,
        q_weight: torch.Tensor | None = None,
        fp8: Scales | None = None,
    ) -> torch.Tensor | Quantised | None:
        """Of kv (T, C + R) writes the normed latent and the rotated key at the tokens' slots; returns the norm of q
        (T, Q), quantised if `fp8` names the scales. See reference.norm_latents."""
        return reference.norm_latents(kv, kv_weight, eps, cos, sin, slots, latents, q, q_weight, fp8)

    def mla(
        self,
        q: torch.Tensor | PartialSums,
        cos: torch.Tensor,
        sin: torch.Tensor,
        latents: torch.Tensor,
        batch: Batch,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        scale: float,
        fp8: Scales | None = None,
    ) -> torch.Tensor | Quantised:
        """Attention of ragged queries over their pages. q (T, N (dn + R)), each head's rotary channels last and not yet
        rotated, to (T, N dv), quantised if `fp8` names the scales. See reference.rotary and reference.mla."""
        n_heads, dn, _ = w_uk.shape
        q_nope, q_pe = reference.summed(q).unflatten(-1, (n_heads, -1)).split([dn, 2 * cos.shape[1]], dim=-1)
        o = self._attend(q_nope, self._rotary(q_pe, cos, sin), latents, batch, w_uk, w_uv, scale).flatten(1)
        return reference.quantised(o, fp8) if fp8 else o

    def _rotary(self, q_pe: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return reference.rotary(q_pe, cos, sin)

    def _attend(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        latents: torch.Tensor,
        batch: Batch,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """(T, N, dn) and rotated (T, N, R) to (T, N, dv)."""
        if self.batch_invariant:
            return reference.mla_batch_invariant(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, ROW_BLOCK)
        return reference.mla(q_nope, q_pe, latents, batch, w_uk, w_uv, scale)

    # ----------------------------------------------------------------------------------------------------------------
    # Sampling
    # ----------------------------------------------------------------------------------------------------------------

    def sample(
        self, logits: torch.Tensor, choice: torch.Tensor, metadata: SamplingMetadata, keep: bool = False
    ) -> tuple[torch.Tensor, Sequence[Any]]:
        """Rows of logits (n, V) float32 to what is sampled from them, (3, rows) int64, and with `keep` the
        distributions that tokens were drawn from, in the backend's own form. See distributions.sample."""
        return distributions.sample(logits, choice, metadata, keep)


def in_row_blocks(product: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """product(*inputs) for inputs (T, …), computed in blocks of ROW_BLOCK rows; zeros fill the last block up."""
    n = len(inputs[0])
    if n % ROW_BLOCK:
        inputs = tuple(torch.cat((x, x.new_zeros(ROW_BLOCK - n % ROW_BLOCK, *x.shape[1:]))) for x in inputs)
    blocks = zip(*(x.split(ROW_BLOCK) for x in inputs), strict=True)
    return torch.cat([product(*block) for block in blocks])[:n]


def plain_tokens(x: torch.Tensor | Quantised) -> torch.Tensor:
    """Tokens as they were before quantisation, which Quantised must have kept."""
    if isinstance(x, Quantised):
        assert x.x is not None, "activations that exist only quantised, where plain ones are needed"
        return x.x
    return x

"""The backend for GPUs: the Triton kernels of this folder. Importing it imports Triton."""

from collections.abc import Callable
from typing import Any

import torch

from core.batch import Batch
from ops import reference
from ops.formats import PartialSums, Quantised, Routing, Scales, Weight
from ops.gpu import around_attention, attention, decode, fused, gemm, moe, norm_latents, quantisation, router, sample
from ops.gpu.device import fp8_dtype
from ops.reference_backend import ROW_BLOCK, ReferenceBackend, in_row_blocks

ROUTER_TILES = 1024  # tiles of tokens, 65,536 of them, for which the router finds counters


class GpuBackend(ReferenceBackend):
    """Plain matrix products are cuBLAS's, the rest is Triton. Batch-invariant, a kernel keeps one tile for any number
    of rows, namely that for ROW_BLOCK."""

    norm = staticmethod(fused.norm)
    silu_mul = staticmethod(fused.silu_mul)
    norm_latents = staticmethod(norm_latents.norm_latents)
    sample = staticmethod(sample.sample)

    def __init__(self, batch_invariant: bool = False):
        super().__init__(batch_invariant)
        self._counters: dict[torch.device, torch.Tensor] = {}  # zeros between two launches of the router

    @property
    def _rows(self) -> int | None:
        """For how many rows a kernel's tile is to be chosen, whatever there are."""
        return ROW_BLOCK if self.batch_invariant else None

    def pack_weight(self, w: Weight) -> Weight:
        """FP8 weights of W8A8 in the FP8 type that the device multiplies; INT4, and scales and zero points of groups of
        channels, in the order in which the kernels read them."""
        if w.scale is not None and w.block[0] == 1:
            int4 = w.data.dtype == torch.uint8
            if gemm.serves(w.data.shape[-1] * (2 if int4 else 1), w.block):
                data = quantisation.interleave(w.data) if int4 else w.data
                zero = None if w.zero is None else quantisation.by_groups(w.zero)
                return w._replace(data=data, scale=quantisation.by_groups(w.scale), zero=zero)
        if w.fp8 and w.scale is not None and fp8_dtype(w.data.device) == torch.float8_e4m3fnuz:
            data, scale = reference.to_fnuz(w.data, w.scale)
            return w._replace(data=data, scale=scale)
        return w

    def weight_dequant(
        self,
        w: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype = torch.bfloat16,
        block: tuple[int, int] = reference.BLOCK,
        zero: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if w.dtype in (torch.int8, torch.uint8):  # of wkv_b and in conversions only: torch's own ops do
            return super().weight_dequant(w, scale, dtype, block, zero)
        return quantisation.weight_dequant(w, scale, dtype)

    def act_quant(self, x: torch.Tensor, scale_fmt: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return quantisation.act_quant(x, scale_fmt=scale_fmt)

    def fp8_gemm(self, q: torch.Tensor, s: torch.Tensor, w: Weight, dtype: torch.dtype) -> torch.Tensor:
        assert w.scale is not None
        return gemm.fp8_gemm(q, s, w.data, w.scale, dtype, self._rows)

    def partial_linear(self, x: torch.Tensor | Quantised, w: Weight) -> torch.Tensor | PartialSums:
        if w.scale is None or not _in_triton(x, w):
            return self.linear(x, w)
        return gemm.partial_linear(moe.quantised_for(w, x) if isinstance(x, torch.Tensor) else x, w, self._rows)

    def linear(self, x: torch.Tensor | Quantised, w: Weight) -> torch.Tensor:
        if w.data.dtype == torch.int32:
            assert isinstance(x, torch.Tensor), "quantised activations by a weight that takes plain ones"
            return self.w4a16_gemm(x, w)
        return super().linear(x, w)

    def w8a16_gemm(self, x: torch.Tensor, w: Weight) -> torch.Tensor:
        assert w.scale is not None
        if not _in_triton(x, w):
            return super().w8a16_gemm(x, w)
        return gemm.w8a16_gemm(x, w.data, w.scale, x.dtype, self._rows, w.block)

    def w4a16_gemm(self, x: torch.Tensor, w: Weight) -> torch.Tensor:
        """Of a weight that pack_weight has had; another, or in float32, as the reference."""
        assert w.scale is not None
        if not _in_triton(x, w):
            stored = quantisation.natural(w.data) if w.data.dtype == torch.int32 else w.data
            return super().w4a16_gemm(x, w._replace(data=stored))
        return gemm.w4a16_gemm(x, w.data, w.scale, w.zero, x.dtype, self._rows)

    def project_float32(self, x: torch.Tensor, w: Any) -> torch.Tensor:
        """In bfloat16 one product that returns its float32 sums."""
        if x.dtype == w.dtype == torch.bfloat16:
            return self._by_rows(lambda rows: torch.mm(rows, w.T, out_dtype=torch.float32), x)
        return super().project_float32(x, w)

    def router(
        self, x: torch.Tensor, w: Any, bias: torch.Tensor | None, rule: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.float() if w.dtype == torch.float32 else x
        if x.device not in self._counters:
            self._counters[x.device] = torch.zeros(ROUTER_TILES, dtype=torch.int32, device=x.device)
        return router.router(x, w, bias, rule, self.batch_invariant, self._counters[x.device])

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
        if not all(_in_triton(x, w) for w in (w13, w2)):
            return super().experts(x, weights, ids, first, w13, w2, inter, shared, n_experts)
        invariant = self.batch_invariant
        return moe.experts(x, weights, ids, first, w13, w2, inter, shared, n_experts, invariant, shared_weights)

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
        """In bfloat16 the batch's first sequences, of few query rows, are decoded and the others prefilled, and a batch
        that only decodes takes three launches; float32 attends as the reference does."""
        (n_heads, dn, c), dv = w_uk.shape, w_uv.shape[1]
        if w_uk.dtype != torch.bfloat16:
            return super().mla(gemm.summed(q), cos, sin, latents, batch, w_uk, w_uv, scale, fp8)
        if batch.prefill.n or self.batch_invariant:
            q = gemm.summed(q)
            _, q_pe = around_attention.absorb(q, None, cos, sin, n_heads, dn, c)
            q_nope = q.unflatten(-1, (n_heads, -1))[..., :dn]
            by_rows = in_row_blocks if self.batch_invariant else None
            o = attention.mla(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, by_rows).flatten(1)
            return self._quantised(o, fp8)
        absorbed, q_pe = around_attention.absorb(q, w_uk, cos, sin, n_heads, dn, c)
        in_kernel = fp8 if around_attention.makes_blocks(dv) else None
        values = around_attention.Values(len(q_pe), w_uv, in_kernel)
        decode.decode(absorbed, q_pe, latents, batch, batch.decode, scale, finish=values.add)
        result = values.result()
        return self._quantised(result, fp8) if isinstance(result, torch.Tensor) else result

    def _quantised(self, x: torch.Tensor, fp8: Scales | None) -> torch.Tensor | Quantised:
        if not fp8:
            return x
        return Quantised(*self.act_quant(x, None if fp8 == "float32" else fp8), dtype=x.dtype)


def _in_triton(x: torch.Tensor | Quantised, w: Weight) -> bool:
    """Whether the kernels multiply x by w: not float32 by quantised weights, which occurs in comparisons only, nor
    groups of an odd size."""
    if w.scale is None or w.fp8:
        return True
    k, stored = (x.q if isinstance(x, Quantised) else x).shape[1], w.data.dtype
    return x.dtype == torch.bfloat16 and gemm.serves(k, w.block) and stored != torch.uint8

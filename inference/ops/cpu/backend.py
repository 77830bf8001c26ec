"""The two backends for CPUs: torch's own ops arranged for speed, and in bfloat16 the kernels compiled from C."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from core.batch import Batch
from ops import reference
from ops.cpu import attention, kernels
from ops.formats import PartialSums, Quantised, Routing, Scales, Weight
from ops.reference_backend import ReferenceBackend, plain_tokens


class CpuBackend(ReferenceBackend):
    """For any dtype, and for a processor without a C compiler."""

    def pack_float32_weight(self, w: torch.Tensor) -> Any:
        """Widened once: that takes longer in every step than reading the float32 weight."""
        return w.float()

    def silu_mul(
        self, gate_up: torch.Tensor | PartialSums, inter: int, fp8: Scales | None = None
    ) -> torch.Tensor | Quantised:
        """With one float32 tensor in place of three."""
        gate, up = reference.halves(reference.summed(gate_up), inter)
        y = F.silu(gate.float()).mul_(up).to(gate.dtype)
        return reference.quantised(y, fp8) if fp8 else y

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
        """By torch's fused attention: sequences of few query rows absorbed, together; the others one by one."""
        if self.batch_invariant:
            return super()._attend(q_nope, q_pe, latents, batch, w_uk, w_uv, scale)
        out = q_nope.new_empty(*q_nope.shape[:2], w_uv.shape[1])
        most = min(reference.absorbed_rows(w_uk, w_uv, q_pe.shape[-1]), attention.TORCH_DECODE_ROWS)
        for form in (attention.decode, attention.prefill):
            form(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, most, out)
        return out


class CompiledCpuBackend(CpuBackend):
    """For activations in bfloat16. Products by a packed weight do not depend, to the bit, on the other rows, except
    that outside batch-invariant mode many rows go through the processor's matrix unit, where it has one. There all rows
    go through its instructions for pairs of bfloat16 instead, where it has those alone; and many rows by a quantised
    weight in fixed point, where it uses neither and `fixed_point` allows it."""

    def __init__(self, batch_invariant: bool = False, fixed_point: bool = False):
        super().__init__(batch_invariant)
        self.units = not batch_invariant and kernels.may_use_units(fixed_point)

    def use_huge_pages(self, memory: torch.Tensor) -> None:
        kernels.use_huge_pages(memory)

    def pack_weight(self, w: Weight) -> Weight:
        """In panels of rows, which kernels.c reads at the memory's speed even for one token; of W8A8 as it is. A stack
        whose N is whole panels is packed in place."""
        return w if w.fp8 or not kernels.packs(w) else w._replace(data=kernels.pack_weight(w), scale=None, zero=None)

    def pack_float32_weight(self, w: torch.Tensor) -> Any:
        """Half the bytes of a widened weight; one that is float32 stays so."""
        return kernels.pack(w) if w.dtype == torch.bfloat16 else w

    def linear(self, x: torch.Tensor | Quantised, w: Weight) -> torch.Tensor:
        if isinstance(w.data, kernels.Packed):
            assert isinstance(x, torch.Tensor), "quantised activations by a weight that takes plain ones"
            return kernels.linear(x, w.data, x.dtype, self.units)
        return super().linear(x, w)

    def project_float32(self, x: torch.Tensor, w: Any) -> torch.Tensor:
        return kernels.linear(x, w, torch.float32) if isinstance(w, kernels.Packed) else super().project_float32(x, w)

    def norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        delta: torch.Tensor | None = None,
        fp8: Scales | None = None,
        keep: bool = True,
    ) -> tuple[torch.Tensor | Quantised, torch.Tensor]:
        y, total = kernels.norm(x, weight, eps, delta)
        return reference.quantised(y, fp8, keep) if fp8 else y, total

    def silu_mul(
        self, gate_up: torch.Tensor | PartialSums, inter: int, fp8: Scales | None = None
    ) -> torch.Tensor | Quantised:
        y = kernels.silu_mul(reference.summed(gate_up), inter)
        return reference.quantised(y, fp8) if fp8 else y

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, rule: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.route(logits, bias, rule)

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
        if not (isinstance(w13.data, kernels.Packed) and isinstance(w2.data, kernels.Packed)):
            return super().experts(x, weights, ids, first, w13, w2, inter, shared, n_experts)
        extra = None if shared is None else shared()
        return kernels.experts(plain_tokens(x), weights, ids, first, w13.data, w2.data, inter, extra, self.units)

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
        """In C into bfloat16 latents; FP8 ones are written as the reference has them."""
        if latents.dtype == torch.uint8:
            reference.norm_latents(kv, kv_weight, eps, cos, sin, slots, latents)
        else:
            kernels.write_latents(reference.summed(kv), kv_weight, eps, cos, sin, slots, latents)
        if q is None or q_weight is None:
            return None
        return self.norm(reference.summed(q), q_weight, eps, None, fp8, keep=False)[0]

    def _rotary(self, q_pe: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return kernels.rotary(q_pe, cos, sin)

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
        """In C, over bfloat16 latents in their pages: sequences of few query rows absorbed, the others expanded."""
        if self.batch_invariant or latents.dtype == torch.uint8:
            return super()._attend(q_nope, q_pe, latents, batch, w_uk, w_uv, scale)
        out = q_nope.new_empty(*q_nope.shape[:2], w_uv.shape[1])
        most = kernels.absorbed_rows(reference.absorbed_rows(w_uk, w_uv, q_pe.shape[-1]), batch.whole.longest_kv)
        kernels.mla(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, most, out)
        kernels.mla_prefill(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, most, out, self.units)
        return out

"""A backend's place in one module while it is recorded: calls the backend, and tells the recorder what went through."""

import re
from typing import Any

import torch

from core.batch import Batch
from ops import reference
from ops.formats import Quantised

SHARD = re.compile(r"\.(attn|ffn)\.(\d+)(?=\.|$)")  # the number of a virtual rank


class RecordingOps:
    """A backend's place in one module: calls the backend and tells the recorder. What it does not define is the
    backend's own."""

    def __init__(self, backend: Any, recorder: Any, module: str):
        """`recorder`: a Recorder; `module`: this one's name in the model."""
        self._backend, self._recorder = backend, recorder
        found = SHARD.search(module)
        self._shard = int(found[2]) if found else 0
        self._module = SHARD.sub(r".\1", module)
        self._layer = ".".join(self._module.split(".")[:2])  # of modules within a layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def norm(
        self, x: torch.Tensor, weight: Any, eps: float, delta: Any = None, fp8: Any = None, keep: bool = True
    ) -> Any:
        y, total = self._backend.norm(x, weight, eps, delta, fp8, keep)
        record, name = self._recorder.record, self._module
        if self._recorder.wants(name):
            record(name, self._backend.norm(x, weight, eps, delta)[0] if is_quantised_alone(y) else y)
        if name.endswith(".ffn_norm"):
            record(f"{self._layer}.attn.out", delta)
            record(f"{self._layer}.after_attn", total)
        elif delta is not None:
            self._recorder.end_layer(name, total)
        return y, total

    def linear(self, x: Any, w: Any) -> Any:
        y = self._backend.linear(x, w)
        if self._module.endswith(".eh_proj"):
            self._recorder.record(f"{self._layer}.combined", y)
        return y

    def norm_latents(
        self, kv: Any, kv_weight: Any, eps: float, cos: Any, sin: Any, slots: torch.Tensor, latents: torch.Tensor,
        q: Any = None, q_weight: Any = None, fp8: Any = None,
    ) -> Any:  # fmt: skip
        recorder, at = self._recorder, self._module
        if recorder.running and not self._shard:  # before, as a backend may reuse them
            recorder.record(f"{at}.kv_a", reference.summed(kv))
            if q_weight is not None:
                recorder.record(f"{at}.q_a", reference.summed(q))
        y = self._backend.norm_latents(kv, kv_weight, eps, cos, sin, slots, latents, q, q_weight, fp8)
        if recorder.running and not self._shard:
            if q_weight is not None and recorder.wants(f"{at}.c_q"):
                plain_q = self._backend.norm(reference.summed(q), q_weight, eps)[0] if is_quantised_alone(y) else y
                recorder.record(f"{at}.c_q", plain_q)
            c = len(kv_weight)
            if recorder.wants(f"{at}.c_kv") or recorder.wants(f"{at}.k_rope"):
                rows = latents.flatten(0, 1)[slots.clamp(min=0)]
                if rows.dtype == torch.uint8:
                    rows = reference.unpack_latents(rows, c, torch.float32)
                recorder.record(f"{at}.c_kv", rows[:, :c])
                recorder.record(f"{at}.k_rope", rows[:, c:])
        return y

    def mla(
        self, q: Any, cos: Any, sin: Any, latents: Any, batch: Batch, w_uk: Any, w_uv: Any, scale: float,
        fp8: Any = None,
    ) -> Any:  # fmt: skip
        recorder, at = self._recorder, self._module
        if recorder.running:
            heads = reference.summed(q).unflatten(-1, (len(w_uk), -1))  # (T, N, dn + R)
            recorder.record(f"{at}.q_nope", heads[..., : w_uk.shape[1]])
            if recorder.wants(f"{at}.q_rope"):
                recorder.record(f"{at}.q_rope", self._backend._rotary(heads[..., w_uk.shape[1] :], cos, sin))
        o = self._backend.mla(q, cos, sin, latents, batch, w_uk, w_uv, scale, fp8)
        if recorder.wants(f"{at}.o"):
            heads = self._backend.mla(q, cos, sin, latents, batch, w_uk, w_uv, scale) if is_quantised_alone(o) else o
            recorder.record(f"{at}.o", plain(heads).unflatten(-1, (len(w_uk), -1)))
        return o

    def router(self, x: torch.Tensor, w: Any, bias: Any, rule: Any) -> Any:
        weights, ids = self._backend.router(x, w, bias, rule)
        recorder, at = self._recorder, f"{self._layer}.ffn"
        if recorder.wants(f"{at}.router_logits"):
            recorder.record(f"{at}.router_logits", self._backend.project_float32(x, w))
        recorder.record(f"{at}.ids", ids.long())
        recorder.record(f"{at}.weights", weights)
        return weights, ids

    def experts(
        self, x: Any, weights: Any, ids: Any, first: int, w13: Any, w2: Any, inter: int, shared: Any = None,
        n_experts: Any = None, shared_weights: Any = None,
    ) -> Any:  # fmt: skip
        own = x, weights, ids, first, w13, w2, inter
        y = self._backend.experts(*own, shared, n_experts, shared_weights)
        recorder, at = self._recorder, f"{self._layer}.ffn"
        if recorder.wants(f"{at}.routed"):
            routed = y if shared is None else self._backend.experts(*own, None, n_experts)
            recorder.add_partial(f"{at}.routed", routed, of_all_lanes=True)
        if shared is not None and recorder.wants(f"{at}.shared"):
            recorder.add_partial(f"{at}.shared", shared(), of_all_lanes=True)
        return y


def plain(value: Any) -> torch.Tensor:
    """A value as it was before quantisation, and with its partial sums added up."""
    return value.x if isinstance(value, Quantised) and value.x is not None else reference.summed(value)


def is_quantised_alone(value: Any) -> bool:
    """Activations that exist only quantised."""
    return isinstance(value, Quantised) and value.x is None

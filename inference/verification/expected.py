"""What a point's value should be, recomputed from a run's own recorded inputs and the exact weights.

A point whose inputs were recorded is judged by its own op alone: errors do not add up, and a flipped near-tied expert
does not blame the layers behind it. An input that was not recorded is recomputed from what comes before it.

Written apart from ops/reference.py, in float64 and as the report has its equations, so that a mistake there shows
here. `Expected` takes `overrides`, other ways to compute points, weights or activations: known mistakes (mistakes.py)
are such.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from core.config import ModelArgs
from model import INNER_NORM_EPS, yarn_frequencies
from verification.points import names_of, split_name
from verification.trace import RequestTrace, RunNumerics
from verification.weights import StoredWeight, Weights

Compute = Callable[["Expected", str, torch.Tensor], torch.Tensor]  # of a layer's point at positions (n,)
HEAD_TILE = 1 << 24  # scores in flight
LATENT_BLOCK = 128


class NotRecorded(Exception):
    """A point cannot be recomputed: the text names what is missing."""


@dataclass(eq=False)
class Expected:
    """Recomputes the points of one request.

    overrides: by a point's name within its layer ("attn.o", or "mtp.combined" for the module's alone), a way to compute
    it; "weight", from a StoredWeight and its name to the numbers that it stands for; "activations", from the input of a
    quantised product to what it multiplies; "attend", see attend.
    """

    request: RequestTrace
    weights: Weights
    numerics: RunNumerics = field(default_factory=RunNumerics)
    halves: bool = False  # q_rope and k_rope were recorded with their channels in halves
    dtype: torch.dtype = torch.float64
    overrides: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    args: ModelArgs = None  # type: ignore[assignment]
    _kept: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.args = self.args or self.weights.args
        self.known = names_of(self.args, self.weights.has_mtp)

    def instead(self, overrides: Mapping[str, Callable[..., Any]]) -> "Expected":
        """The same with other ways to compute some points. Recorded values are shared."""
        return replace(self, overrides=overrides, _kept={})

    # ----------------------------------------------------------------------------------------------------------------
    # Recorded and recomputed values
    # ----------------------------------------------------------------------------------------------------------------

    def recorded(self, name: str, at: torch.Tensor) -> torch.Tensor | None:
        """A point's recorded values (n, …) at positions (n,), in the dtype of computation (ids in int64); None where
        one of them was not recorded."""
        if name not in self.request.points:
            return None
        rows = self.request.positions(name)
        place = torch.full((max([*rows.tolist(), *at.tolist()]) + 1,), -1)
        place[rows] = torch.arange(len(rows))
        if bool((found := place[at]).lt(0).any()):
            return None
        if name not in self._kept:
            self._kept[name] = self._read(name)
        return self._kept[name][found]

    def _read(self, name: str) -> torch.Tensor:
        value = self.request.points[name]
        if name.endswith(".ids"):
            return value.long()
        value = value.to(self.dtype)
        if self.halves and name.endswith(("q_rope", "k_rope")):
            value = value.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return value

    def value(self, name: str, at: torch.Tensor) -> torch.Tensor:
        """A point's recorded values at positions, or recomputed ones. Raises NotRecorded."""
        found = self.recorded(name, at)
        return self.compute(name, at) if found is None else found

    def compute(self, name: str, at: torch.Tensor) -> torch.Tensor:
        """What a point should be, from its inputs (n, …). Raises NotRecorded."""
        if name not in self.known:
            raise NotRecorded(name)
        layer, kind = split_name(name)[0], kind_of(name)
        return self.overrides.get(kind, COMPUTE[kind])(self, layer, at)  # type: ignore[no-any-return]

    def before(self, layer: str, at: torch.Tensor) -> torch.Tensor:
        """The residual stream that a layer is given."""
        kind, number = layer.split(".")
        if kind == "mtp":
            return self.value(f"{layer}.combined", at)
        return self.value("embed" if number == "0" else f"layers.{int(number) - 1}.hidden", at)

    def tokens_at(self, at: torch.Tensor) -> torch.Tensor:
        if int(at.max()) >= len(self.request.tokens):
            raise NotRecorded(f"the token at position {int(at.max())}")
        return self.request.tokens[at]

    def earlier(self, at: torch.Tensor) -> torch.Tensor:
        """All positions that tokens at these see."""
        return torch.arange(int(at.max()) + 1)

    # ----------------------------------------------------------------------------------------------------------------
    # Numbers
    # ----------------------------------------------------------------------------------------------------------------

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """As the run's activations are rounded."""
        return x if self.numerics.dtype == "float32" else x.to(self.numerics.torch_dtype).to(x.dtype)

    def weight(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows of a projection's weight as the run multiplies by them."""
        if "weight" in self.overrides and self.weights.form(name).is_quantised:
            stored: StoredWeight = self.weights.stored(name, first, last)
            w = self.overrides["weight"](self, stored, name, first).to(self.dtype)
        else:
            w = self.weights.exact(name, self.dtype, first, last)
        plain = self.numerics.gemm is None or not self.weights.form(name).is_quantised
        return self.round(w) if plain else w

    def product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x (n, K) times a projection's weight (N, K) transposed, rounded: (n, N)."""
        if self.takes_fp8(name):
            x = self.activations(x)
        elif "activations" in self.overrides and self.weights.form(name).is_quantised:
            x = self.overrides["activations"](self, x)
        parts = [x @ self.weight(name, first, last).T for first, last in self.weights.windows(name)]
        return self.round(torch.cat(parts, dim=-1))

    def takes_fp8(self, name: str) -> bool:
        return self.numerics.gemm == "fp8" and self.weights.form(name).kind == "fp8"

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """The numbers that quantised activations stand for (report, section 3.3.2)."""
        how = self.overrides.get("activations")
        return how(self, x) if how else quantise(x, self.numerics.scale_fmt == "ue8m0")

    def float32_product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """By a router's or a head's weight, which is exact."""
        return torch.cat(
            [x @ self.weights.exact(name, self.dtype, first, last).T for first, last in self.weights.windows(name)], -1
        )

    def norm(self, x: torch.Tensor, name: str, eps: float | None = None) -> torch.Tensor:
        eps = self.args.norm_eps if eps is None else eps
        return self.round(rms(x, eps) * self.weights.exact(name, self.dtype))

    def rotate(self, x: torch.Tensor, at: torch.Tensor, inv_freq: torch.Tensor | None = None) -> torch.Tensor:
        """The pairs (2i, 2i + 1) of x (n, …, R) turned by their position's angles."""
        freq = yarn_frequencies(self.args) if inv_freq is None else inv_freq.float()
        angle = at.float()[:, None] * freq  # in float32, as every program has it
        angle = angle.to(self.dtype).view(len(at), *(1,) * (x.dim() - 2), -1)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.full_like(angle, self.args.rope_multiplier), angle
        )
        return torch.view_as_real(turned).flatten(-2)

    def queries(self, layer: str, at: torch.Tensor) -> torch.Tensor:
        """(n, N, dn + R), before RoPE."""
        if self.args.q_lora_rank:
            y = self.product(self.value(f"{layer}.attn.c_q", at), f"{layer}.attn.wq_b.weight")
        else:
            y = self.product(self.value(f"{layer}.attn_norm", at), f"{layer}.attn.wq.weight")
        return y.unflatten(-1, (self.args.n_heads, -1))

    def kv_weights(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """W^UK (N, dn, C) and W^UV (N, dv, C)."""
        name = f"{layer}.attn.wkv_b.weight"
        key = f"{name} by head"
        if key not in self._kept:
            self._kept[key] = self.round(torch.cat([self.weight(name, *rows) for rows in self.weights.windows(name)]))
        if "kv_weights" in self.overrides:
            return self.overrides["kv_weights"](self, self._kept[key])  # type: ignore[no-any-return]
        args = self.args
        w = self._kept[key].unflatten(0, (args.n_heads, -1))
        w_uk, w_uv = w.split([args.qk_nope_head_dim, args.v_head_dim], dim=1)
        return w_uk, w_uv

    def attend(
        self, layer: str, at: torch.Tensor, scale: float | None = None, sees: Any = None, parts: str = "both"
    ) -> torch.Tensor:
        """(10), (n, N, dv). sees: from query and key positions to whether the one sees the other; parts: which of
        "nope" and "rope" the scores have."""
        keys = self.earlier(at) if sees is None else torch.arange(self._recorded_end(layer, at))
        c_kv, k_rope = (self.latents(f"{layer}.attn.{name}", keys) for name in ("c_kv", "k_rope"))
        q_nope, q_rope = (self.value(f"{layer}.attn.{name}", at) for name in ("q_nope", "q_rope"))
        w_uk, w_uv = self.kv_weights(layer)
        scale = self.args.softmax_scale if scale is None else scale
        seen = keys[None] <= at[:, None] if sees is None else sees(at[:, None], keys[None])
        heads = []
        for h in range(self.args.n_heads):  # scores (n, L) of one head at a time
            scores = torch.zeros(len(at), len(keys), dtype=self.dtype)
            if parts != "rope":
                scores += q_nope[:, h] @ (c_kv @ w_uk[h].T).T
            if parts != "nope":
                scores += q_rope[:, h] @ k_rope.T
            p = (scores * scale).masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
            heads.append(p @ (c_kv @ w_uv[h].T))
        return torch.stack(heads, dim=1)

    def attention_weights(self, layer: str, at: torch.Tensor, head: int) -> torch.Tensor:
        """How much each position's value counts for a head's output at positions (n,): (n, L), rows that sum to 1. For
        pictures. Raises NotRecorded as `attend` does."""
        keys = self.earlier(at)
        c_kv, k_rope = (self.latents(f"{layer}.attn.{name}", keys) for name in ("c_kv", "k_rope"))
        q_nope, q_rope = (self.value(f"{layer}.attn.{name}", at)[:, head] for name in ("q_nope", "q_rope"))
        scores = q_nope @ (c_kv @ self.kv_weights(layer)[0][head].T).T + q_rope @ k_rope.T
        return (scores * self.args.softmax_scale).masked_fill(keys[None] > at[:, None], float("-inf")).softmax(-1)

    def latents(self, name: str, keys: torch.Tensor) -> torch.Tensor:
        """Recorded for all keys, or recomputed where they were recorded for none. Raises NotRecorded."""
        if name in self.request.points and self.recorded(name, keys) is None:
            raise NotRecorded(f"{name} at earlier positions")
        return self.value(name, keys)

    def _recorded_end(self, layer: str, at: torch.Tensor) -> int:
        """How many positions' latents there are, from 0 on."""
        name = f"{layer}.attn.c_kv"
        rows = self.request.positions(name) if name in self.request.points else at
        return max(int(rows.max()), int(at.max())) + 1

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(15)."""
        return logits.sigmoid() if self.args.score_func == "sigmoid" else logits.softmax(-1)

    def biased(self, layer: str, scores: torch.Tensor) -> torch.Tensor:
        """The scores that choose (16)."""
        name = f"{layer}.ffn.gate.bias"
        return scores + self.weights.exact(name, self.dtype) if name in self.weights else scores

    def mlp(self, x: torch.Tensor, prefix: str, act: Any = None) -> torch.Tensor:
        """SwiGLU of one MLP. act: from gate and up to their product."""
        gate, up = (self.product(x, f"{prefix}.{w}.weight") for w in ("w1", "w3"))
        act = act or self.overrides.get("act")
        return self.product(self.round(act(gate, up) if act else F.silu(gate) * up), f"{prefix}.w2.weight")

    def experts(self, layer: str, at: torch.Tensor, run: Any = None, shift: int = 0, kept: Any = 1) -> torch.Tensor:
        """The weighted sum over the recorded choice. run: from rows, the expert's prefix and weights to its part;
        kept: factors (K,) of the gating values."""
        x = self.value(f"{layer}.ffn_norm", at)
        ids, g = self.value(f"{layer}.ffn.ids", at), self.value(f"{layer}.ffn.weights", at) * kept
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            rows, k = (ids == e).nonzero(as_tuple=True)
            prefix = f"{layer}.ffn.experts.{(e + shift) % self.args.n_routed_experts}"
            w = g[rows, k, None]
            part = run(x[rows], prefix, w) if run else self.mlp(x[rows], prefix) * w
            out.index_add_(0, rows, part)
        return out

    def is_dense(self, layer: str) -> bool:
        kind, number = layer.split(".")
        return kind == "layers" and int(number) < self.args.n_dense_layers

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        rows = [self.weights.exact("embed.weight", self.dtype, i, i + 1) for i in ids.tolist()]
        return self.round(torch.cat(rows))


def kind_of(name: str) -> str:
    """A point's name within its layer; "mtp.norm" for what the module computes otherwise than the main model."""
    layer, rest = split_name(name)
    own = f"mtp.{rest}"
    return own if layer.startswith("mtp.") and own in COMPUTE else rest


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def quantise(
    x: torch.Tensor, ue8m0: bool = False, largest: float = 448.0, block: int = 128, up: bool = True
) -> torch.Tensor:
    """What x (n, K) is after quantisation to e4m3 by blocks of channels. ue8m0: scales are powers of two, rounded up.
    """
    blocks = F.pad(x.float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    s = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4) / largest
    if ue8m0:
        mantissa, exponent = torch.frexp(s)
        s = torch.ldexp(torch.ones_like(s), exponent - (1 if not up else (mantissa == 0.5).int()))
    q = (blocks / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
    return q.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def exact_run(
    weights: Weights,
    tokens: torch.Tensor,
    numerics: RunNumerics = RunNumerics(),
    overrides: Mapping[str, Callable[..., Any]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> RequestTrace:
    """Every point of tokens (n,), computed here from the tokens on, one op after another, so that no more than one op's
    weights are in memory; rounded only as numerics says."""
    request = RequestTrace("0", tokens, points := {})
    how = Expected(request, weights, numerics, dtype=dtype, overrides=overrides or {})
    layer = ""
    for name, point in names_of(weights.args, weights.has_mtp).items():
        if split_name(name)[0] != layer:
            layer, how = split_name(name)[0], how.instead(how.overrides)
        n = len(tokens) - name.startswith("mtp.")
        if n == 0:
            continue
        value = how.compute(name, torch.arange(n))
        plain = numerics.torch_dtype if not point.exact else torch.float32
        points[name] = value if point.exact == "int64" else value.to(plain)
        if name.startswith("mtp."):
            request.rows.setdefault(layer, torch.arange(n))
    return request


# --------------------------------------------------------------------------------------------------------------------
# The points
# --------------------------------------------------------------------------------------------------------------------


def _q_rope(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.rotate(e.queries(layer, at)[..., e.args.qk_nope_head_dim :], at)


def _c_kv(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    c = e.value(f"{layer}.attn.kv_a", at)[:, : e.args.kv_lora_rank]
    c = e.norm(c, f"{layer}.attn.kv_norm.weight", INNER_NORM_EPS)
    return quantise(c, block=LATENT_BLOCK) if e.numerics.latents == "fp8" else c


def _k_rope(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.rotate(e.value(f"{layer}.attn.kv_a", at)[:, e.args.kv_lora_rank :], at)


def _ids(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    choice = e.biased(layer, e.scores(e.value(f"{layer}.ffn.router_logits", at)))
    return choose(choice, e.args)


def choose(choice: torch.Tensor, args: ModelArgs, masked: float = float("-inf"), worth: Any = None) -> torch.Tensor:
    """The experts (n, K) of the highest (n, E), in the groups of the highest worth if there are groups."""
    if args.topk_method != "greedy" and args.n_expert_groups > 1:
        grouped = choice.unflatten(-1, (args.n_expert_groups, -1))
        of_groups = (worth or group_worth)(grouped, args)
        kept = torch.zeros_like(of_groups, dtype=torch.bool)
        kept.scatter_(1, of_groups.topk(args.n_limited_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept[..., None], masked).flatten(-2)
    return choice.topk(args.n_activated_experts, dim=-1).indices


def group_worth(grouped: torch.Tensor, args: ModelArgs) -> torch.Tensor:
    """(n, G) of (n, G, E/G)."""
    if args.topk_method == "noaux_tc":
        return grouped.topk(2, dim=-1).values.sum(-1)
    return grouped.amax(-1)


def _weights(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    scores = e.scores(e.value(f"{layer}.ffn.router_logits", at))
    g = scores.gather(-1, e.value(f"{layer}.ffn.ids", at))
    if e.args.norm_topk_prob:
        g = g / (g.sum(-1, keepdim=True) + 1e-20)
    return g * e.args.route_scale


def _ffn_out(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    if e.is_dense(layer):
        return e.mlp(e.value(f"{layer}.ffn_norm", at), f"{layer}.ffn")
    routed = e.value(f"{layer}.ffn.routed", at)
    return e.round(routed + e.value(f"{layer}.ffn.shared", at)) if e.args.n_shared_experts else routed


def _combined(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    both = torch.cat((e.value(f"{layer}.enorm", at), e.value(f"{layer}.hnorm", at)), dim=-1)
    return e.product(both, f"{layer}.eh_proj.weight")


COMPUTE: dict[str, Compute] = {
    "embed": lambda e, layer, at: e.embedding(e.tokens_at(at)),
    "attn_norm": lambda e, layer, at: e.norm(e.before(layer, at), f"{layer}.attn_norm.weight"),
    "attn.q_a": lambda e, layer, at: e.product(e.value(f"{layer}.attn_norm", at), f"{layer}.attn.wq_a.weight"),
    "attn.c_q": lambda e, layer, at: e.norm(
        e.value(f"{layer}.attn.q_a", at), f"{layer}.attn.q_norm.weight", INNER_NORM_EPS
    ),
    "attn.q_nope": lambda e, layer, at: e.queries(layer, at)[..., : e.args.qk_nope_head_dim],
    "attn.q_rope": _q_rope,
    "attn.kv_a": lambda e, layer, at: e.product(e.value(f"{layer}.attn_norm", at), f"{layer}.attn.wkv_a.weight"),
    "attn.c_kv": _c_kv,
    "attn.k_rope": _k_rope,
    "attn.o": lambda e, layer, at: e.round(e.attend(layer, at)),
    "attn.out": lambda e, layer, at: e.product(e.value(f"{layer}.attn.o", at).flatten(1), f"{layer}.attn.wo.weight"),
    "after_attn": lambda e, layer, at: e.round(e.before(layer, at) + e.value(f"{layer}.attn.out", at)),
    "ffn_norm": lambda e, layer, at: e.norm(e.value(f"{layer}.after_attn", at), f"{layer}.ffn_norm.weight"),
    "ffn.router_logits": lambda e, layer, at: e.float32_product(
        e.value(f"{layer}.ffn_norm", at), f"{layer}.ffn.gate.weight"
    ),
    "ffn.ids": _ids,
    "ffn.weights": _weights,
    "ffn.routed": lambda e, layer, at: e.round(e.experts(layer, at)),
    "ffn.shared": lambda e, layer, at: e.mlp(e.value(f"{layer}.ffn_norm", at), f"{layer}.ffn.shared_experts"),
    "ffn.out": _ffn_out,
    "hidden": lambda e, layer, at: e.round(e.value(f"{layer}.after_attn", at) + e.value(f"{layer}.ffn.out", at)),
    "norm": lambda e, layer, at: e.norm(e.value(f"layers.{e.args.n_layers - 1}.hidden", at), "norm.weight"),
    "logits": lambda e, layer, at: e.float32_product(e.value("norm", at), "head.weight"),
    "mtp.embed": lambda e, layer, at: e.embedding(e.tokens_at(at + 1 + int(layer.split(".")[1]))),
    "mtp.enorm": lambda e, layer, at: e.norm(e.value(f"{layer}.embed", at), f"{layer}.enorm.weight"),
    "mtp.hnorm": lambda e, layer, at: e.norm(e.value("norm", at), f"{layer}.hnorm.weight"),
    "mtp.combined": _combined,
    "mtp.norm": lambda e, layer, at: e.norm(e.value(f"{layer}.hidden", at), f"{layer}.norm.weight"),
    "mtp.logits": lambda e, layer, at: e.float32_product(e.value(f"{layer}.norm", at), "head.weight"),
}

"""The network of the conformance models in float64, without a rounding but those that a format asks for.

It is written apart from inference/: the golden values come from here, and inference/ is checked against them like any
other port. Every formula that ports get wrong is a method of its own, which `mistakes.py` replaces to see whether wrong
logits are those of a known mistake. Equations in brackets are the DeepSeek-V3 report's (arXiv 2412.19437).

Shapes: T tokens, H hidden size, N heads, C kv_lora_rank, R qk_rope_head_dim, E experts, K experts a token.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import exact_math
import hashed_weights
from exact_math import Arithmetic, to_e4m3
from exact_rope import Rope
from exact_router import Router

INNER_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm in the released code, whatever rms_norm_eps says


class Network(Rope, Router):
    """One conformance model. `w8a8`: the inputs of FP8 weights are quantised as well; without it FP8 weights are
    multiplied as what they mean. `points` collects every activation by its name (inference/verification/points.py)."""

    def __init__(self, config: dict[str, Any], w8a8: bool = False, arithmetic: Arithmetic = exact_math.FAST):
        self.config, self.w8a8, self.math = config, w8a8, arithmetic
        self.weights: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        for stored, name in hashed_weights.tensors(config):
            if stored.fp8 and "quantization_config" in config:
                q, s = hashed_weights.quantised(stored, config)
                self.weights[name], self.scales[name] = q * hashed_weights.spread(s, stored.shape), s
            else:
                self.weights[name] = hashed_weights.values(stored, config)
        self.points: dict[str, Tensor] = {}
        self.layer = 0  # whose turn it is
        self.rope = config.get("rope_scaling") or {"factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
        self.theta = float(config["rope_theta"])
        self.factor = float(self.rope["factor"])
        self.eps = config["rms_norm_eps"]
        self.inner_eps = INNER_EPS
        self.n_dense = config["first_k_dense_replace"]
        self.top_k, self.n_groups, self.n_kept = config["num_experts_per_tok"], config["n_group"], config["topk_group"]
        self.is_v2 = config["model_type"] == "deepseek_v2"
        self.normalise = config["norm_topk_prob"]
        self.route_scale = config["routed_scaling_factor"]
        self.heads, self.nope, self.rope_dim = (
            config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"],
        )  # fmt: skip
        self.latent = config["kv_lora_rank"]

    def copy(self) -> "Network":
        """Another network with the same weights, of which a mistake may replace methods and values."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.weights, other.points = dict(self.weights), {}
        return other

    # --- the whole ---------------------------------------------------------------------------------------------------

    def run(self, tokens: Iterable[int]) -> dict[str, Tensor]:
        """The points of a prompt: those of its T tokens, and of the MTP module those of the first T - 1."""
        ids = torch.tensor(list(tokens))
        self.points = {}
        x = self.record("embed", self.embed(ids))
        cos, sin = self.angles(torch.arange(len(ids)))
        for i in range(self.config["num_hidden_layers"]):
            x = self.block(i, f"layers.{i}", x, cos, sin)
        hidden = self.record("norm", self.final_norm(x))
        self.record("logits", self.head(hidden))
        for k in range((self.config.get("num_nextn_predict_layers") or 0) if len(ids) > 1 else 0):
            self.mtp(k, ids, x, hidden, cos, sin)
        return self.points

    def record(self, name: str, value: Tensor) -> Tensor:
        self.points[name] = value
        return value

    def embed(self, ids: Tensor) -> Tensor:
        return self.weights["model.embed_tokens.weight"][ids]

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weights["model.norm.weight"], self.eps)

    def head(self, hidden: Tensor) -> Tensor:
        return self.math.product(hidden, self.weights["lm_head.weight"])

    def block(self, i: int, point: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """A layer: attention and feed-forward, each after its norm and added to the residual."""
        self.layer, at = i, f"model.layers.{i}"
        y = self.record(f"{point}.attn_norm", self.attn_norm(at, x))
        out = self.attention(f"{at}.self_attn", f"{point}.attn", y, cos, sin)
        x = self.record(f"{point}.after_attn", self.add_attention(x, y, out))
        y = self.record(f"{point}.ffn_norm", self.ffn_norm(at, x))
        if i < self.n_dense:
            out = self.mlp(f"{at}.mlp", y, f"{point}.ffn_norm")
        else:
            out = self.experts(f"{at}.mlp", f"{point}.ffn", y)
        self.record(f"{point}.ffn.out", out)
        return self.record(f"{point}.hidden", self.add_ffn(x, y, out))

    def add_attention(self, x: Tensor, normed: Tensor, out: Tensor) -> Tensor:
        return x + out

    def add_ffn(self, x: Tensor, normed: Tensor, out: Tensor) -> Tensor:
        return x + out

    def attn_norm(self, at: str, x: Tensor) -> Tensor:
        return self.norm(x, self.weights[f"{at}.input_layernorm.weight"], self.eps)

    def ffn_norm(self, at: str, x: Tensor) -> Tensor:
        return self.norm(x, self.weights[f"{at}.post_attention_layernorm.weight"], self.eps)

    # --- products and norms ------------------------------------------------------------------------------------------

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension."""
        return x / torch.sqrt(self.math.sum(x * x) / x.shape[-1] + eps) * weight

    def linear(self, name: str, x: Tensor, point: str | None = None) -> Tensor:
        """x (T, K) times the weight `name` transposed; x quantised if the weight is FP8 and `w8a8` (W8A8)."""
        if self.w8a8 and name in self.scales and self.quantises(name):
            q, s = self.act_quant(x)
            x = self.dequantised(q, s)
            if point:
                self.record(f"{point}.scale", s)
                self.record(f"{point}.quantised", x)
            return self.fp8_product(name, x)
        return self.math.product(x, self.weights[name])

    def quantises(self, name: str) -> bool:
        """Whether the input of an FP8 weight is quantised: but for kv_b_proj's, which attention absorbs."""
        return not name.endswith("kv_b_proj.weight")

    def fp8_product(self, name: str, x: Tensor) -> Tensor:
        return self.math.product(x, self.weights[name])

    def act_quant(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """e4m3 values (T, K) and scales (T, ceil(K / 128)) of x: the largest value of 128 channels lies at 448, or,
        with ue8m0, at the next power of two of its scale. Scales are float32."""
        blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
        s = (blocks.abs().amax(-1).clamp(min=1e-4) / 448).float().double()
        if self.config["quantization_config"].get("scale_fmt") == "ue8m0":
            s = self.power_of_two(s)
        q = to_e4m3(blocks / s.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]
        return q, s

    def power_of_two(self, s: Tensor) -> Tensor:
        """The least power of two that is no less than s."""
        mantissa, exponent = torch.frexp(s)
        return exact_math.power_of_two(exponent.long() - (mantissa == 0.5).long())

    def dequantised(self, q: Tensor, s: Tensor) -> Tensor:
        return q * s.repeat_interleave(128, -1)[..., : q.shape[-1]]

    # --- attention (1 to 11) -----------------------------------------------------------------------------------------

    def attention(self, at: str, point: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.queries(at, point, x).unflatten(-1, (self.heads, -1))
        q_nope, q_rope = self.split_query(q)
        q_rope = self.rotate(q_rope, cos[:, None], sin[:, None])
        self.record(f"{point}.q_nope", q_nope)
        self.record(f"{point}.q_rope", q_rope)
        kv = self.record(f"{point}.kv_a", self.linear(f"{at}.kv_a_proj_with_mqa.weight", x, f"{point}_norm"))
        c_kv, k_rope = self.split_latent(kv)
        c_kv = self.record(f"{point}.c_kv", self.latent_norm(at, c_kv))
        k_rope = self.record(f"{point}.k_rope", self.rotate_key(k_rope, cos, sin))
        k_nope, v = self.split_kv(self.linear(f"{at}.kv_b_proj.weight", c_kv))
        heads = [
            self.attend(torch.cat((q_nope[:, n], q_rope[:, n]), -1), torch.cat((k_nope[:, n], k_rope), -1), v[:, n])
            for n in range(self.heads)
        ]
        o = self.record(f"{point}.o", torch.stack(heads, dim=1))
        return self.record(f"{point}.out", self.linear(f"{at}.o_proj.weight", o.flatten(1), f"{point}.o"))

    def queries(self, at: str, point: str, x: Tensor) -> Tensor:
        if not self.config["q_lora_rank"]:
            return self.linear(f"{at}.q_proj.weight", x, f"{point}_norm")
        q_a = self.record(f"{point}.q_a", self.linear(f"{at}.q_a_proj.weight", x, f"{point}_norm"))
        c_q = self.record(f"{point}.c_q", self.query_norm(at, q_a))
        return self.linear(f"{at}.q_b_proj.weight", c_q, f"{point}.c_q")

    def query_norm(self, at: str, q_a: Tensor) -> Tensor:
        return self.norm(q_a, self.weights[f"{at}.q_a_layernorm.weight"], self.inner_eps)

    def latent_norm(self, at: str, c_kv: Tensor) -> Tensor:
        return self.norm(c_kv, self.weights[f"{at}.kv_a_layernorm.weight"], self.inner_eps)

    def split_query(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return q[..., : self.nope], q[..., self.nope :]

    def split_latent(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        return kv[:, : self.latent], kv[:, self.latent :]

    def split_kv(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """kv_b_proj's result, head by head keys and then values: (T, N, dn) and (T, N, dv)."""
        kv = kv.unflatten(-1, (self.heads, -1))
        return kv[..., : self.nope], kv[..., self.nope :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of one head: (T, d), (T, d), (T, dv) to (T, dv)."""
        scores = self.scores(q, k) * self.softmax_scale()
        scores = scores.masked_fill(self.hidden(len(q)), -math.inf)
        p = self.math.exp(scores - scores.amax(-1, keepdim=True))
        return self.math.product(p / self.math.sum(p), v.mT)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.math.product(q, k)

    def hidden(self, n: int) -> Tensor:
        """Which keys (columns) a query (row) does not see: those behind it."""
        return torch.ones(n, n, dtype=torch.bool).triu(1)

    # --- feed-forward (12 to 16) -------------------------------------------------------------------------------------

    def mlp(self, at: str, x: Tensor, point: str | None = None) -> Tensor:
        gate, up = self.linear(f"{at}.gate_proj.weight", x, point), self.linear(f"{at}.up_proj.weight", x)
        return self.linear(f"{at}.down_proj.weight", self.gated(gate, up))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.silu(gate) * up

    def silu(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)

    def experts(self, at: str, point: str, x: Tensor) -> Tensor:
        logits = self.record(f"{point}.router_logits", self.router_logits(at, x))
        ids, weights = self.route(logits, self.weights.get(f"{at}.gate.e_score_correction_bias"))
        self.record(f"{point}.ids", ids)
        self.record(f"{point}.weights", weights)
        routed = torch.zeros_like(x)
        for e in sorted(set(ids.flatten().tolist())):
            rows, place = (ids == e).nonzero().unbind(1)
            y = self.mlp(f"{at}.experts.{e}", x[rows])
            routed[rows] += self.weighted(y, weights, rows, place)
        self.record(f"{point}.routed", routed)
        shared = self.record(f"{point}.shared", self.shared(at, f"{point}_norm", x))
        return routed + shared

    def weighted(self, y: Tensor, weights: Tensor, rows: Tensor, place: Tensor) -> Tensor:
        """An expert's results (n, H) times their tokens' weights for it."""
        return y * weights[rows, place, None]

    def shared(self, at: str, point: str, x: Tensor) -> Tensor:
        return self.mlp(f"{at}.shared_experts", x, point)

    # --- multi-token prediction (21 to 23) ---------------------------------------------------------------------------

    def mtp(self, k: int, ids: Tensor, last: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Module k on the first T - 1 positions: each has the next token's embedding."""
        i, point = self.config["num_hidden_layers"] + k, f"mtp.{k}"
        at = f"model.layers.{i}"
        embedded = self.record(f"{point}.embed", self.embed(self.next_tokens(ids)))
        e = self.record(f"{point}.enorm", self.norm(embedded, self.weights[f"{at}.enorm.weight"], self.eps))
        h = self.mtp_hidden(last, hidden)[:-1]
        h = self.record(f"{point}.hnorm", self.norm(h, self.weights[f"{at}.hnorm.weight"], self.eps))
        x = self.math.product(self.joined(e, h), self.weights[f"{at}.eh_proj.weight"])
        x = self.block(i, point, self.record(f"{point}.combined", x), cos[:-1], sin[:-1])
        x = self.record(f"{point}.norm", self.norm(x, self.mtp_norm_weight(at), self.eps))
        self.record(f"{point}.logits", self.head(x))

    def next_tokens(self, ids: Tensor) -> Tensor:
        return ids[1:]

    def mtp_hidden(self, last: Tensor, hidden: Tensor) -> Tensor:
        """The main model's hidden state that the module takes: after the final norm."""
        return hidden

    def joined(self, e: Tensor, h: Tensor) -> Tensor:
        """The embedding comes first, as in the released weights; (21) has the other order."""
        return torch.cat((e, h), -1)

    def mtp_norm_weight(self, at: str) -> Tensor:
        return self.weights[f"{at}.shared_head.norm.weight"]

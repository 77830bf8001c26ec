"""Mistakes of the rotary embedding, YaRN and attention."""

import math

import torch
from torch import Tensor

import exact_math
from exact_math import to_bfloat16
from exact_network import Network
from mistakes.registry import mistake, replaced, right

# --- rotary embedding and YaRN

ROPE = "attn.q_rope and k_rope; position 0 agrees"

replaced("rope-backwards", "angles turn the other way", ROPE,
         positions=lambda net, at: -at.double())
replaced("rope-half", "pairs (i, i + R/2) are rotated instead of the neighbours (2i, 2i + 1)", ROPE,
         rotate=lambda net, x, cos, sin: _halves(x, cos, sin))
replaced("rope-key-not-rotated", "keys are cached without their rotation", "attn.k_rope; q_rope agrees",
         rotate_key=lambda net, x, cos, sin: x)
replaced("rope-position-from-1", "positions are counted from 1", "attn.q_rope; logits agree (only differences of positions count)",
         positions=lambda net, at: at.double() + 1)
replaced("rope-wrong-query-part", "a query's first dimensions are rotated instead of its last", "attn.q_nope and q_rope",
         split_query=lambda net, q: (q[..., net.rope_dim :], q[..., : net.rope_dim]))
replaced("rope-wrong-key-part", "the rotary key is taken from in front of the latent", "attn.c_kv and k_rope; kv_a agrees",
         split_latent=lambda net, kv: (kv[:, net.rope_dim :], kv[:, : net.rope_dim]))
replaced("rope-positions-in-bfloat16", "positions beyond 256 are rounded to bfloat16", "attn.q_rope from position 257 on: moonlight alone",
         positions=lambda net, at: to_bfloat16(at.double()))
def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


@mistake("rope-frequencies-of-head", "rope_theta is not read but taken for 10000", f"{ROPE}; V3 and V2 pass")
def _(net: Network) -> None:
    net.theta = 10000.0


@mistake("rope-of-the-whole-head", "frequencies are spread over qk_nope_head_dim + qk_rope_head_dim", ROPE)
def _(net: Network) -> None:
    wide, dim = net.nope + net.rope_dim, net.rope_dim

    def frequencies() -> Tensor:
        net.rope_dim = wide
        try:
            return right(net, "frequencies")[: dim // 2]  # type: ignore[no-any-return]
        finally:
            net.rope_dim = dim

    net.frequencies = frequencies  # type: ignore[method-assign]


YARN = f"{ROPE}; families without YaRN pass"
replaced("yarn-left-out", "frequencies without YaRN", YARN, stretches=lambda net: False)
replaced("yarn-by-context-limit", "YaRN only where max_position_embeddings exceeds the original length", f"{ROPE}; only v2 fails",
         stretches=lambda net: right(net, "stretches") and _beyond(net))
replaced("yarn-and-mscale-by-context-limit", "YaRN's frequencies and temperature only where max_position_embeddings exceeds "
         "the original length, as the original model.py has it", "attn.q_rope and attn.o; only v2 fails",
         stretches=lambda net: right(net, "stretches") and _beyond(net),
         softmax_scale=lambda net: right(net, "softmax_scale") / (1 if _beyond(net) else net.mscale("mscale_all_dim") ** 2))


def _beyond(net: Network) -> bool:
    return net.config["max_position_embeddings"] > net.rope.get("original_max_position_embeddings", 0)  # type: ignore[no-any-return]


replaced("yarn-ramp-turned-round", "the fast pairs are slowed instead of the slow ones", YARN,
         ramp=lambda net: 1 - right(net, "ramp"))
replaced("yarn-no-ramp", "a step in place of YaRN's ramp", YARN, ramp=lambda net: right(net, "ramp").round())
replaced("yarn-all-slowed", "every frequency is divided by the factor (linear scaling)", YARN,
         ramp=lambda net: torch.ones_like(right(net, "ramp")))
replaced("yarn-betas-swapped", "the ramp begins where it ends (beta_fast read as beta_slow)", f"{YARN}; kimi-k2 passes",
         ramp_bounds=lambda net: (max(math.floor(net.pair_turning("beta_slow")), 0), right(net, "ramp_bounds")[1]))
replaced("yarn-unrounded-bounds", "the ramp's end is not rounded to a pair", YARN,
         ramp_bounds=lambda net: (right(net, "ramp_bounds")[0], min(net.pair_turning("beta_slow"), net.rope_dim - 1)))
replaced("yarn-original-length", "the ramp is placed by max_position_embeddings", f"{YARN}; v2 passes",
         pair_turning=lambda net, beta: net.rope_dim
         * exact_math.log(net.config["max_position_embeddings"] / (net.rope[beta] * 2 * math.pi)) / (2 * exact_math.log(net.theta)))

MSCALE = "attn.o, from position 1 on; q and k agree; families without YaRN pass"
replaced("mscale-once", "YaRN's temperature enters the softmax once instead of squared", MSCALE,
         softmax_scale=lambda net: (net.nope + net.rope_dim) ** -0.5 * net.mscale("mscale_all_dim"))
replaced("mscale-left-out", "the softmax without YaRN's temperature", MSCALE,
         softmax_scale=lambda net: (net.nope + net.rope_dim) ** -0.5)
replaced("mscale-not-read", "mscale_all_dim is taken for 1", "attn.o of v2-lite, whose is 0.707", mscale=lambda net, name: _unread(net, name))
replaced("mscale-in-the-angles", "cos and sin carry YaRN's temperature as well", "attn.q_rope and k_rope, position 0 too, longer",
         rope_multiplier=lambda net: net.mscale("mscale"))
replaced("mla-scale-without-rope", "the softmax scale counts qk_nope_head_dim alone", "attn.o, from position 1 on, in every family",
         softmax_scale=lambda net: net.nope**-0.5 * net.mscale("mscale_all_dim") ** 2)
replaced("mla-scale-of-values", "the softmax scale is v_head_dim^-1/2", "attn.o, from position 1 on",
         softmax_scale=lambda net: net.config["v_head_dim"] ** -0.5 * net.mscale("mscale_all_dim") ** 2)


def _unread(net: Network, name: str) -> float:
    return 0.1 * exact_math.log(net.factor) + 1 if net.factor > 1 and name == "mscale_all_dim" else right(net, "mscale", name)  # type: ignore[no-any-return]

# --- attention

replaced("mla-kv-b-order", "kv_b_proj is read as values first", "attn.o; q and latents agree",
         split_kv=lambda net, kv: _values_first(net, kv))
replaced("mla-kv-b-heads", "kv_b_proj is read with the heads innermost", "attn.o; q and latents agree",
         split_kv=lambda net, kv: _heads_innermost(net, kv))
replaced("mla-mask", "every query sees the key behind it", "attn.o, at every position but the last",
         hidden=lambda net, n: torch.ones(n, n, dtype=torch.bool).triu(2))
replaced("mla-no-mask", "no causal mask", "attn.o, at every position but the last",
         hidden=lambda net, n: torch.zeros(n, n, dtype=torch.bool))
replaced("mla-not-itself", "a query does not see its own key", "attn.o, from position 1 on",
         hidden=lambda net, n: torch.ones(n, n, dtype=torch.bool).triu(0) & (torch.arange(n) > 0)[:, None] if n > 1 else torch.zeros(1, 1, dtype=torch.bool))
replaced("mla-scores-in-bfloat16", "scores are rounded to bfloat16 before the softmax", "attn.o by 0.5 %",
         scores=lambda net, q, k: to_bfloat16(right(net, "scores", q, k)))
def _values_first(net: Network, kv: Tensor) -> tuple[Tensor, Tensor]:
    kv = kv.unflatten(-1, (net.heads, -1))
    return kv[..., net.config["v_head_dim"] :], kv[..., : net.config["v_head_dim"]]


def _heads_innermost(net: Network, kv: Tensor) -> tuple[Tensor, Tensor]:
    kv = kv.unflatten(-1, (-1, net.heads)).mT
    return kv[..., : net.nope], kv[..., net.nope :]


@mistake("moe-first-dense-layers", "the first MoE layer computes its shared experts alone", "ffn.out of the first MoE layer")
def _(net: Network) -> None:
    def experts(at: str, point: str, x: Tensor) -> Tensor:
        if at == f"model.layers.{net.n_dense}.mlp":
            return net.shared(at, f"{point}_norm", x)
        return right(net, "experts", at, point, x)  # type: ignore[no-any-return]

    net.experts = experts  # type: ignore[method-assign]

"""Mistakes of the router and the experts."""

from typing import Any

import torch
from torch import Tensor

from exact_math import to_bfloat16
from exact_network import Network
from mistakes.registry import mistake, replaced, right

# --- the router

IDS = "ffn.ids of the first MoE layer; router_logits agree"
WEIGHTS = "ffn.weights of the first MoE layer; ids agree"

replaced("routing-group-max", "V3: a group is worth its best expert instead of its two best", f"{IDS}; V2 passes",
         worth=lambda net, grouped: grouped.amax(-1))
replaced("routing-group-sum", "V2: a group is worth its two best experts instead of its best", f"{IDS}; V3 passes",
         worth=lambda net, grouped: net.two_best(grouped))
replaced("routing-no-groups", "experts are chosen among all groups", f"{IDS}; families without groups pass",
         candidates=lambda net, scores, bias: scores if bias is None else scores + bias)
replaced("routing-masked-with-zero", "experts of groups not kept get 0, more than a negative biased score",
         f"{IDS}; V2 and families without groups pass", masked=lambda net: 0.0,
         best=lambda net, choice: choice.float().topk(net.top_k).indices)  # among equal ones torch's choice
replaced("routing-bias-in-weights", "the gate's bias is added to the experts' weights, not only to the choice",
         f"{WEIGHTS}; V2 passes", chosen=lambda net, scores, choice, ids: choice.gather(-1, ids))
replaced("routing-bias-left-out", "the gate's bias takes no part in the choice", f"{IDS}; V2 passes",
         candidates=lambda net, scores, bias: right(net, "candidates", scores, None))


@mistake("routing-bias-before-sigmoid", "the gate's bias is added to the logits, and so to the weights", f"{IDS}; V2 passes")
def _(net: Network) -> None:
    def route(logits: Tensor, bias: Tensor | None) -> Any:
        return right(net, "route", logits if bias is None else logits + bias, bias)

    net.route = route  # type: ignore[method-assign]


def _softmax(net: Network, logits: Tensor) -> Tensor:
    p = net.math.exp(logits - logits.amax(-1, keepdim=True))
    return p / net.math.sum(p)


replaced("routing-softmax", "V3's scores by softmax instead of sigmoid", f"{IDS}; V2 passes", affinity=_softmax)
replaced("routing-sigmoid", "V2's scores by sigmoid instead of softmax", f"{WEIGHTS}; V3 passes",
         affinity=lambda net, logits: net.sigmoid(logits))


@mistake("routing-not-normalised", "V3's weights are not divided by their sum (norm_topk_prob)", f"{WEIGHTS}; V2 passes")
def _(net: Network) -> None:
    net.normalise = False


@mistake("routing-normalised", "V2's weights are divided by their sum", f"{WEIGHTS}; V3 passes")
def _(net: Network) -> None:
    net.normalise = True


replaced("routing-normalised-over-all", "the weights are divided by the sum over all experts", f"{WEIGHTS}; V2 passes",
         divisor=lambda net, weights, scores: net.math.sum(scores))
replaced("routing-scale-left-out", "routed_scaling_factor is forgotten", f"{WEIGHTS}; factors of 1 pass",
         scaled=lambda net, weights: weights)
replaced("routing-scale-twice", "routed_scaling_factor is applied twice", f"{WEIGHTS}; factors of 1 pass",
         scaled=lambda net, weights: weights * net.route_scale**2)
replaced("routing-scale-normalised-only", "routed_scaling_factor only where weights are normalised", f"{WEIGHTS}; V3 passes",
         scaled=lambda net, weights: weights * (net.route_scale if net.normalise else 1.0))
replaced("routing-bias-rounded", "the gate's bias is kept in bfloat16", f"{IDS}, at one position of v3 (12)",
         candidates=lambda net, s, bias: right(net, "candidates", s, None if bias is None else to_bfloat16(bias)))
replaced("routing-in-bfloat16", "router logits are rounded to bfloat16", "ffn.router_logits by 0.2 %; ffn_norm agrees",
         router_logits=lambda net, at, x: to_bfloat16(right(net, "router_logits", at, x)))
replaced("routing-one-fewer", "one expert fewer a token than num_experts_per_tok", IDS,
         route=lambda net, logits, bias: _fewer(net, logits, bias))


def _fewer(net: Network, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    net.top_k -= 1
    try:
        return right(net, "route", logits, bias)  # type: ignore[no-any-return]
    finally:
        net.top_k += 1

# --- experts

replaced("moe-shared-scaled", "the shared experts are scaled as the routed ones are", "ffn.shared; routed agrees",
         shared=lambda net, at, point, x: right(net, "shared", at, point, x) * net.route_scale)
replaced("moe-shared-left-out", "the shared experts are left out", "ffn.out of MoE layers; routed agrees",
         shared=lambda net, at, point, x: torch.zeros_like(x))
replaced("moe-gate-and-up", "silu is applied to up instead of gate (gate_proj and up_proj exchanged)",
         "ffn.out of layer 0; ffn_norm agrees", gated=lambda net, gate, up: gate * net.silu(up))
replaced("moe-experts-gate-and-up", "gate_proj and up_proj of the routed experts are exchanged",
         "ffn.routed; ffn.shared and layer 0 agree", mlp=lambda net, at, x, point=None: _exchanged(net, at, x, point))


def _exchanged(net: Network, at: str, x: Tensor, point: str | None) -> Tensor:
    if ".experts." not in at:
        return right(net, "mlp", at, x, point)  # type: ignore[no-any-return]
    gate, up = (net.linear(f"{at}.{n}_proj.weight", x) for n in ("up", "gate"))
    return net.linear(f"{at}.down_proj.weight", net.gated(gate, up))


replaced("moe-weights-of-others", "an expert's result is weighted by its token's first weight", "ffn.routed; weights agree",
         weighted=lambda net, y, weights, rows, place: y * weights[rows, 0, None])
replaced("moe-sum-in-bfloat16", "experts' results are rounded to bfloat16 before they are summed", "ffn.routed by 0.2 %",
         weighted=lambda net, y, weights, rows, place: to_bfloat16(y) * weights[rows, place, None])
replaced("moe-weights-in-bfloat16", "experts' weights are rounded to bfloat16", "ffn.weights by 0.2 %",
         weighted=lambda net, y, weights, rows, place: y * to_bfloat16(weights)[rows, place, None])
replaced("moe-silu-in-bfloat16", "silu(gate) is rounded to bfloat16 before it is multiplied by up", "ffn.out of layer 0 by 0.2 %",
         silu=lambda net, x: to_bfloat16(right(net, "silu", x)))
replaced("moe-silu-as-gelu", "gelu in the place of silu", "ffn.out of layer 0; ffn_norm agrees",
         silu=lambda net, x: torch.nn.functional.gelu(x))

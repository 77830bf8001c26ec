"""Known mistakes of the router, the experts and the MLPs."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from core.config import ModelArgs
from verification.expected import COMPUTE, Expected, choose, group_worth, quantise
from verification.mistakes import mistake, require


def has_bias(e: Expected) -> bool:
    return e.args.gate_bias


def has_groups(e: Expected) -> bool:
    return e.args.topk_method != "greedy" and e.args.n_expert_groups > 1


def normalises(e: Expected) -> bool:
    return e.args.norm_topk_prob


def scales(e: Expected) -> bool:
    return e.args.route_scale != 1


def has_shared(e: Expected) -> bool:
    return e.args.n_shared_experts > 0


def logits(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.value(f"{layer}.ffn.router_logits", at)


def other_scores(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    """Softmax where the model has sigmoid, and the other way round."""
    x = logits(e, layer, at)
    return x.softmax(-1) if e.args.score_func == "sigmoid" else x.sigmoid()


def bias(e: Expected, layer: str) -> torch.Tensor:
    return e.weights.exact(f"{layer}.ffn.gate.bias", e.dtype)


# --- logits and choice -----------------------------------------------------------------------------------------------


@mistake("router-bf16", "ffn.router_logits", "the router is computed in bfloat16; it is float32 throughout")
def _router_bf16(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return COMPUTE["ffn.router_logits"](e, layer, at).bfloat16().to(e.dtype)


@mistake("router-of-residual", "ffn.router_logits", "the router is given the residual before ffn_norm")
def _router_of_residual(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.float32_product(e.value(f"{layer}.after_attn", at), f"{layer}.ffn.gate.weight")


@mistake("router-biased", "ffn.router_logits", "the correction bias is added to the router's logits; it belongs to the scores that choose", has_bias)
def _router_biased(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return COMPUTE["ffn.router_logits"](e, layer, at) + bias(e, layer)


@mistake("router-fp8", "ffn.router_logits", "the router's input is quantised to FP8; the router takes plain activations")
def _router_fp8(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.float32_product(quantise(e.value(f"{layer}.ffn_norm", at)), f"{layer}.ffn.gate.weight")


def on_choice(name: str, sentence: str, choice: Any, applies: Any = lambda e: True, **how: Any) -> None:
    """A mistake in `ffn.ids`. choice: the scores (n, E) that choose."""

    def compute(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
        args = how["args"](e.args) if "args" in how else e.args
        return choose(choice(e, layer, at), args, how.get("masked", float("-inf")), how.get("worth"))

    mistake(name, "ffn.ids", sentence, applies)(compute)


def right_choice(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.biased(layer, e.scores(logits(e, layer, at)))


def _without_groups(args: ModelArgs) -> ModelArgs:
    return replace(args, n_expert_groups=1, n_limited_groups=1)


on_choice("choice-unbiased", "experts are chosen without the correction bias (e_score_correction_bias)",
          lambda e, layer, at: e.scores(logits(e, layer, at)), has_bias)  # fmt: skip
on_choice("choice-bias-subtracted", "the correction bias is subtracted from the scores that choose",
          lambda e, layer, at: e.scores(logits(e, layer, at)) - bias(e, layer), has_bias)  # fmt: skip
on_choice("choice-bias-before-sigmoid", "the correction bias is added before the sigmoid; it is added to the scores",
          lambda e, layer, at: e.scores(logits(e, layer, at) + bias(e, layer)), has_bias)  # fmt: skip
on_choice("choice-bias-bf16", "the correction bias is rounded to bfloat16; it is float32",
          lambda e, layer, at: e.scores(logits(e, layer, at)) + bias(e, layer).bfloat16().to(e.dtype), has_bias)  # fmt: skip
on_choice("choice-of-logits", "experts are chosen by logits plus bias; the bias is made for scores, after their sigmoid",
          lambda e, layer, at: logits(e, layer, at) + bias(e, layer), has_bias)  # fmt: skip
on_choice("choice-other-function", "the router's other function, softmax for sigmoid or the other way round, gives the scores that choose",
          lambda e, layer, at: e.biased(layer, other_scores(e, layer, at)), has_bias)  # fmt: skip
on_choice("groups-ignored", "experts are chosen from all groups; only the best groups are open", right_choice, has_groups, args=_without_groups)


def _max_worth(grouped: torch.Tensor, args: ModelArgs) -> torch.Tensor:
    return grouped.amax(-1)


def _sum_worth(grouped: torch.Tensor, args: ModelArgs) -> torch.Tensor:
    return grouped.topk(2, dim=-1).values.sum(-1)


def _all_worth(grouped: torch.Tensor, args: ModelArgs) -> torch.Tensor:
    return grouped.sum(-1)


def is_noaux(e: Expected) -> bool:
    return has_groups(e) and e.args.topk_method == "noaux_tc"


def is_limited(e: Expected) -> bool:
    return has_groups(e) and e.args.topk_method == "group_limited_greedy"


on_choice("group-worth-max", "a group's worth is its best score; noaux_tc has the sum of its two best", right_choice, is_noaux, worth=_max_worth)
on_choice("group-worth-sum", "a group's worth is the sum of its two best scores; group_limited_greedy has its best", right_choice, is_limited, worth=_sum_worth)
on_choice("group-worth-all", "a group's worth is the sum of all its scores", right_choice, has_groups, worth=_all_worth)
on_choice("groups-masked-with-zero", "experts of closed groups get 0 in the place of -inf; biased scores can be negative, and then 0 wins",
          right_choice, is_noaux, masked=0.0)  # fmt: skip


@mistake("groups-unbiased", "ffn.ids", "groups are chosen without the bias, and experts with it", lambda e: is_noaux(e))
def _groups_unbiased(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    scores = e.scores(logits(e, layer, at))
    worth = group_worth(scores.unflatten(-1, (e.args.n_expert_groups, -1)), e.args)
    return choose(right_choice(e, layer, at), e.args, worth=lambda grouped, args: worth)


@mistake("groups-strided", "ffn.ids", "expert i is counted to group i mod G; groups are runs of E / G experts", has_groups)
def _strided(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    g, n = e.args.n_expert_groups, e.args.n_routed_experts
    order = torch.arange(n).view(n // g, g).T.flatten()
    return order[choose(right_choice(e, layer, at)[:, order], e.args)]


@mistake("groups-fewer", "ffn.ids", "one group fewer than topk_group is open", lambda e: has_groups(e) and e.args.n_limited_groups > 1)
def _fewer(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    require(e.args.n_activated_experts <= (e.args.n_limited_groups - 1) * e.args.n_routed_experts // e.args.n_expert_groups)
    return choose(right_choice(e, layer, at), replace(e.args, n_limited_groups=e.args.n_limited_groups - 1))


@mistake("ids-shifted", "ffn.ids", "experts are counted from 1")
def _ids_shifted(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return (COMPUTE["ffn.ids"](e, layer, at) + 1) % e.args.n_routed_experts


# --- gating values ---------------------------------------------------------------------------------------------------


def on_weights(name: str, sentence: str, applies: Any = lambda e: True) -> Any:
    """A mistake in `ffn.weights`. The function is given the scores (n, E), the chosen ids (n, K) and the layer."""

    def add(how: Any) -> Any:
        def compute(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
            ids = e.value(f"{layer}.ffn.ids", at)
            return how(e, e.scores(logits(e, layer, at)), ids, layer)  # type: ignore[no-any-return]

        mistake(name, "ffn.weights", sentence, applies)(compute)
        return how

    return add


def gated(e: Expected, chosen: torch.Tensor, normalise: bool | None = None, scale: float | None = None) -> torch.Tensor:
    """(13) of the chosen scores (n, K), as the model has it or otherwise."""
    if e.args.norm_topk_prob if normalise is None else normalise:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * (e.args.route_scale if scale is None else scale)


@on_weights("weights-biased", "the correction bias is in the gating values; it is for the choice alone", has_bias)
def _weights_biased(e: Expected, scores: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    return gated(e, (scores + bias(e, layer)).gather(-1, ids))


@on_weights("weights-unnormalised", "gating values are not divided by their sum (norm_topk_prob)", normalises)
def _unnormalised(e: Expected, scores: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    return gated(e, scores.gather(-1, ids), normalise=False)


@on_weights("weights-normalised", "gating values are divided by their sum; this model has norm_topk_prob false", lambda e: not normalises(e))
def _normalised(e: Expected, scores: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    return gated(e, scores.gather(-1, ids), normalise=True)


@on_weights("weights-normalised-over-all", "gating values are divided by the sum of all experts' scores, not of the chosen", normalises)
def _over_all(e: Expected, scores: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    return gated(e, scores.gather(-1, ids) / scores.sum(-1, keepdim=True), normalise=False)


@on_weights("weights-unscaled", "routed_scaling_factor is missing (or applied before the division by the sum)", scales)
def _unscaled(e: Expected, scores: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    return gated(e, scores.gather(-1, ids), scale=1.0)


@on_weights("weights-scaled-twice", "routed_scaling_factor is applied twice", scales)
def _scaled_twice(e: Expected, scores: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    return gated(e, scores.gather(-1, ids), scale=e.args.route_scale**2)


@on_weights("weights-unnormalised-unscaled", "gating values are the bare scores: neither divided by their sum nor scaled",
            lambda e: normalises(e) and scales(e))  # fmt: skip
def _bare(e: Expected, scores: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    return scores.gather(-1, ids)


@mistake("weights-other-function", "ffn.weights", "gating values are of the router's other function, softmax for sigmoid or the other way round")
def _weights_other(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return gated(e, other_scores(e, layer, at).gather(-1, e.value(f"{layer}.ffn.ids", at)))


@mistake("weights-softmax-of-chosen", "ffn.weights", "gating values are a softmax over the chosen experts' logits, as in other families")
def _of_chosen(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return logits(e, layer, at).gather(-1, e.value(f"{layer}.ffn.ids", at)).softmax(-1) * e.args.route_scale


@on_weights("weights-sorted", "gating values are sorted and the ids are not, or the other way round: they belong to other experts")
def _sorted(e: Expected, scores: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    right = gated(e, scores.gather(-1, ids))
    by_id = right.gather(-1, ids.argsort(-1))
    return right.sort(-1, descending=True).values if torch.equal(by_id, right) else by_id


@on_weights("weights-bf16", "gating values are rounded to bfloat16; they are float32")
def _weights_bf16(e: Expected, scores: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    return gated(e, scores.gather(-1, ids)).bfloat16().to(e.dtype)


# --- experts and MLPs ------------------------------------------------------------------------------------------------


def on_mlps(name: str, sentence: str, act: Any) -> None:
    """A mistake within SwiGLU, at dense layers, shared and routed experts apart."""
    for point, where in (("ffn.out", "dense MLPs"), ("ffn.shared", "shared experts"), ("ffn.routed", "routed experts")):

        def how(e: Expected, layer: str, at: torch.Tensor, point: str = point) -> torch.Tensor:
            require(point != "ffn.out" or e.is_dense(layer))
            return COMPUTE[point](e.instead({"act": act}), layer, at)

        mistake(f"{name}:{point.removeprefix('ffn.')}", point, sentence.replace("WHERE", where))(how)


on_mlps("gate-up-swapped", "gate and up are swapped in WHERE: silu belongs to gate_proj (w1), not to up_proj (w3)",
        lambda gate, up: F.silu(up) * gate)  # fmt: skip
on_mlps("gelu", "WHERE have GELU in the place of SiLU", lambda gate, up: F.gelu(gate) * up)
on_mlps("gelu-tanh", "WHERE have GELU's tanh form in the place of SiLU", lambda gate, up: F.gelu(gate, approximate="tanh") * up)
on_mlps("relu", "WHERE have ReLU in the place of SiLU", lambda gate, up: F.relu(gate) * up)
on_mlps("act-missing", "WHERE multiply gate by up without SiLU", lambda gate, up: gate * up)
on_mlps("gate-missing", "WHERE leave up_proj out", lambda gate, up: F.silu(gate))
on_mlps("sigmoid-gate", "WHERE have sigmoid(gate) in the place of silu(gate)", lambda gate, up: gate.sigmoid() * up)


def on_routed(name: str, sentence: str, run: Any = None, applies: Any = lambda e: True, shift: int = 0) -> None:
    mistake(name, "ffn.routed", sentence, applies)(lambda e, layer, at: e.round(e.experts(layer, at, run and run(e), shift)))


on_routed("experts-unweighted", "experts' outputs are added without their gating values",
          lambda e: lambda x, prefix, w: e.mlp(x, prefix))  # fmt: skip
on_routed("experts-weighted-input", "gating values multiply the experts' input, before SwiGLU; they multiply its output",
          lambda e: lambda x, prefix, w: e.mlp(x * w, prefix))  # fmt: skip
on_routed("experts-weighted-twice", "gating values are applied twice", lambda e: lambda x, prefix, w: e.mlp(x, prefix) * w * w)
on_routed("experts-scaled-again", "routed_scaling_factor is applied to the experts' sum, and was in the gating values already",
          lambda e: lambda x, prefix, w: e.mlp(x, prefix) * w * e.args.route_scale, scales)  # fmt: skip
on_routed("experts-unscaled", "gating values are divided by routed_scaling_factor again, or another tensor of them is used",
          lambda e: lambda x, prefix, w: e.mlp(x, prefix) * w / e.args.route_scale, scales)  # fmt: skip
on_routed("experts-shifted", "each token goes to the expert after the chosen one", shift=1)
on_routed("experts-shifted-back", "each token goes to the expert before the chosen one", shift=-1)


@mistake("experts-first-alone", "ffn.routed", "only the first of a token's experts is added")
def _first_alone(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    keep = torch.zeros(e.args.n_activated_experts, dtype=e.dtype)
    keep[0] = 1
    return e.round(e.experts(layer, at, kept=keep))


@mistake("experts-last-lost", "ffn.routed", "the last of a token's experts is lost: a tile or a count is off by one")
def _last_lost(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(e.args.n_activated_experts, dtype=e.dtype)
    keep[-1] = 0
    return e.round(e.experts(layer, at, kept=keep))


@mistake("shared-scaled", "ffn.shared", "routed_scaling_factor multiplies the shared experts too", lambda e: has_shared(e) and scales(e))
def _shared_scaled(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(COMPUTE["ffn.shared"](e, layer, at) * e.args.route_scale)


@mistake("shared-averaged", "ffn.shared", "shared experts are averaged; they are one MLP of their widths together", lambda e: e.args.n_shared_experts > 1)
def _shared_averaged(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.round(COMPUTE["ffn.shared"](e, layer, at) / e.args.n_shared_experts)


@mistake("shared-of-residual", "ffn.shared", "shared experts are given the residual before ffn_norm", has_shared)
def _shared_of_residual(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
    return e.mlp(e.value(f"{layer}.after_attn", at), f"{layer}.ffn.shared_experts")


def on_sum(name: str, sentence: str, total: Any, applies: Any = has_shared) -> None:
    """total: from the model, the routed and the shared part to the layer's output."""

    def how(e: Expected, layer: str, at: torch.Tensor) -> torch.Tensor:
        require(not e.is_dense(layer))
        return e.round(total(e, *(e.value(f"{layer}.ffn.{part}", at) for part in ("routed", "shared"))))

    mistake(name, "ffn.out", sentence, applies)(how)


def scaled_shared(e: Expected) -> bool:
    return has_shared(e) and scales(e)


on_sum("shared-missing", "the shared experts' output is not added", lambda e, routed, shared: routed)
on_sum("routed-missing", "the routed experts' output is not added", lambda e, routed, shared: shared)
on_sum("shared-scaled-in-sum", "routed_scaling_factor multiplies the shared experts too", lambda e, routed, shared: routed + shared * e.args.route_scale, scaled_shared)
on_sum("sum-scaled", "routed_scaling_factor multiplies the sum of routed and shared experts", lambda e, routed, shared: (routed + shared) * e.args.route_scale, scaled_shared)
on_sum("sum-unscaled", "the routed part is divided by routed_scaling_factor", lambda e, routed, shared: routed / e.args.route_scale + shared, scaled_shared)
on_sum("shared-twice", "the shared experts are added twice (once for each rank, or in two places)", lambda e, routed, shared: routed + 2 * shared)
on_sum("sum-halved", "the sum of routed and shared experts is halved", lambda e, routed, shared: (routed + shared) / 2)

"""Faults of one op put into each side, this engine, transformers and a foreign program, are found there and named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from core.errors import UserError
from core.numerics import Numerics
from core.run_config import PAGE_SIZE
from model import Transformer
from ops import reference
from ops.reference_backend import ReferenceBackend
from support.checkpoints import fp8_sizes
from support.families import FAMILIES, V3, two_layers
from support.model_pairs import ours, random_checkpoint, tokens
from verification.check import Report, check
from verification.points import split_name
from verification.recorder import record_tokens
from verification.trace import Trace
from verification.transformers_run import transformers_trace
from verification.weights import Weights

TOKENS = tokens(40, 256, 5)
SMALL = two_layers("v3") | {"v_head_dim": 32}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("sides") / "v3", SMALL)


@pytest.fixture(scope="module")
def fp8_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = V3 | fp8_sizes(2) | {"num_hidden_layers": 2, "quantization_config": {"scale_fmt": "ue8m0"}}
    return random_checkpoint(tmp_path_factory.mktemp("sides") / "fp8", config, fp8=True)


def first_and_cause(report: Report) -> tuple[str, list[str]]:
    assert report.first is not None, "nothing diverges"
    request, judged = report.first
    return judged.name, [cause.name.split(":")[0] for cause in request.causes[judged.name]]


# --- this engine -----------------------------------------------------------------------------------------------------


class Faulty(ReferenceBackend):
    """The reference with one op replaced: `fault` is given the right method and its arguments."""

    def __init__(self, op: str, fault: Callable[..., Any]):
        super().__init__()
        right = getattr(self, op)
        setattr(self, op, lambda *args, **more: fault(right, *args, **more))


def with_rule(**changes: Any) -> Callable[..., Any]:
    return lambda right, logits, bias, rule: right(logits, bias, replace(rule, **changes))


def biased_weights(right: Any, logits: Any, bias: Any, rule: Any) -> Any:
    _, ids = right(logits, bias, rule)
    g = (logits.sigmoid() + bias).gather(-1, ids)
    return g / g.sum(-1, keepdim=True) * rule.route_scale, ids


def unmasked(right: Any, logits: Any, bias: Any, rule: Any) -> Any:
    grouped = (logits.sigmoid() + bias).unflatten(-1, (rule.n_groups, -1))
    kept = grouped.topk(2, -1).values.sum(-1).topk(rule.n_limited_groups, -1).indices
    mask = torch.zeros(grouped.shape[:2]).scatter_(1, kept, 1.0)
    ids = (grouped * mask[..., None]).flatten(1).topk(rule.top_k, -1).indices
    g = logits.sigmoid().gather(-1, ids)
    return g / g.sum(-1, keepdim=True) * rule.route_scale, ids


def shifted_mask(right: Any, q_nope: Any, q_pe: Any, latents: Any, batch: Any, *more: Any) -> Any:
    return right(q_nope, q_pe, latents, replace(batch, positions=(batch.positions - 1).clamp(min=0)), *more)


def halves(right: Any, q_pe: Any, cos: Any, sin: Any) -> Any:
    pairs = q_pe.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return right(pairs, cos, sin).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def swapped(right: Any, gate_up: Any, inter: int, fp8: Any = None) -> Any:
    gate, up = reference.halves(gate_up, inter)
    return F.silu(up) * gate


def quantised_down(right: Any, x: Any, scale_fmt: Any = None) -> Any:
    blocks = F.pad(x.float(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    s = torch.exp2((blocks.abs().amax(-1).clamp(min=1e-4) / 448).log2().floor())
    q = (blocks / s[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q.flatten(-2)[..., : x.shape[-1]].contiguous(), s


ENGINE: dict[str, tuple[str, Callable[..., Any], str, str]] = {  # op, fault, point, cause
    "bias in weights": ("route", biased_weights, "layers.1.ffn.weights", "weights-biased"),
    "no normalisation": ("route", with_rule(normalise=False), "layers.1.ffn.weights", "weights-unnormalised"),
    "no factor": ("route", with_rule(route_scale=1.0), "layers.1.ffn.weights", "weights-unscaled"),
    "no groups": ("route", with_rule(n_groups=1), "layers.1.ffn.ids", "groups-ignored"),
    "group max": ("route", with_rule(topk_method="group_limited_greedy"), "layers.1.ffn.ids", "group-worth-max"),
    "no bias": ("route", lambda right, logits, bias, rule: right(logits, bias * 0, rule), "layers.1.ffn.ids", "choice-unbiased"),
    "masked with zero": ("route", unmasked, "layers.1.ffn.ids", "groups-masked-with-zero"),
    "softmax": ("route", with_rule(score_func="softmax"), "layers.1.ffn.ids", "choice-other-function"),
    "scale": ("_attend", lambda right, *args: right(*args[:-1], args[-1] / 1.5), "layers.0.attn.o", "scale-fitted"),
    "no temperature": ("_attend", lambda right, *args: right(*args[:-1], 48**-0.5), "layers.0.attn.o", "scale-no-temperature"),
    "mask": ("_attend", shifted_mask, "layers.0.attn.o", "mask-not-itself"),
    "values of other heads": ("_attend", lambda right, *args: right(*args[:-2], args[-2].roll(1, 0), args[-1]), "layers.0.attn.o", "kv-heads-shifted"),
    "rope in halves": ("_rotary", halves, "layers.0.attn.q_rope", "rope-halves"),
    "gate and up": ("silu_mul", swapped, "layers.0.ffn.out", "gate-up-swapped"),
    "eps": ("norm", lambda right, x, w, eps, *more, **named: right(x, w, 1e-2, *more, **named), "layers.0.attn_norm", "none"),
    "norm of the sum": ("norm", lambda right, x, w, eps, *more, **named: (right(x, 1 + w, eps, *more, **named)[0], right(x, w, eps, *more, **named)[1]),
                        "layers.0.attn_norm", "norm-plus-one"),
    "router in bf16": ("project_float32", lambda right, x, w: right(x, w).bfloat16().float(), "layers.1.ffn.router_logits", "router-bf16"),
    "shared twice": ("experts", lambda right, *args: right(*args) + (args[7]() if args[7] else 0), "layers.1.ffn.out", "shared-twice"),
    "experts shifted": ("experts", lambda right, x, w, ids, *more: right(x, w, (ids + 1) % 32, *more), "layers.1.ffn.routed", "experts-shifted"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENGINE)
def test_faults_of_this_engine(path: Path, name: str) -> None:
    op, fault, point, cause = ENGINE[name]
    trace = record_tokens(ours(path, backend=Faulty(op, fault)), [TOKENS])
    found, causes = first_and_cause(check(trace, Weights(path)))
    assert found == point and (cause in causes or (cause == "none" and not causes)), (found, causes)


def test_a_fault_in_quantised_activations(fp8_path: Path) -> None:
    backend = Faulty("act_quant", quantised_down)
    num = Numerics(torch.bfloat16, gemm="fp8", scale_fmt="ue8m0")
    model = ours(fp8_path, num, backend=backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "act_quant", lambda x, **more: quantised_down(None, x))
        trace = record_tokens(model, [TOKENS])
    found, causes = first_and_cause(check(trace, Weights(fp8_path)))
    assert found == "layers.0.attn.q_a" and causes == ["ue8m0-down"]


def wrong_weight(model: Transformer) -> None:
    model.layers[1].ffn_norm.weight.data.copy_(model.layers[1].attn_norm.weight)


def one_row(model: Transformer) -> None:
    model.layers[1].attn.wo.weight.data[5].zero_()


def mtp_order(model: Transformer) -> None:
    module = model.mtp[0]
    module.enorm, module.hnorm = module.hnorm, module.enorm


WEIGHTS: dict[str, tuple[Callable[[Transformer], None], str, str]] = {
    "the wrong norm": (wrong_weight, "layers.1.ffn_norm", "norms-swapped"),
    "a row of zeros": (one_row, "layers.1.attn.out", "some-channels"),
    "swapped norms of the module": (mtp_order, "mtp.0.enorm", "mtp-norms-swapped"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_wrong_weights_in_the_engine(path: Path, name: str) -> None:
    change, point, cause = WEIGHTS[name]
    model = ours(path)
    change(model)
    found, causes = first_and_cause(check(record_tokens(model, [TOKENS]), Weights(path)))
    assert (found, causes) == (point, [cause])


def test_one_layer_and_one_position(path: Path) -> None:
    """A page of the cache that is overwritten: the report names the layer, the op and the first wrong position."""
    model = ours(path)
    right = model.layers[1].attn.ops.mla

    class Overwritten(ReferenceBackend):
        def mla(self, q: Any, cos: Any, sin: Any, latents: Any, *more: Any) -> Any:
            spoiled = latents.clone()
            spoiled[0, 30] = 1.0
            return right(q, cos, sin, spoiled, *more)

    model.layers[1].attn.ops = Overwritten()
    report = check(record_tokens(model, [TOKENS]), Weights(path))
    found, causes = first_and_cause(report)
    assert found == "layers.1.attn.o" and causes == ["some-positions"] and PAGE_SIZE > 40
    [cause] = report.requests[0].causes[found]
    assert "the first of them 3" in cause.sentence and report.requests[0].first.position >= 30  # type: ignore[union-attr]


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["v3", "v2", "v2-lite", "moonlight", "glm-4.7-flash"])
def test_transformers_passes(tmp_path: Path, family: str) -> None:
    """Every point that it has, against the exact values and against this engine's, but for the MTP module's."""
    path = random_checkpoint(tmp_path / "c", two_layers(family))
    trace = transformers_trace(path, TOKENS)
    report = check(trace, Weights(path), record_tokens(ours(path), [TOKENS]))
    assert report.first is None and {split_name(name)[0] for name in report.requests[0].missing} <= {"mtp.0"}
    assert all(j.judged and (j.accumulated or 0) < 2e-5 for j in report.requests[0].points)


def norm_eps(model: Any) -> None:
    model.model.layers[1].self_attn.kv_a_layernorm.variance_epsilon = 1e-5


def no_mscale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = model.model.layers[1].self_attn.qk_head_dim**-0.5


def factor(model: Any) -> None:
    model.model.layers[1].mlp.gate.routed_scaling_factor = 1.0


def no_bias(model: Any) -> None:
    model.model.layers[1].mlp.gate.e_score_correction_bias.zero_()


def gelu(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


def tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def not_interleaved(model: Any) -> None:
    model.config.rope_interleave = False


def experts_swapped(model: Any) -> None:
    gate_up = model.model.layers[1].mlp.experts.gate_up_proj.data
    gate_up.copy_(torch.cat(gate_up.chunk(2, dim=1)[::-1], dim=1))


THEIRS: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "eps of an inner norm": (norm_eps, "layers.1.attn.c_kv", "norm-eps-1e-5"),
    "no temperature": (no_mscale, "layers.1.attn.o", "scale-no-temperature"),
    "no factor": (factor, "layers.1.ffn.weights", "weights-unscaled"),
    "no bias": (no_bias, "layers.1.ffn.ids", "choice-unbiased"),
    "GELU": (gelu, "layers.0.ffn.out", "gelu"),
    "head": (tied, "logits", "head-tied"),
    "rope": (not_interleaved, "layers.0.attn.q_rope", "rope-halves"),
    "gate and up": (experts_swapped, "layers.1.ffn.routed", "gate-up-swapped"),
}


@pytest.mark.parametrize("name", THEIRS)
def test_faults_of_transformers(path: Path, name: str) -> None:
    change, point, cause = THEIRS[name]
    found, causes = first_and_cause(check(transformers_trace(path, TOKENS, change), Weights(path)))
    assert found == point and causes[0] == cause, (found, causes)


def test_transformers_refuses_quantised_weights(fp8_path: Path) -> None:
    with pytest.raises(UserError, match="quantised; give transformers plain weights"):
        transformers_trace(fp8_path, TOKENS)


# --- points that were not recorded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept, fault, where, cause", [
    pytest.param(("layers.*.hidden", "logits"), with_rule(normalise=False), "layers.1.hidden", "weights-unnormalised", marks=pytest.mark.trust, id="hidden states"),
    pytest.param(("embed", "layers.*.attn.out", "layers.*.hidden"), with_rule(route_scale=1.0), "layers.1.hidden", "weights-unscaled", id="and attention"),
    pytest.param(("logits",), with_rule(n_groups=1), "logits", "groups-ignored", marks=pytest.mark.trust, id="logits"),
])  # fmt: skip
def test_few_points(path: Path, kept: tuple[str, ...], fault: Any, where: str, cause: str) -> None:
    """A program that gives the layers' outputs alone, or the logits: what is between is recomputed, and the mistakes of
    ops in between are tried."""
    from fnmatch import fnmatchcase

    request = record_tokens(ours(path, backend=Faulty("route", fault)), [TOKENS], mtp=False).requests[0]
    request.points = {name: value for name, value in request.points.items() if any(fnmatchcase(name, p) for p in kept)}
    found, causes = first_and_cause(check(Trace([request]), Weights(path)))
    assert found == where and cause in causes, (found, causes)


def test_other_families_are_here() -> None:
    assert {"v2", "v2-lite", "moonlight", "glm-4.7-flash"} <= FAMILIES.keys()

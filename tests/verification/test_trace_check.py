"""The comparison: no false alarm in any mode, and known mistakes, one at a time, are found at their op and named."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.numerics import Numerics
from ops.reference_backend import ReferenceBackend
from support.checkpoints import fp8_sizes
from support.families import FAMILIES, V3, two_layers
from support.model_pairs import ours, random_checkpoint, tokens
from support.packed_checkpoints import LAYOUTS as PACKED
from support.packed_checkpoints import make_packed
from support.thread_ranks import on_every_rank
from support.traces import RUN, engine_trace, foreign_run
from verification.check import Report, check, check_request, regret
from verification.expected import Expected, kind_of
from verification.mistakes import MISTAKES, Mistake
from verification.recorder import record_tokens
from verification.trace import RequestTrace, RunNumerics, Trace
from verification.weights import Weights

IN_FP8 = V3 | fp8_sizes(2) | {"num_hidden_layers": 2}
UE8M0 = IN_FP8 | {"quantization_config": {"scale_fmt": "ue8m0"}}
TOKENS = tokens(40, 256, 5)
MODELS: dict[str, tuple[dict[str, Any], bool, RunNumerics]] = {  # that mistakes show in: the first where they do counts
    "v3": (two_layers("v3"), False, RunNumerics()),
    "v2": (two_layers("v2"), False, RunNumerics()),
    "v2-lite": (two_layers("v2-lite"), False, RunNumerics()),
    "moonlight": (two_layers("moonlight"), False, RunNumerics()),
    "fp8": (IN_FP8, True, RunNumerics()),
    "w8a8": (IN_FP8, True, RunNumerics("bfloat16", "fp8")),
    "ue8m0": (UE8M0, True, RunNumerics("bfloat16", "fp8", "ue8m0", "fp8")),
    "square": (two_layers("v3") | {"v_head_dim": 32}, False, RunNumerics()),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    folder = tmp_path_factory.mktemp("check")
    return {name: Weights(random_checkpoint(folder / name, config, fp8=fp8)) for name, (config, fp8, _) in MODELS.items()}


def divergences(report: Report) -> list[tuple[str, float, float]]:
    return [(j.name, j.local, j.tolerance) for request in report.requests for j in request.points if j.diverges]


# --- no false alarm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [
    name if name in ("v3", "v2", "v2-lite", "moonlight") else pytest.param(name, marks=pytest.mark.trust) for name in FAMILIES
])  # fmt: skip
def test_the_engine_passes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    path = random_checkpoint(tmp_path / "c", two_layers(name))
    trace = record_tokens(ours(path, Numerics(dtype)), [TOKENS])
    report = check(trace, Weights(path))
    assert not divergences(report) and all(j.judged for j in report.requests[0].points)
    near = max((j.local / j.tolerance, j.name) for j in report.requests[0].points if j.tolerance)
    assert near[0] < 0.5, near  # tolerances leave room for another machine's order of sums


@pytest.mark.parametrize("num", [
    Numerics(torch.float32), Numerics(torch.bfloat16), Numerics(torch.bfloat16, gemm="bf16"), Numerics(torch.bfloat16, gemm="fp8"),
    Numerics(torch.bfloat16, gemm="fp8", fp8_latents=True), Numerics(torch.bfloat16, fp8_latents=True),
    Numerics(torch.float32, gemm="bf16"), Numerics(torch.bfloat16, gemm="fp8", scale_fmt="ue8m0"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("backend", [ReferenceBackend, lambda: None], ids=["reference", "cpu"])
def test_quantised_runs_pass(tmp_path: Path, num: Numerics, backend: Callable[[], Any]) -> None:
    path = random_checkpoint(tmp_path / "c", UE8M0 if num.scale_fmt else IN_FP8, fp8=True)
    report = check(record_tokens(ours(path, num, backend=backend()), [TOKENS]), Weights(path))
    assert not divergences(report) and report.numerics == str(RunNumerics.of(num))


@pytest.mark.parametrize("layout", [
    name if name in ("int4-zero-points", "int8-blocks", "gptq") else pytest.param(name, marks=pytest.mark.trust) for name in PACKED
])  # fmt: skip
def test_packed_weights_pass(tmp_path: Path, layout: str) -> None:
    make_packed(tmp_path / "c", PACKED[layout], IN_FP8 | {"hidden_size": 256})
    report = check(record_tokens(ours(tmp_path / "c", Numerics(torch.bfloat16)), [TOKENS[:12]]), Weights(tmp_path / "c"))
    assert not divergences(report)


def test_ranks_lanes_stages_and_drafts_pass(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "c", V3)
    weights = Weights(path)
    trace = on_every_rank(2, lambda tp: record_tokens(ours(path, Numerics(torch.float32, experts="split"), tp), [TOKENS]))[0]
    assert not divergences(check(trace, weights))
    for name, layout in {"lanes": {"lanes": 2, "size": 2}, "stages": {"stages": 2}}.items():
        prompts = [TOKENS, TOKENS[:7]]
        trace = engine_trace(path, tmp_path / name, prompts, 5, run=replace(RUN, mtp=2, max_num_batched_tokens=16), **layout)
        report = check(trace, weights)
        assert not divergences(report) and all(j.judged for request in report.requests for j in request.points)


def test_what_cannot_be_judged_is_said(models: dict[str, Weights]) -> None:
    """A trace of one position: attention needs the latents of those before, and says so; all else is judged."""
    weights = models["v3"]
    whole = foreign_run(weights, TOKENS).requests[0]
    rows = {"": torch.tensor([20])}
    one = RequestTrace("0", whole.tokens, {name: value[20:21] for name, value in whole.points.items()}, rows)
    report = check_request(one, Trace([one]), weights)
    unjudged = {j.name: j.note for j in report.points if not j.judged}
    assert set(unjudged) == {"layers.0.attn.o", "layers.1.attn.o", "mtp.0.attn.o"}
    assert unjudged["layers.1.attn.o"] == "not judged: layers.1.attn.c_kv at earlier positions was not recorded"
    assert report.first is None


def test_near_ties(models: dict[str, Weights]) -> None:
    """Another choice is right where rounding of the logits could have made it: of experts, and of groups; not otherwise."""
    weights = models["v3"]
    whole = foreign_run(weights, TOKENS)
    points, name = dict(whole.requests[0].points), "layers.1.ffn.ids"
    expected = Expected(whole.requests[0], weights)
    at = torch.arange(len(TOKENS))
    choice = expected.biased("layers.1", expected.scores(expected.value("layers.1.ffn.router_logits", at)))
    ids = points[name].clone()
    per = weights.args.n_routed_experts // weights.args.n_expert_groups

    def judged() -> float:
        request = RequestTrace("0", whole.requests[0].tokens, points | {name: ids}, whole.requests[0].rows)
        return next(j.local for j in check_request(request, whole, weights, diagnose=False).points if j.name == name)

    assert judged() == 0
    kept = {int(e) // per for e in ids[7]}
    others = [e for e in range(32) if e not in ids[7].tolist() and e // per in kept]
    ids[7, -1] = others[0] if choice[7, others[0]] < choice[7, ids[7]].min() else others[-1]
    assert judged() == pytest.approx(1 / len(TOKENS))  # far from a tie
    ids = points[name].clone()
    closed = [e for e in range(32) if e // per not in kept]
    ids[7, -1] = closed[0]
    assert judged() > 0  # of a fourth group
    assert regret(choice[7], points[name][7], weights.args) == 0
    ids, wanted = points[name].clone(), points[name][7]
    logits, name_of_logits = points["layers.1.ffn.router_logits"].clone(), "layers.1.ffn.router_logits"
    least, bias = wanted[choice[7, wanted].argmin()], weights.exact("layers.1.ffn.gate.bias")
    for other in others:  # has this expert's logit make it a tie with the least of the chosen
        score = choice[7, least] - bias[other] - 1e-7
        if 0.01 < score < 0.99:
            points[name_of_logits] = logits.clone()
            points[name_of_logits][7, other] = torch.logit(score)
            ids[7] = torch.where(wanted == least, other, wanted)
            assert judged() == 0
            points[name_of_logits][7, other] = torch.logit(score - 0.005)
            assert judged() > 0
            break
    else:
        pytest.fail("no expert can be made a tie")
    best = torch.zeros(32)
    best[[0, 1, 4, 5, 8, 9]] = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    best[[12, 13]] = best[[8, 9]] - 1e-9
    assert regret(best, torch.tensor([0, 1, 4, 5, 12, 13]), weights.args) < 1e-7
    best[[12, 13]] -= 0.1
    assert regret(best, torch.tensor([0, 1, 4, 5, 12, 13]), weights.args) > 0.05
    assert regret(best, torch.tensor([0, 1, 4, 5, 8, 10]), weights.args) == pytest.approx(0.4)


def test_attention_weights(models: dict[str, Weights]) -> None:
    """Of each head they sum to 1, look at nothing later, and weigh the values to the recorded output."""
    weights = models["v3"]
    request = foreign_run(weights, TOKENS).requests[0]
    expected, at = Expected(request, weights), torch.tensor([0, 5, 39])
    for head in range(weights.args.n_heads):
        p = expected.attention_weights("layers.1", at, head)
        assert p.shape == (3, 40) and torch.allclose(p.sum(-1), torch.ones(3, dtype=p.dtype))
        assert not p[1, 6:].any() and p[0, 0] == 1
        values = request.points["layers.1.attn.c_kv"].double() @ expected.kv_weights("layers.1")[1][head].T
        torch.testing.assert_close(p @ values, request.points["layers.1.attn.o"][at, head].double(), atol=1e-5, rtol=1e-4)


def test_nans_diverge(models: dict[str, Weights]) -> None:
    trace = foreign_run(models["v3"], TOKENS[:12])
    trace.requests[0].points["layers.1.attn.out"][3, 5] = torch.nan  # type: ignore[index]
    report = check(trace, models["v3"])
    assert report.first is not None
    request, judged = report.first
    assert (judged.name, judged.position) == ("layers.1.attn.out", 3)
    assert [cause.name for cause in request.causes[judged.name]] == ["not-finite"]


def test_the_exact_run_is_the_engine_s(models: dict[str, Weights]) -> None:
    """The two, which share no code, agree to float32's rounding in every family's logits."""
    for label in ("v3", "v2", "v2-lite", "moonlight"):
        path = models[label].path
        exact, own = foreign_run(models[label], TOKENS).requests[0], record_tokens(ours(path), [TOKENS]).requests[0]
        error = (exact.points["logits"] - own.points["logits"]).norm() / own.points["logits"].norm()
        assert float(error) < 1e-5, label


# --- mistakes --------------------------------------------------------------------------------------------------------


def shown(models: dict[str, Weights], known: Mistake, ids: list[int]) -> Iterator[tuple[str, Trace]]:
    """A foreign run with this mistake of each model that can show it."""
    for label, (_, _, numerics) in MODELS.items():
        if known.applies(Expected(None, models[label], numerics)):  # type: ignore[arg-type]
            right = foreign_run(models[label], ids, None, numerics).requests[0]
            wrong = foreign_run(models[label], ids, known, numerics)
            if any(not torch.equal(right.points[name], value) for name, value in wrong.requests[0].points.items()):
                yield label, wrong


def found_and_named(models: dict[str, Weights], known: Mistake, ids: list[int]) -> tuple[bool, bool, str]:
    """Whether a mistake is found at its op, and named, in the first model where it shows beyond rounding."""
    for label, trace in shown(models, known, ids):
        first = check(trace, models[label]).first
        if first is None:
            continue
        request, judged = first
        names = [cause.name for cause in request.causes[judged.name]]
        return kind_of(judged.name) in known.points, known.name in names, f"{known.name} in {label}: {judged.name}, {names}"
    return False, False, f"{known.name}: shown by no model"


def possible(known: Mistake) -> bool:
    """Whether some model here can show it: not that of a format that none has, nor what is right already."""
    return not known.name.startswith("int4") and known.name not in NOT_SHOWN


NOT_SHOWN = {  # in these models they are within rounding, or what the model does
    *(f"norm-eps-{eps}:{point}" for eps in ("1e-6", "1e-12") for point in
      ("attn.c_q", "attn.c_kv", "mtp.enorm", "mtp.hnorm", "mtp.norm", "norm", "attn_norm", "ffn_norm")),
    *(f"scale-{how}:ffn.routed" for how in ("transposed", "of-row-blocks", "of-column-blocks", "rows-only")),
    "activations-by-row:ffn.routed",
}  # fmt: skip


def rate(models: dict[str, Weights], chosen: list[Mistake], ids: list[int]) -> None:
    outcomes = [found_and_named(models, known, ids) for known in chosen]
    missed = [text for found, is_named, text in outcomes if not (found and is_named)]
    assert len(missed) <= 0.05 * len(chosen), missed
    assert not [text for found, _, text in outcomes if not found], "found elsewhere than at their op"


def test_mistakes_are_found_and_named(models: dict[str, Weights]) -> None:
    """One of each kind, in a run of a program that shares no code with the engine."""
    kinds = {known.name.split(":")[0]: known for known in reversed(MISTAKES) if possible(known)}
    chosen = [known for i, known in enumerate(kinds.values()) if i % 4 == 0]
    assert len(kinds) > 150 and len(chosen) >= 40
    rate(models, chosen, TOKENS)


@pytest.mark.trust
def test_all_mistakes_are_found_and_named(models: dict[str, Weights]) -> None:
    chosen = [known for known in MISTAKES if possible(known)]
    assert len(chosen) > 350
    rate(models, chosen, tokens(66, 256, 5))

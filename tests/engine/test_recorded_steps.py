"""Decode steps that a CPU recorded answer, to the bit, as those that it did not."""

import functools
from dataclasses import replace

import pytest
import torch

from core.numerics import Numerics
from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine.engine import Engine
from engine.rank_memory import RankSpec
from engine.recorded_steps import ROWS, kept_bytes, records, widths
from ops.cpu import kernels
from ops.cpu.backend import CompiledCpuBackend
from ops.cpu.captured_calls import _tensors
from support.engine_runs import questions
from support.families import FAMILIES
from support.model_pairs import ours, random_checkpoint

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="there is no C compiler")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each family's model in bfloat16, made once."""

    @functools.cache
    def made(family):
        return ours(random_checkpoint(tmp_path_factory.mktemp(family), FAMILIES[family]), Numerics())

    return made


def answers(model, run, params, prompts):
    """Tokens, log-probabilities and drafts that were accepted, and the engine."""
    engine = Engine(model, None, run)
    requests = engine.generate(prompts, params)
    engine.scheduler.check_integrity()
    said = [(r.tokens, [t.logprob for t in r.events], r.error) for r in requests]
    return said, engine.stats.accepted, engine


@pytest.mark.parametrize("family, mtp", [("v3", 0), ("v3", 1), ("v3", 3), ("v2-lite", 0), ("moonlight", 0)])
def test_answers_are_the_same(models, family, mtp):
    """Chunked prompts, sequences that come and go, sampled tokens, pages that were another's, preemption."""
    model, params = models(family), SamplingParams(temperature=0.8, max_new_tokens=30, seed=4, logprobs=2)
    run = RunConfig(n_pages=9, max_model_len=200, max_num_seqs=4, max_num_batched_tokens=40, mtp=mtp)
    recorded, accepted, engine = answers(model, run, params, questions(9))
    plain, wanted, other = answers(model, replace(run, eager=True), params, questions(9))
    assert recorded == plain and accepted == wanted
    [steps], other_steps = engine.runner.step_graphs, other.runner.step_graphs
    shapes = set(steps._shapes)
    assert steps.capturable and not other_steps
    assert shapes and all(n * width <= ROWS and width in (1, 1 + mtp) for n, width in shapes)
    assert mtp == 0 or set(engine.runner.draft_graphs[0]._shapes)
    engine.close()
    assert not engine.runner.step_graphs


def test_a_recorded_step_reads_to_the_end_of_the_context(models):
    """It was recorded when the sequence was short: what it works in has room for the longest."""
    run = RunConfig(n_pages=40, max_model_len=2000, max_num_seqs=2, max_num_batched_tokens=512)
    params = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
    prompts = [*questions(1, most=2), list(range(1, 1990))]
    model = models("v3")
    engine, plain = Engine(model, None, run), Engine(model, None, replace(run, eager=True))
    for prompt in prompts:  # one at a time: one shape
        assert [r.tokens for r in engine.generate([prompt], params)] == [r.tokens for r in plain.generate([prompt], params)]
    assert list(engine.runner.step_graphs[0]._shapes) == [(1, 1)]


def test_what_cannot_be_recorded_runs_unrecorded(models, monkeypatch):
    """A forward that reads values ends the attempt, and not the request."""
    model = models("v3")
    run, params = RunConfig(n_pages=9, max_model_len=200, max_num_seqs=2), SamplingParams(temperature=0, max_new_tokens=8)
    plain = answers(model, replace(run, eager=True), params, questions(3))[0]
    norm = CompiledCpuBackend.norm

    def reading(self, x, *args, **more):
        assert x[0, 0].item() == x[0, 0].item()
        return norm(self, x, *args, **more)

    monkeypatch.setattr(CompiledCpuBackend, "norm", reading)
    said, _, engine = answers(model, run, params, questions(3))
    assert said == plain and not engine.runner.step_graphs[0].capturable


def test_what_is_recorded(models):
    """The kernels in C on one rank, and nothing that the reference computes."""
    rank, run = RankSpec(models("v3").args, Numerics(), gpu=False), RunConfig()
    assert records(rank, run)
    assert not records(rank, replace(run, eager=True)) and not records(rank, replace(run, pp=2))
    for other in (
        replace(rank, gpu=True), replace(rank, ranks=2), replace(rank, num=Numerics(torch.float32)),
        replace(rank, num=Numerics(fp8_latents=True)), replace(rank, num=Numerics(batch_invariant=True)),
        replace(rank, num=Numerics(gemm="fp8")),
    ):  # fmt: skip
        assert not records(other, run)
    assert widths(run) == [1] and widths(replace(run, mtp=3)) == [1, 4]


@pytest.mark.parametrize("mtp", [0, 1])
def test_it_keeps_no_more_than_the_plan_says(models, mtp):
    """All shapes, of steps and drafts, with every tensor that their calls refer to."""
    model = models("v3")
    run = RunConfig(n_pages=40, max_model_len=256, max_num_seqs=ROWS, mtp=mtp)
    engine = Engine(model, None, run)
    rank = RankSpec(model.args, model.num, gpu=False, mtp=mtp > 0)
    held = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), engine.runner.cache]}
    for n in range(1, ROWS + 1):
        for width in widths(run):
            if n * width <= ROWS:
                slices = [([1] * width, 3, [i]) for i in range(n)]
                states = engine.runner.step_graphs[0].run(slices).hidden
                if mtp:
                    engine.runner.draft_graphs[0].run(slices, states)
    kept = {}
    for graphs in (*engine.runner.step_graphs, *engine.runner.draft_graphs):
        for recorded in graphs._shapes.values():
            for t in recorded_tensors(recorded):
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    scratch = engine.runner.step_graphs[0].scratch.take(1).untyped_storage().data_ptr()
    taken = sum(nbytes for at, nbytes in kept.items() if at not in held and at != scratch)
    said = kept_bytes(rank, engine.run)
    assert said / 2 < taken <= said


def recorded_tensors(recorded):
    """Those that a shape's calls refer to."""
    calls = recorded.calls
    for call in calls._calls:
        yield from _tensors(call.args)
    yield from _tensors(calls._kept)
    yield from _tensors(tuple(recorded.result))


"""Recorded runs: every mode of the engine has one rank's values at every point, and records them unchanged, in bounds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.batch import Batch
from core.errors import UserError
from core.numerics import Numerics
from core.run_config import PAGE_SIZE
from engine.engine import Engine
from ops import reference
from ops.reference_backend import ReferenceBackend
from support.checkpoints import fp8_sizes
from support.engine_runs import greedy, questions, sums
from support.families import FAMILIES, V3
from support.model_pairs import hidden_states, ours, random_checkpoint, tokens
from support.thread_ranks import on_every_rank
from support.traces import RUN, engine_trace, largest_difference
from verification.engine_trace import EngineTrace, acceptance
from verification.points import names_of, shape_of
from verification.recorder import Recorder, record_tokens
from verification.recording import Selection
from verification.recording_ops import RecordingOps
from verification.trace import Trace
from verification.trace_reading import read_trace

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
FLOAT32 = Numerics(torch.float32)
PROMPTS = [tokens(70, 256, 1), tokens(9, 256, 2), tokens(33, 256, 3)]


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("recorder") / "v3", V3)


@pytest.fixture(scope="module")
def alone(v3: Path) -> Trace:
    return record_tokens(ours(v3), PROMPTS)


def agree(found: Trace, wanted: Trace, within: float = 2e-5) -> None:
    for a, b in zip(found.requests, wanted.requests, strict=True):
        worst = largest_difference(a, b)
        assert worst[0] < within, worst


@pytest.mark.parametrize("name", FAMILIES)
def test_every_point_is_there(tmp_path: Path, name: str) -> None:
    """With the shape that the table says, for each token, and the model computes what it did, to the bit."""
    model = ours(random_checkpoint(tmp_path / "c", FAMILIES[name]))
    before = hidden_states(model, PROMPTS[0])
    trace = record_tokens(model, PROMPTS[:2])
    known = names_of(model.args)
    for request, prompt in zip(trace.requests, PROMPTS, strict=False):
        assert list(request.points) == list(known)
        for point, value in request.points.items():
            rows = len(prompt) - point.startswith("mtp.")
            assert tuple(value.shape) == (rows, *shape_of(known[point], model.args)), point
            assert request.positions(point).tolist() == list(range(rows))
    with Recorder(model) as recorder:
        recorder.follow([(recorder.open("0", 70), range(2))])
        assert torch.equal(hidden_states(model, PROMPTS[0]), before)
    assert not any(isinstance(getattr(m, "ops", None), RecordingOps) for m in model.modules())
    assert torch.equal(hidden_states(model, PROMPTS[0]), before) and "draft" not in vars(model)


def test_values_are_the_models_own(v3: Path) -> None:
    """Some that are known otherwise: the cache, the logits, the sums of what goes into a residual."""
    model = ours(v3)
    with Recorder(model) as recorder:
        recording = recorder.open("0", 70)
        recorder.follow([(recording, range(2))])
        cache = model.new_cache(2)
        hidden = model(Batch.pack([(PROMPTS[0], 0, [1, 0])]), cache)
    points = recording.finish(PROMPTS[0]).points
    kept = torch.cat((points["layers.1.attn.c_kv"], points["layers.1.attn.k_rope"]), dim=-1)
    assert torch.equal(kept, torch.cat((cache[1, 1], cache[1, 0]))[:70])
    assert torch.equal(points["norm"], hidden) and torch.equal(points["logits"], model.logits(hidden))
    assert torch.equal(points["layers.0.after_attn"], points["embed"] + points["layers.0.attn.out"])
    assert torch.equal(points["layers.2.hidden"], points["layers.2.after_attn"] + points["layers.2.ffn.out"])
    both = points["layers.2.ffn.routed"] + points["layers.2.ffn.shared"]
    torch.testing.assert_close(points["layers.2.ffn.out"], both, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks(v3: Path, alone: Trace, chunk: int) -> None:
    agree(record_tokens(ours(v3), PROMPTS, chunk=chunk), alone)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.trust)])
@pytest.mark.parametrize("experts", ["whole", "split"])
def test_ranks(v3: Path, alone: Trace, size: int, experts: str) -> None:
    num = replace(FLOAT32, experts=experts)
    found = on_every_rank(size, lambda tp: record_tokens(ours(v3, num, tp), PROMPTS))
    agree(found[0], alone)
    assert not found[1].requests[0].points  # the first rank keeps what there is


@pytest.mark.parametrize("size", [1, 2])
def test_virtual_ranks(v3: Path, alone: Trace, size: int) -> None:
    num = replace(FLOAT32, batch_invariant=True, virtual_ranks=4, experts="split")
    agree(on_every_rank(size, lambda tp: record_tokens(ours(v3, num, tp), PROMPTS))[0], alone)


@pytest.mark.parametrize("lanes, stages, size", [
    (1, 1, 1), pytest.param(1, 1, 2, marks=pytest.mark.trust), (2, 1, 2), (1, 3, 1), pytest.param(1, 2, 2, marks=pytest.mark.trust),
])  # fmt: skip
def test_an_engine_at_work(v3: Path, tmp_path: Path, lanes: int, stages: int, size: int) -> None:
    """Prompts in chunks, several at a time, and drafts that are mostly wrong: what is left of each request is what its
    tokens give in one forward, over lanes and stages too."""
    prompts = questions(5, most=100)
    trace = engine_trace(v3, tmp_path / "t", prompts, run=replace(RUN, mtp=2), lanes=lanes, stages=stages, size=size)
    assert [len(r.tokens) for r in trace.requests] == [len(p) + 8 for p in prompts]
    model = ours(v3)
    for request, prompt in zip(trace.requests, prompts, strict=True):
        assert request.prompt_tokens == len(prompt) and request.tokens[: len(prompt)].tolist() == prompt
        [whole] = record_tokens(model, [request.tokens[:-1].tolist()]).requests
        worst = largest_difference(request, whole)
        assert worst[0] < 2e-5, worst
        assert all(len(step.drafts) and step.accepted <= len(step.drafts) for step in request.steps)
        assert len(acceptance(request.steps)) <= 2


def test_accepted_drafts_are_counted(tmp_path: Path) -> None:
    """On the trained demo, where drafts are good: the engine's own counts."""
    engine = Engine.from_pretrained(DEMO, mtp=2, device="cpu", eager=True, prefix_reuse=False, max_model_len=300)
    with EngineTrace(engine, tmp_path / "t", Selection(points=("norm",), positions="last")):
        engine.generate(sums(3), greedy(40))
        engine.close()
    steps = [step for request in read_trace(tmp_path / "t").requests for step in request.steps]
    assert [sum(step.accepted > k for step in steps) for k in range(2)] == engine.stats.accepted
    assert [sum(len(step.drafts) > k for step in steps) for k in range(2)] == engine.stats.drafted
    assert acceptance(tuple(steps))[0] > 0.5


def test_quantised_activations_and_latents(tmp_path: Path) -> None:
    """What W8A8 products quantise is recorded as it was before, and cached FP8 latents as the numbers that they stand
    for."""
    path = random_checkpoint(tmp_path / "c", V3 | fp8_sizes(2) | {"num_hidden_layers": 2}, fp8=True)
    num = Numerics(torch.bfloat16, gemm="fp8", fp8_latents=True)
    trace = record_tokens(ours(path, num, backend=ReferenceBackend()), PROMPTS)
    assert trace.numerics == ("bfloat16", "fp8", None, "fp8")
    points = trace.requests[0].points
    assert all(points[f"layers.0.{name}"].dtype == torch.bfloat16 for name in ("attn_norm", "attn.c_q", "attn.o", "ffn_norm"))
    norm = reference.rms_norm(points["embed"], ours(path).layers[0].attn_norm.weight, 1e-6)
    assert torch.equal(points["layers.0.attn_norm"], norm)
    c_kv = points["layers.0.attn.c_kv"]
    again, scales = reference.act_quant(c_kv)
    assert torch.allclose(again.float() * scales, c_kv, rtol=1e-6, atol=0)


@pytest.mark.parametrize("positions, wanted", [
    ("all", range(9)), ("last", [8]), ("0-2,5", [0, 1, 2, 5]), ("-1", [8]), ("-2,7-70", [7, 8]), ("30", []),
])  # fmt: skip
def test_chosen_positions(v3: Path, alone: Trace, positions: str, wanted: list[int]) -> None:
    chosen = Selection(("logits", "*.attn.c_kv"), positions)
    request = record_tokens(ours(v3), PROMPTS, chosen).requests[1]
    layers = [*(["layers.0", "layers.1", "layers.2"] if wanted else []), *(["mtp.0"] if set(wanted) & set(range(8)) else [])]
    assert set(request.points) == {*(["logits"] if wanted else []), *(f"{layer}.attn.c_kv" for layer in layers)}
    for point in request.points:
        at = request.positions(point).tolist()
        assert at == [p for p in wanted if p < 9 - point.startswith("mtp.")]
        for p in at:
            torch.testing.assert_close(request.value(point, p), alone.requests[1].value(point, p), atol=1e-4, rtol=1e-3)
    with pytest.raises(KeyError):
        alone.requests[1].value("logits", 9)


def test_memory_is_bounded(v3: Path, tmp_path: Path) -> None:
    """A request that would take more than is allowed ends where that is full, and says so; what is finished makes room
    for the next ones."""
    prompts = [tokens(n, 256, n) for n in (60, 61, 62, 63)]
    one = record_tokens(ours(v3), prompts[:1]).requests[0]
    held = sum(value.nbytes for value in one.points.values())
    mib = 2.5 * held * 68 / 60 / 2**20
    run = replace(RUN, max_num_seqs=2, max_num_batched_tokens=30)
    whole = engine_trace(v3, tmp_path / "a", prompts, run=run, selection=Selection(mib=mib))
    assert not any(request.truncated for request in whole.requests)
    small = engine_trace(v3, tmp_path / "b", prompts, run=run, selection=Selection(mib=mib / 2.5))
    assert any(request.truncated for request in small.requests)
    for a, b in zip(small.requests, whole.requests, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and largest_difference(b, a)[0] < 2e-5
        if a.truncated:
            assert len(a.positions("norm")) < len(b.positions("norm"))
            assert a.truncated.startswith(f"from position {len(a.positions('norm'))} on: ")
    with Recorder(ours(v3), Selection(mib=1e-4)) as recorder:
        recording = recorder.open("0", 5)
        assert recording.finish([1, 2, 3]).points == {} and recorder._used == 0


def test_other_rows_are_not_recorded(v3: Path) -> None:
    """Of two sequences in a forward only the one that is followed; padding, which goes to a page of nobody, is not."""
    model = ours(v3)
    with Recorder(model, Selection(("norm",))) as recorder:
        recording = recorder.open("0", 9)
        recorder.follow([(recording, [2])])
        batch = Batch.pack([(PROMPTS[0], 0, [0, 1]), (PROMPTS[1], 0, [2]), ([0], 5, [3])])
        hidden = model(batch, model.new_cache(4))
    assert torch.equal(recording.finish(PROMPTS[1]).points["norm"], hidden[70:79])
    assert PAGE_SIZE == 64


@pytest.mark.parametrize("wrong", ["first", "3-", "1..4", "--2", "-3-5-6", ""])
def test_wrong_positions(wrong: str) -> None:
    with pytest.raises(UserError, match="is not all, last or like"):
        Selection(positions=wrong)


def test_wrong_names(v3: Path) -> None:
    model = ours(v3)
    with pytest.raises(UserError, match=r"'layers\.9\.attn\.o' is the name of no point of this model"):
        Recorder(model, Selection(("norm", "layers.9.attn.o")))
    with pytest.raises(UserError, match="positive"):
        Selection(mib=0)

"""What goes wrong in one rank or in one request stays what it is: a rank's ends every rank, soon and with one line; a
request's ends that request, and the others' bits do not change."""

import json
import random
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine import sampler, sampling
from engine.engine import Engine
from engine.row_sampler import RowSampler, SampledRows
from engine.sampling_state import SamplingState
from support import processes as launch
from text.detokenizer import Detokenizer
from text.tokenizer import Tokenizer

FAULTY = Path(__file__).parents[1] / "support" / "generate_with_fault.py"
TIMEOUT = 4
SUMS = 5  # of the ranks in a forward: the embedding's and two a layer

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch.make_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", fp8=False)


@dataclass
class Ended:
    """A run that is over."""

    status: int
    errors: list[str]
    stderr: str
    took: float  # seconds from the fault to the end of the last rank
    answers: list[dict]


def processes(mark: str) -> list[str]:
    """Command lines of those that have `mark` in their environment."""
    found = []
    for task in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (task / "environ").read_bytes():
                found.append((task / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def run(
    checkpoint: Path, folder: Path, kind: str, rank: int, at: int, ranks: int = 2, prompts: int = 100, lanes: int = 1,
    stages: int = 1,
) -> Ended:  # fmt: skip
    """`torchrun` on the checkpoint, with a fault in one rank; nothing of it is left afterwards."""
    mark, fault = uuid.uuid4().hex, {"kind": kind, "rank": rank, "at": at, "file": str(folder / "when")}
    (folder / "prompts.txt").write_text("hello\n" * prompts)
    output = folder / "answers.jsonl"
    flags = ("--ckpt-path", checkpoint, "--input-file", folder / "prompts.txt", "--output-file", output,
             "--temperature", 0, "--max-new-tokens", 20, "--device", "cpu", "--dtype", "float32", "--threads", 1,
             "--timeout", TIMEOUT, "--dp", lanes, "--pp", stages)  # fmt: skip
    command = launch.torchrun(json.dumps(fault), *flags, ranks=ranks, script=FAULTY)
    torchrun = subprocess.Popen(
        command, env=launch.environment(MARK=mark), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        when = folder / "when"
        while torchrun.poll() is None and not (when.exists() and all("distributed.run" in p for p in processes(mark))):
            time.sleep(0.1)
        took = time.time() - float(when.read_text())
        _, err = torchrun.communicate(timeout=60)
        assert not processes(mark)
    finally:
        torchrun.kill()
    lines = output.read_text().splitlines() if output.exists() else []
    return Ended(torchrun.returncode, launch.errors(err), err, took, [json.loads(line) for line in lines])


def check(ended: Ended, kind: str, rank: int, ranks: int = 2) -> None:
    """One line, that names the rank and what became of it; soon; and no answer that is not one."""
    assert ended.status == 1, ended.stderr
    failing = [r for r in range(ranks) if rank in (r, -1)]
    others = [f"rank {r}" for r in range(ranks) if r not in failing]
    expected = {
        "kill": [f"error: {other} lost contact with rank {rank}, which has died" for other in others],
        "stop": [f"error: {other} lost contact with rank {rank}, which is stopped" for other in others],
        "exception": [f"error: rank {r} failed: RuntimeError: planted" for r in failing],
        "oom": [f"error: rank {r} is out of memory: CUDA out of memory. Tried to allocate 2.00 GiB (a smaller "
                "--max-num-batched-tokens, --max-num-seqs or --kv-cache-gib needs less)" for r in failing],
    }[kind]  # fmt: skip
    assert len(ended.errors) == 1 and ended.errors[0].partition(f" ({FAULTY.name}")[0] in expected, ended.stderr
    assert ended.took < (TIMEOUT + 2 if kind == "stop" else 5), ended.took
    assert all(len(answer["tokens"]) == 20 for answer in ended.answers)


@linux
@pytest.mark.parametrize("kind", ["kill", "exception"])
def test_a_fault_in_one_rank(tiny: Path, tmp_path: Path, kind: str) -> None:
    """While it sums with the other in the eighth step. (tests/test_generate.py stops and kills ranks between steps.)"""
    check(run(tiny, tmp_path, kind, 1, at=7 * SUMS + 2), kind, 1)


@linux
@pytest.mark.parametrize("ranks, rank, kind", [
    (2, 1, "kill"), (2, 0, "exception"), *(pytest.param(*one, marks=pytest.mark.trust) for one in (
        (2, 0, "kill"), (2, 1, "stop"), (2, 1, "exception"), (2, 1, "oom"), (4, 2, "kill"), (4, 3, "stop"), (4, -1, "oom"))),
])  # fmt: skip
def test_a_fault_in_one_lane(tiny: Path, tmp_path: Path, ranks: int, rank: int, kind: str) -> None:
    """Every rank of every lane ends, with one line, whatever its own lane was doing."""
    check(run(tiny, tmp_path, kind, rank, 3 * SUMS + 2, ranks, lanes=2), kind, rank, ranks)


@linux
@pytest.mark.parametrize("rank, kind", [
    (1, "kill"), (0, "exception"),
    *(pytest.param(*one, marks=pytest.mark.trust) for one in ((0, "kill"), (1, "stop"), (0, "stop"), (1, "oom"))),
])  # fmt: skip
def test_a_fault_in_one_stage(tiny: Path, tmp_path: Path, rank: int, kind: str) -> None:
    """Of two, each with one of the two layers: both end, with one line. A stage of one rank calls two sums a layer."""
    check(run(tiny, tmp_path, kind, rank, at=9, stages=2), kind, rank)


@linux
def test_nan_in_one_lane(tiny: Path, tmp_path: Path) -> None:
    """What that lane runs at the step fails, and nothing that another runs, though they share the experts."""
    ended = run(tiny, tmp_path, "nan", 1, at=7 * SUMS + 2, prompts=24, lanes=2)
    bad = [answer for answer in ended.answers if "error" in answer]
    assert ended.status == 1 and len(ended.answers) == 24 and 1 <= len(bad) <= 8, ended.stderr
    assert all(answer["error"] == "the model's output holds NaN or infinity" for answer in bad)
    assert len({tuple(answer["tokens"]) for answer in ended.answers if answer not in bad}) == 1


@linux
def test_nan_in_one_rank(tiny: Path, tmp_path: Path) -> None:
    """What runs at that step fails, each with its line, which names the rank; the requests behind are answered."""
    ended = run(tiny, tmp_path, "nan", 1, at=7 * SUMS + 2, prompts=20)
    bad = [answer for answer in ended.answers if "error" in answer]
    assert ended.status == 1 and len(ended.answers) == 20 and 1 <= len(bad) <= 8, ended.stderr
    said = "the model's output holds NaN or infinity, which came from rank 1"
    assert all(answer["error"] == said for answer in bad)
    assert all(len(answer["tokens"]) == 20 for answer in ended.answers if answer not in bad)


@linux
@pytest.mark.trust
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment(tiny: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rank, at = rng.randrange(2), rng.randint(1, 200)
    check(run(tiny, tmp_path, "kill", rank, at), "kill", rank)


@linux
@pytest.mark.trust
@pytest.mark.parametrize("seed", range(5))
def test_stopped_at_any_moment(tiny: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rank, at = seed % 2, rng.randint(1, 200)
    check(run(tiny, tmp_path, "stop", rank, at), "stop", rank)


@linux
@pytest.mark.trust
@pytest.mark.parametrize("ranks, rank, kind", [
    *((ranks, rank, kind) for ranks, rank in ((2, 0), (2, 1), (4, 2)) for kind in ("kill", "exception", "oom")),
    (2, -1, "oom"), (4, -1, "exception"),
])  # fmt: skip
def test_one_line_whoever_fails(tiny: Path, tmp_path: Path, kind: str, ranks: int, rank: int) -> None:
    """One rank of two or four, or every one at the same time, as by a mistake of ours."""
    check(run(tiny, tmp_path, kind, rank, 3 * SUMS + 1, ranks), kind, rank, ranks)


# --- one request -----------------------------------------------------------------------------------------------------

BAD = 7  # likeliest tokens that the failing request asks for, which tells its work from the others'
COMPANY = ["What is 2+2?", "hello " * 30, "z"]


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Engine:
    return Engine.from_pretrained(tiny, dtype="float32", deterministic=True)


def answers(loaded: Engine, failing: str | None, mtp: int = 0) -> tuple[dict[str, Any], dict[str, set[bytes]]]:
    """Requests by prompt, and the bits of the logits that each sampled from: the others, and a failing one among them."""
    run = RunConfig(n_pages=20, max_model_len=300, max_num_batched_tokens=40, mtp=mtp, deterministic=True)
    engine = Engine(loaded.model, loaded.tokenizer, run)
    bits: dict[str, set[bytes]] = {}
    decide = engine.sampler._decide

    def record(request: Any, chunk: Any, tokens: Any, scores: Any, first: int) -> Any:
        rows = scores.logits[first : first + 1 + len(chunk.drafts)]
        bits.setdefault(str(request.id), set()).add(rows.numpy().tobytes())
        return decide(request, chunk, tokens, scores, first)

    engine.sampler._decide = record  # type: ignore[method-assign]
    params = SamplingParams(temperature=0.7, max_new_tokens=25, repetition_penalty=1.1, logprobs=3, prompt_logprobs=3)
    wanted = {str(i): engine.add(text, params, id=i) for i, text in enumerate(COMPANY)}
    if failing is not None:
        bad = SamplingParams(
            temperature=0.7, max_new_tokens=25, repetition_penalty=1.1, logprobs=BAD, prompt_logprobs=BAD
        )
        wanted["bad"] = engine.add(failing, bad, id=BAD)
        if wanted["bad"].detokenizer:
            wanted["bad"].detokenizer.bad = True
    while engine.busy:
        engine.step()
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.n_available == 20 and not engine._sequences and not engine.registry.sequence_of
    return wanted, bits


def trap(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, error: Exception, at: int, whose: Callable[..., bool]
) -> None:
    """Calls of a function that are the failing request's raise from the one number `at` on."""
    plain, calls = getattr(where, name), 0

    def trapped(*args: Any, **more: Any) -> Any:
        nonlocal calls
        if whose(*args):
            calls += 1
            if calls > at:
                raise error
        return plain(*args, **more)

    monkeypatch.setattr(where, name, trapped)


def draws_bad(batch: SampledRows) -> bool:
    return any(state.rng_key == BAD for state in batch.states)


PLACES: dict[str, tuple[Any, str, int, Callable[..., bool]]] = {
    "prompt": (Tokenizer, "encode_text", 0, lambda tokenizer, text: text == "failing"),
    "judged, its penalties": (SamplingState, "penalised", 5, lambda ask, *_: ask.rng_key == BAD),
    "judged, its draw": (RowSampler, "sample", 5, lambda self, scores, batch, *_: draws_bad(batch)),
    "log-probabilities": (sampler, "logprob", 12, lambda logits, token, top: top == BAD),
    "log-probabilities of the prompt": (sampler, "logprob", 1, lambda logits, token, top: top == BAD),
    "text": (Detokenizer, "push", 5, lambda stream, *_: hasattr(stream, "bad")),
    "the text's end": (Detokenizer, "finish", 0, lambda stream: hasattr(stream, "bad")),
    "drafts": (RowSampler, "sample", 5, lambda self, scores, batch, use, *_: draws_bad(batch) and use == sampling.DRAFT),
}  # fmt: skip


ERRORS = (RuntimeError("planted"), torch.OutOfMemoryError("planted"), MemoryError("planted"))


@pytest.mark.parametrize("place, error", [
    pytest.param(place, error, marks=() if i % len(ERRORS) == j else pytest.mark.trust)
    for i, place in enumerate(PLACES) for j, error in enumerate(ERRORS)
])  # fmt: skip
def test_a_fault_in_one_request(loaded: Engine, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception) -> None:
    """At some step of it, in what is done for each request apart: it ends, with a line, and its pages are free; the
    others' tokens, text, log-probabilities and logits are, to the bit, those of a run without it."""
    mtp = 2 if place == "drafts" else 0
    expected, clean = answers(loaded, None, mtp)
    where, name, at, whose = PLACES[place]
    trap(monkeypatch, where, name, error, at, whose)
    found, bits = answers(loaded, "failing", mtp)
    bad = found.pop("bad")
    assert bad.finish_reason == "error"
    assert re.fullmatch(rf"{type(error).__name__}: planted \(test_faults.py, line \d+\)", bad.error), bad.error
    for key, request in found.items():
        other = expected[key]
        assert request.finish_reason == other.finish_reason != "error"
        assert (request.tokens, request.text, request.logprobs, request.prompt_logprobs) == (
            other.tokens, other.text, other.logprobs, other.prompt_logprobs)  # fmt: skip
        assert bits[key] == clean[key]

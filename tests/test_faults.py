"""What goes wrong in one rank or in one request stays what it is: a rank's ends every rank, soon and with one line; a
request's ends that request, and the others' bits do not change."""

import json
import random
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

import launch

FAULTY = Path(__file__).parent / "faulty.py"
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
    took: float  # seconds from the fault to the end of torchrun
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


def run(checkpoint: Path, folder: Path, kind: str, rank: int, at: int, ranks: int = 2, prompts: int = 100) -> Ended:
    """`torchrun` on the checkpoint, with a fault in one rank; nothing of it is left afterwards."""
    mark, fault = uuid.uuid4().hex, {"kind": kind, "rank": rank, "at": at, "file": str(folder / "when")}
    (folder / "prompts.txt").write_text("hello\n" * prompts)
    output = folder / "answers.jsonl"
    flags = ("--ckpt-path", checkpoint, "--input-file", folder / "prompts.txt", "--output-file", output,
             "--temperature", 0, "--max-new-tokens", 20, "--device", "cpu", "--dtype", "float32", "--threads", 1,
             "--timeout", TIMEOUT)  # fmt: skip
    command = launch.torchrun(json.dumps(fault), *flags, ranks=ranks, script=FAULTY)
    torchrun = subprocess.Popen(
        command, env=launch.environment(MARK=mark), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, err = torchrun.communicate(timeout=120)
        took = time.time() - float((folder / "when").read_text())
        assert not processes(mark)
    finally:
        torchrun.kill()
    lines = output.read_text().splitlines() if output.exists() else []
    return Ended(torchrun.returncode, launch.errors(err), err, took, [json.loads(line) for line in lines])


def check(ended: Ended, kind: str, rank: int, ranks: int = 2) -> None:
    """One line, that names the rank and what became of it; soon; and no answer that is not one."""
    assert ended.status == 1, ended.stderr
    faulty = [r for r in range(ranks) if rank in (r, -1)]
    others = [f"rank {r}" for r in range(ranks) if r not in faulty]
    expected = {
        "kill": [f"error: {other} lost contact with rank {rank}, which has died" for other in others],
        "stop": [f"error: {other} lost contact with rank {rank}, which is stopped" for other in others],
        "exception": [f"error: rank {r} failed: RuntimeError: planted" for r in faulty],
        "oom": [f"error: rank {r} is out of memory: CUDA out of memory. Tried to allocate 2.00 GiB (a smaller "
                "--max-num-batched-tokens, --max-num-seqs or --kv-cache-gib needs less)" for r in faulty],
    }[kind]  # fmt: skip
    assert len(ended.errors) == 1 and ended.errors[0] in expected, ended.stderr
    assert ended.took < (TIMEOUT + 2 if kind == "stop" else 5), ended.took
    assert all(len(answer["tokens"]) == 20 for answer in ended.answers)


@linux
@pytest.mark.parametrize("kind", ["kill", "exception"])
def test_a_fault_in_one_rank(tiny: Path, tmp_path: Path, kind: str) -> None:
    """While it sums with the other in the eighth step. (tests/test_generate.py stops and kills ranks between steps.)"""
    check(run(tiny, tmp_path, kind, 1, at=7 * SUMS + 2), kind, 1)


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

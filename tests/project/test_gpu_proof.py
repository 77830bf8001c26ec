"""The nine minutes on a GPU, rehearsed without one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import gpu_proof
from gpu_proof import Step


def proof(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "proof.json").read_text())["results"]["steps"]


def test_a_step_that_hangs_or_fails_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are written after each step; wrong kernels leave the races out, a hanging step only itself."""
    program = [sys.executable, "-c"]
    look = f"import json; print(*json.load(open({str(tmp_path / 'proof.json')!r}))['results']['steps'])"
    made = [
        Step("warm", 9, [*program, 'print("""{"hits": 3}""")'], []),
        Step("hangs", 1, [*program, "import time; print('began', flush=True); time.sleep(60)"], []),
        Step("kernels", 9, [*program, "raise SystemExit(1)"], []),
        Step("slice", 9, [*program, look], []),
        Step("dense", 9, [*program, "print('raced')"], [], races=True),
    ]
    monkeypatch.setattr(gpu_proof, "steps", lambda folder, jobs: made)
    assert gpu_proof.prove(tmp_path, False, 1, []) == 1
    found = proof(tmp_path)
    assert found["warm"]["result"] == {"hits": 3} and found["warm"]["status"] == 0
    assert found["hangs"]["timed_out"] and found["hangs"]["said"] == ["began"] and found["hangs"]["seconds"] < 8
    assert found["slice"]["said"] == ["warm hangs kernels"]
    assert "skipped" in found["dense"]


def test_the_steps_fit_their_time_and_their_files(tmp_path: Path) -> None:
    made = gpu_proof.steps(tmp_path, 12)
    assert sum(step.limit for step in made) <= gpu_proof.SECONDS - 20  # interpreters start, and timeouts kill
    written = {word for step in made for word in step.command if word.endswith(".json")}
    assert len(written) + 1 <= gpu_proof.MOST_FILES
    for step in made:
        if "--budget" in step.command:
            assert float(step.command[step.command.index("--budget") + 1]) < step.limit


STEPS = ["ceilings", "persistent"]


@pytest.mark.parametrize("only", [STEPS, pytest.param([], marks=[pytest.mark.trust, pytest.mark.timeout(3600)])])
def test_a_dry_run(tmp_path: Path, only: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From start to end, on the CPU: each command is one that its program takes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    folder = tmp_path / "proof"
    assert gpu_proof.prove(folder, True, 2, only) == 0, proof(folder)
    found = proof(folder)
    assert list(found) == (only or [step.name for step in gpu_proof.steps(folder, 2)])
    if not only:
        assert found["warm"]["result"]["configurations"] > 0 and not found["warm"]["result"]["failed"]

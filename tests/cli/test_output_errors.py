"""Commands whose answer cannot be written: one line, exit status 1, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints import make_checkpoint
from support.families import FAMILIES
from support.processes import environment

INFERENCE = Path(__file__).parents[2] / "inference"
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@pytest.mark.parametrize("command", ["plan.py", "check_checkpoint.py"])
def test_an_answer_to_a_full_device_is_one_line(command: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, FAMILIES["v3"])
    flags = ["--ckpt-path", tmp_path, "--device", "cpu"] if command == "plan.py" else [tmp_path, "--quick"]
    with open("/dev/full", "wb") as full:
        run = subprocess.run(
            [sys.executable, INFERENCE / command, *flags], stdout=full, stderr=subprocess.PIPE, env=environment()
        )
    assert (run.returncode, run.stderr.decode()) == (1, "error: standard output: No space left on device\n")

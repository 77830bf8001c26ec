"""What the Makefile asks pytest for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def recipe(target: str) -> str:
    """Its lines, one command to a line."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", "").replace("$(JOBS)", "2")
    text = text.replace("$(BIN)/python", "python").replace("$(ON_GPU)", "python")
    [lines] = re.findall(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", text, re.MULTILINE)
    return lines


@pytest.mark.parametrize("target", ["gpu", "gpu-proof"])
def test_nothing_is_installed_on_a_gpu_machine(target: str) -> None:
    """It may have no network, and its minutes are few: no prerequisite calls pip, and tests run beside each other."""
    assert re.search(rf"^{target}:$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "pip" not in recipe(target)
    assert target != "gpu" or ("-n 2 " in recipe(target) and "--warm 2" in recipe(target))


@pytest.mark.parametrize("target", ["test", "trust", "gpu"])
def test_pytest_has_the_options_that_make_gives_it(target: str) -> None:
    """Our own come with conftest.py, which is found in time only through a path on the command line."""
    [command] = re.findall(r"python (-m pytest[^\n]*)", recipe(target))
    known = subprocess.check_output(f"{sys.executable} {command} --help", shell=True, cwd=ROOT, text=True)
    for option in re.findall(r"(?<= )--[a-z-]+", command):
        assert re.search(rf"^  .*{option}\b", known, re.MULTILINE), f"make {target}: {option}"


def test_the_suite_runs_in_the_background() -> None:
    """As `make test &` in a script, whose children ignore SIGINT: tests that interrupt something still do."""
    command = f"trap '' INT; exec {sys.executable} -m pytest -q -p no:cacheprovider tests/cli/test_main.py::test_exit_statuses"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout

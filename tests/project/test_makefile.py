"""What the Makefile asks pytest for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", ["test", "trust", "gpu"])
def test_pytest_has_the_options_that_make_gives_it(target: str) -> None:
    """Our own come with conftest.py, which is found in time only through a path on the command line."""
    recipe = (ROOT / "Makefile").read_text().replace("\\\n", "").replace("$(BIN)/python", "python")
    [command] = re.findall(rf"^{target}:.*?\n\t(?:@[^\n]*\n\t)?python (-m pytest[^\n]*)", recipe, re.MULTILINE)
    known = subprocess.check_output(f"{sys.executable} {command} --help", shell=True, cwd=ROOT, text=True)
    for option in re.findall(r"(?<= )--[a-z-]+", command):
        assert re.search(rf"^  .*{option}\b", known, re.MULTILINE), f"make {target}: {option}"

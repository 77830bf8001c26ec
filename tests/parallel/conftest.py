"""A checkpoint that tests in several processes share."""

from pathlib import Path

import pytest

from support import processes as launch

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, or, where it has not been trained, a random stand-in."""
    if (DEMO / "config.json").is_file():
        return DEMO
    return launch.make_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", printable=True)

"""A good checkpoint, and copies of it to be spoilt."""

import shutil
from pathlib import Path

import pytest

from support.damaged_checkpoints import good_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """FP8, in several shards, with an MTP module in layer 2. It is only read."""
    folder = tmp_path_factory.mktemp("good") / "fp8"
    good_checkpoint(folder, "fp8")
    return folder


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))

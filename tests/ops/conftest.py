"""The C kernels as several compilers and vectors make them."""

import functools
import importlib.util
import platform

import pytest
import torch

from ops.cpu import kernels
from support.limits import limited
from support.processor import FEATURES, flags_for

SHORTER = flags_for("-march=x86-64-v3")  # AVX2
# As AMD's Zen 4 and 5 are compiled for; Intel's go another way, but have the instructions.
PAIRS = (*flags_for("-march=icelake-server", "-mavx512bf16"), "-USLOW_PAIRS")
NEEDS_PAIRS = {"avx512_bf16", "avx512vbmi", "avx512_bitalg", "avx512_vnni"}


@functools.cache
def compiled(flags: tuple[str, ...], compiler: int = 0):
    return kernels.load(kernels.build(limited(120, kernels.compilers()[compiler]), flags))


CLANG = pytest.param("Clang", marks=pytest.mark.trust)


@pytest.fixture(params=["native", "shorter vectors", "pairs", "three threads", CLANG])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With which the kernels are compiled, and whether several threads share even the smallest work."""
    if request.param in ("shorter vectors", "pairs") and platform.machine() != "x86_64":
        pytest.skip("x86's")
    if request.param == "shorter vectors":
        monkeypatch.setattr(kernels, "library", lambda: compiled(SHORTER))
        assert kernels.panel_width() == 16
    if request.param == "pairs":
        if not NEEDS_PAIRS <= FEATURES or kernels.may_use_pairs():
            pytest.skip("this processor lacks the instructions, or has them anyway")
        monkeypatch.setattr(kernels, "library", lambda: compiled(PAIRS))
        assert kernels.may_use_pairs()
    if request.param == "Clang":
        if importlib.util.find_spec("ziglang") is None:
            pytest.skip("the package ziglang is not installed")
        monkeypatch.setattr(kernels, "library", lambda: compiled(kernels.FLAGS, -1))
    if request.param in ("pairs", "three threads", "Clang"):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        monkeypatch.setattr(kernels, "_threads", lambda work: 3)
    return request.param


@pytest.fixture
def pairs(vectors: str) -> None:
    if not kernels.may_use_pairs():
        pytest.skip("no instructions for pairs of bfloat16")


@pytest.fixture
def tiles(vectors: str) -> None:
    if not kernels.may_use_tiles():
        pytest.skip("no matrix unit")

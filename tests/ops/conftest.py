"""The C kernels as several compilers and vectors make them."""

import functools
import importlib.util
import platform

import pytest
import torch

from ops.cpu import kernels
from support.limits import limited

SHORTER = tuple("-march=x86-64-v3" if flag == "-march=native" else flag for flag in kernels.FLAGS)  # AVX2


@functools.cache
def compiled(flags: tuple[str, ...], compiler: int = 0):
    return kernels.load(kernels.build(limited(120, kernels.compilers()[compiler]), flags))


CLANG = pytest.param("Clang", marks=pytest.mark.trust)


@pytest.fixture(params=["native", "shorter vectors", "three threads", CLANG])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With which the kernels are compiled, and whether several threads share even the smallest work."""
    if request.param == "shorter vectors":
        if platform.machine() != "x86_64":
            pytest.skip("x86's")
        monkeypatch.setattr(kernels, "library", lambda: compiled(SHORTER))
        assert kernels.panel_width() == 16
    if request.param == "Clang":
        if importlib.util.find_spec("ziglang") is None:
            pytest.skip("the package ziglang is not installed")
        monkeypatch.setattr(kernels, "library", lambda: compiled(kernels.FLAGS, -1))
    if request.param in ("three threads", "Clang"):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        monkeypatch.setattr(kernels, "_threads", lambda work: 3)
    return request.param

"""Every kernel configuration, compiled for its target: no spills, within shared memory, on the tensor core."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")
import kernel
import kernel_attention

MODULES = (kernel, kernel_attention)
Report = dict[str, Any]

KIB = 1024
SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_89": 99 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}

# How the name of the instruction that must be there begins, and Ampere's, which may not be beside it.
TENSOR_CORE = {
    ("fp8_gemm", "sm_89"): ("QMMA", "HMMA"),
    ("fp8_gemm", "sm_90"): ("QGMMA", "HMMA"),
    ("fp8_gemm", "sm_100"): ("UTCQMMA", "HMMA"),
    ("fp8_gemm", "gfx942"): ("v_mfma_f32_32x32x16_fp8_fp8", ""),
    ("w8a16_gemm", "sm_80"): ("HMMA", ""),
    ("w8a16_gemm", "sm_89"): ("HMMA", ""),
    ("w8a16_gemm", "sm_90"): ("HGMMA", "HMMA"),
    ("w8a16_gemm", "sm_100"): ("UTCHMMA", "HMMA"),
    ("w8a16_gemm", "gfx942"): ("v_mfma", ""),
} | {
    (op, target): instructions
    for op in ("decode", "prefill")
    for target, instructions in {
        "sm_80": ("HMMA", ""),
        "sm_89": ("HMMA", ""),
        "sm_90": ("HGMMA", "HMMA"),
        "sm_100": ("UTCHMMA", "HMMA"),
        "gfx942": ("v_mfma", ""),
    }.items()
}  # fmt: skip


def waits(module: ModuleType, c: kernel.Configuration) -> bool:
    """For `make trust`, to save time: Ada's, which hardly differ from their neighbours', and attention but Hopper's."""
    return c.target == "sm_89" or (module is kernel_attention and c.target != "sm_90")


CONFIGURATIONS = [
    pytest.param(module.__name__, c, id=c.name, marks=pytest.mark.trust if waits(module, c) else ())
    for module in MODULES
    for c in module.configurations()
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Report]]:
    """Reports by configuration name, for one module and target at a time, compiled once, in one process."""

    @functools.cache
    def reports(*what: str) -> dict[str, Report]:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("-".join(what)))
        script = Path(__file__).with_name("compile_kernels.py")
        done = subprocess.run([sys.executable, str(script), *what], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return reports


@pytest.mark.parametrize("module, c", CONFIGURATIONS)
def test_fits_and_uses_the_tensor_core(
    module: str, c: kernel.Configuration, compiled: Callable[..., dict[str, Report]]
) -> None:
    report = compiled(module, c.target)[c.name]
    assert report["stack"] == 0
    assert report["shared"] <= SHARED_LIMIT[c.target]
    assert not report["flushes"]  # widen_e4m3 counts on subnormals
    op = c.name.split()[0]
    if (op, c.target) in TENSOR_CORE:
        wanted, slow = TENSOR_CORE[op, c.target]
        assert any(name.startswith(wanted) for name in report["instructions"]), report["instructions"]
        assert slow not in report["instructions"]


def test_names_are_distinct() -> None:
    names = [c.name for module in MODULES for c in module.configurations()]
    assert len(names) == len(set(names))


def test_the_checks_above_can_fail(compiled: Callable[..., dict[str, Report]]) -> None:
    controls = compiled("controls")
    assert controls["spills"]["stack"] > 0
    assert "HMMA" in controls["not swapped"]["instructions"]
    assert "QGMMA" not in controls["not swapped"]["instructions"]

"""Every kernel configuration, compiled for its target: no spills, within shared memory, on the tensor core."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import kernel
import tiles
from compile_kernels import configurations

Report = dict[str, Any]

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
}

CONFIGURATIONS = [  # to save time, Ada's, which hardly differ from their neighbours', wait for `make trust`
    pytest.param(c, id=c.name, marks=pytest.mark.trust if c.target == "sm_89" else ()) for c in configurations()
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Report]]:
    """Reports by configuration name, for one target at a time; each target is compiled once, in one process."""

    @functools.cache
    def reports(target: str) -> dict[str, Report]:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp(target))
        script = Path(__file__).with_name("compile_kernels.py")
        done = subprocess.run([sys.executable, str(script), target], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return reports


@pytest.mark.parametrize("c", CONFIGURATIONS)
def test_fits_and_uses_the_tensor_core(c: kernel.Configuration, compiled: Callable[[str], dict[str, Report]]) -> None:
    report = compiled(c.target)[c.name]
    assert report["stack"] == 0
    assert report["shared"] <= tiles.SHARED_LIMIT[c.target]
    assert not report["flushes"]  # widen_e4m3 counts on subnormals
    op = c.name.split()[0]
    if (op, c.target) in TENSOR_CORE:
        wanted, slow = TENSOR_CORE[op, c.target]
        assert any(name.startswith(wanted) for name in report["instructions"]), report["instructions"]
        assert slow not in report["instructions"]
    if "SPECIALISED" in c.constexprs:
        check_persistent(c, report)


def check_persistent(c: kernel.Configuration, report: Report) -> None:
    """That the tensor memory accelerator copies, and that a request for warp specialisation was granted: there are more
    warps than asked for, registers move to those that multiply, and on Hopper their products make up one tile."""
    assert {"UTMALDG", "UTMASTG"} <= set(report["instructions"])
    if c.constexprs["SPECIALISED"]:
        assert report["warps"] > c.options["num_warps"]
        assert "USETMAXREG" in report["instructions"]
        if c.target == "sm_90":
            assert len(report["products"]) == 2
            assert sum(m * n for m, n in report["products"]) == c.constexprs["BLOCK_M"] * c.constexprs["BLOCK_N"]


def test_names_are_distinct() -> None:
    names = [c.name for c in configurations()]
    assert len(names) == len(set(names))


def test_the_checks_above_can_fail(compiled: Callable[[str], dict[str, Report]]) -> None:
    controls = compiled("controls")
    assert controls["spills"]["stack"] > 0
    assert "HMMA" in controls["not swapped"]["instructions"]
    assert "QGMMA" not in controls["not swapped"]["instructions"]
    assert [tuple(product) for product in controls["computed twice"]["products"]] == [(64, 128), (64, 128)]
    assert controls["not specialised"]["warps"] == 8
    assert "USETMAXREG" not in controls["not specialised"]["instructions"]

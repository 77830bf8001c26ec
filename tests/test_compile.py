"""Every kernel configuration, compiled for its target: no spills, within shared memory, on the tensor core."""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import kernel
from compile_kernels import configurations

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
}

LIKE = {"fp8_gemm": ["grouped_w8a8"], "w8a16_gemm": ["grouped_w8a16", "grouped_plain", "router"]}
TENSOR_CORE |= {(op, target): name for (known, target), name in TENSOR_CORE.items() for op in LIKE[known]}

# To save time, what hardly differs from its neighbours waits for `make trust`: Ada's, and of the layer of experts all
# but a selection for every instruction.
SELECTED = re.compile(
    r"router sm_90 V3 (16x64x28|64x128x1)|sort sm_90 2048|combine sm_90|grouped_w8a8 .* K=7168"
    r"|grouped_(w8a16|plain) (sm_90|sm_80) (16|64)x.* K=7168"
)


def waits(c: kernel.Configuration) -> bool:
    of_experts = c.name.startswith(("router", "sort", "grouped", "combine"))
    return c.target == "sm_89" or (of_experts and not SELECTED.fullmatch(c.name))


CONFIGURATIONS = [pytest.param(c, id=c.name, marks=pytest.mark.trust if waits(c) else ()) for c in configurations()]


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Report]]:
    """Reports by configuration name, for one target at a time; what this run tests of it is compiled in one process."""
    cases = (item.callspec.params.get("c") for item in request.session.items if hasattr(item, "callspec"))
    wanted = [c for c in cases if isinstance(c, kernel.Configuration)]

    @functools.cache
    def reports(target: str) -> dict[str, Report]:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp(target))
        script = Path(__file__).with_name("compile_kernels.py")
        names = [c.name for c in wanted if c.target == target]
        done = subprocess.run([sys.executable, str(script), target, *names], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return reports


@pytest.mark.parametrize("c", CONFIGURATIONS)
def test_fits_and_uses_the_tensor_core(c: kernel.Configuration, compiled: Callable[[str], dict[str, Report]]) -> None:
    report = compiled(c.target)[c.name]
    assert report["stack"] == 0
    assert report["shared"] <= SHARED_LIMIT[c.target]
    assert not report["flushes"]  # widen_e4m3 counts on subnormals
    op = c.name.split()[0]
    if (op, c.target) in TENSOR_CORE:
        wanted, slow = TENSOR_CORE[op, c.target]
        assert any(name.startswith(wanted) for name in report["instructions"]), report["instructions"]
        assert slow not in report["instructions"]


def test_names_are_distinct() -> None:
    names = [c.name for c in configurations()]
    assert len(names) == len(set(names))


def test_the_checks_above_can_fail(compiled: Callable[[str], dict[str, Report]]) -> None:
    controls = compiled("controls")
    assert controls["spills"]["stack"] > 0
    assert "HMMA" in controls["not swapped"]["instructions"]
    assert "QGMMA" not in controls["not swapped"]["instructions"]

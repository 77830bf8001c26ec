"""Every kernel configuration, compiled for its target: no spills, within shared memory, on the tensor core."""

import fcntl
import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from ops.gpu import attention, moe, router, tiles
from support.kernel_configurations import Configuration, configurations
from support.limits import LAST_RESORT, run_within

pytestmark = pytest.mark.timeout(LAST_RESORT)  # what compiles has its own limit, of processor time
PARTS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # of all configurations: a worker of pytest compiles one
CONTROLS = ("spills", "not swapped", "computed twice", "not specialised", "attention not swapped")
START, EACH = 120, 20  # seconds of processor time: to import Triton, and for a configuration (1 s is usual)

Report = dict[str, Any]

# How the name of the instruction that must be there begins, and Ampere's, which may not be beside it.
BF16 = {"sm_80": ("HMMA", ""), "sm_89": ("HMMA", ""), "sm_90": ("HGMMA", "HMMA"), "sm_100": ("UTCHMMA", "HMMA"),
        "gfx942": ("v_mfma", "")}  # fmt: skip
FP8 = {"sm_89": ("QMMA", "HMMA"), "sm_90": ("QGMMA", "HMMA"), "sm_100": ("UTCQMMA", "HMMA"),
       "gfx942": ("v_mfma_f32_32x32x16_fp8_fp8", "")}  # fmt: skip
TENSOR_CORE = {
    **dict.fromkeys(("fp8_gemm", "grouped_w8a8"), FP8),
    **dict.fromkeys(("w8a16_gemm", "grouped_w8a16", "grouped_plain", "router", "decode", "prefill"), BF16),
}


# Of the layer of experts, a selection that has every instruction in it.
SELECTED = re.compile(
    r"router sm_90 V3 (16x64x28|64x128x1)|sort sm_90 2048|combine sm_90|grouped_w8a8 .* K=7168"
    r"|grouped_(w8a16|plain) (sm_90|sm_80) (16|64)x.* K=7168"
)


def waits(c: Configuration) -> bool:
    """Whether it is compiled by `make trust` only, to save time: for Ada, which hardly differs from its neighbours,
    attention for others than Hopper or heads of which one kind is compiled, and of the layer of experts what is like
    those selected."""
    module = c.kernel.fn.__module__  # the interpreter's kernels, which these are here, have its name themselves
    if module == attention.__name__:
        return c.target != "sm_90" or " 20 heads" in c.name
    return c.target == "sm_89" or (module in (moe.__name__, router.__name__) and not SELECTED.fullmatch(c.name))


CONFIGURATIONS = [pytest.param(c, id=c.name, marks=pytest.mark.trust if waits(c) else ()) for c in configurations()]


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str], Report]:
    """Reports by configuration name: what this run tests is compiled once, by the workers that ask for it, in a process
    of each."""
    cases = (item.callspec.params.get("c") for item in request.session.items if hasattr(item, "callspec"))
    wanted = [*CONTROLS, *(c.name for c in cases if isinstance(c, Configuration))]
    shared = tmp_path_factory.getbasetemp()
    shared = shared if worker_id == "master" else shared.parent

    def compile_part(part: int, wait: bool) -> None:
        """Compiles every PARTS-th configuration, unless somebody has, or is at it and we do not wait."""
        with open(shared / f"compiled-{part}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return
            found, names = shared / f"compiled-{part}.json", wanted[part::PARTS]
            if not found.exists():
                env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
                env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
                script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
                done = run_within(START + EACH * len(names), [sys.executable, str(script), *names], env=env)
                assert done.returncode == 0, done.stderr
                found.write_text(done.stdout)

    @functools.cache
    def reports() -> dict[str, Report]:
        for wait in (False, True):
            for part in range(PARTS):
                compile_part(part, wait)
        found = (shared / f"compiled-{part}.json" for part in range(PARTS))
        return {name: report for file in found for name, report in json.loads(file.read_text()).items()}

    return lambda name: reports()[name]


@pytest.mark.parametrize("c", CONFIGURATIONS)
def test_fits_and_uses_the_tensor_core(c: Configuration, compiled: Callable[[str], Report]) -> None:
    report = compiled(c.name)
    assert report["stack"] == 0
    assert report["shared"] <= tiles.SHARED_LIMIT[c.target]
    assert not report["flushes"]  # widen_e4m3 counts on subnormals
    op = c.name.split()[0]
    if op in TENSOR_CORE:
        wanted, slow = TENSOR_CORE[op][c.target]
        assert any(name.startswith(wanted) for name in report["instructions"]), report["instructions"]
        assert slow not in report["instructions"]
    if "SPECIALISED" in c.constexprs:
        check_persistent(c, report)


def check_persistent(c: Configuration, report: Report) -> None:
    """That the tensor memory accelerator copies, and that a request for warp specialisation was granted: there are more
    warps than asked for, registers move to those that multiply, and on Hopper their products make up one tile."""
    assert {"UTMALDG", "UTMASTG"} <= set(report["instructions"])
    if c.constexprs["SPECIALISED"]:
        assert report["warps"] > c.options["num_warps"]
        assert "USETMAXREG" in report["instructions"]
        if c.target == "sm_90":
            assert len(report["products"]) == 2
            assert sum(m * n for m, n in report["products"]) == c.constexprs["BLOCK_M"] * c.constexprs["BLOCK_N"]


def test_what_waits_for_the_long_run() -> None:
    """Every kernel is compiled for Hopper in the short run, and each target has some."""
    now = [c for c in configurations() if not waits(c)]
    assert {c.kernel.fn.__name__ for c in configurations()} == {c.kernel.fn.__name__ for c in now if c.target == "sm_90"}
    assert {c.target for c in now} == {"sm_80", "sm_90", "sm_100", "gfx942"} and len(now) < 200


def test_names_are_distinct() -> None:
    names = [c.name for c in configurations()]
    assert len(names) == len(set(names))


def test_the_checks_above_can_fail(compiled: Callable[[str], Report]) -> None:
    controls = {name: compiled(name) for name in CONTROLS}
    assert controls["spills"]["stack"] > 0
    assert "HMMA" in controls["not swapped"]["instructions"]
    assert "QGMMA" not in controls["not swapped"]["instructions"]
    assert "HMMA" in controls["attention not swapped"]["instructions"]
    assert [tuple(product) for product in controls["computed twice"]["products"]] == [(64, 128), (64, 128)]
    assert controls["not specialised"]["warps"] == 8
    assert "USETMAXREG" not in controls["not specialised"]["instructions"]

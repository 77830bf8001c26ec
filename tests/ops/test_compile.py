"""Every kernel configuration, compiled for its target: no spills, within shared memory, on the tensor core.

What compiling one gave is read from support/compiled_kernels.json as long as everything that it follows from is the same
(`compile_kernels.key`), and is found by compiling otherwise. After a change of a kernel, a tile or a configuration:

    .venv/bin/python tests/support/compile_kernels.py --save

`make trust` compiles everything and holds the record to it.
"""

import contextlib
import fcntl
import functools
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import triton
from triton.backends.nvidia import compiler as nvidia

from ops.gpu import tiles
from support import compile_kernels
from support.kernel_configurations import Configuration, configurations
from support.limits import LAST_RESORT, run_within

pytestmark = pytest.mark.timeout(LAST_RESORT)  # what compiles has its own limit, of processor time
PARTS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # of what must be compiled: each worker of pytest has one
CONTROLS = ("spills", "not swapped", "computed twice", "not specialised", "attention not swapped")
SAMPLE = ("spills", "act_quant sm_90 ue8m0", "combine gfx942")  # compiled in every run
START, EACH = 120, 20  # seconds of processor time: to import Triton, and for a configuration (1 s is usual)
REFRESH = "run .venv/bin/python tests/support/compile_kernels.py --save"
Report = dict[str, Any]

# How the name of the instruction that must be there begins, and Ampere's, which may not be beside it.
BF16 = {"sm_80": ("HMMA", ""), "sm_89": ("HMMA", ""), "sm_90": ("HGMMA", "HMMA"), "sm_100": ("UTCHMMA", "HMMA"),
        "gfx942": ("v_mfma", "")}  # fmt: skip
FP8 = {"sm_89": ("QMMA", "HMMA"), "sm_90": ("QGMMA", "HMMA"), "sm_100": ("UTCQMMA", "HMMA"),
       "gfx942": ("v_mfma_f32_32x32x16_fp8_fp8", "")}  # fmt: skip
TENSOR_CORE = {
    **dict.fromkeys(("fp8_gemm", "grouped_w8a8"), FP8),
    **dict.fromkeys(("w8a16_gemm", "w4a16_gemm", "grouped_w8a16", "grouped_w4a16", "grouped_plain"), BF16),
    **dict.fromkeys(("router", "decode", "prefill"), BF16),
}


CONFIGURATIONS = {c.name: c for c in configurations()}


def run_compiler(names: Sequence[str], cache: Path) -> dict[str, Report]:
    """The key of every configuration, and beside it the reports of those named, which are compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)  # empty: Triton's own cache gives nothing
    done = run_within(START + EACH * len(names), [sys.executable, compile_kernels.__file__, *names], env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, str]:
    """The present key of every configuration."""
    with locked(shared_folder(tmp_path_factory, worker_id) / "keys.json") as file:
        if not file.exists():
            found = run_compiler((), tmp_path_factory.mktemp("triton"))
            file.write_text(json.dumps({name: report["key"] for name, report in found.items()}))
        return json.loads(file.read_text())


def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Of all workers of this run."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@contextlib.contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[Path]:
    """A file that one worker at a time may write. Raises BlockingIOError where another has it and we do not wait."""
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file


@pytest.fixture(scope="module")
def compiled(keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str], Report]:
    """Reports by configuration name: those recorded under the present keys, and the others, compiled once, by the
    workers that ask for them, in a process of each."""
    known = {name: report for name, report in compile_kernels.read_record().items() if report["key"] == keys.get(name)}
    stale = sorted(keys.keys() - known.keys())
    shared = shared_folder(tmp_path_factory, worker_id)

    @functools.cache
    def compile_stale() -> dict[str, Report]:
        found = {}
        for wait in (False, True):
            for part in range(PARTS):
                if not (names := stale[part::PARTS]):
                    continue
                with contextlib.suppress(BlockingIOError), locked(shared / f"compiled-{part}.json", wait) as file:
                    if not file.exists():
                        file.write_text(json.dumps(run_compiler(names, tmp_path_factory.mktemp("triton"))))
                    reports = json.loads(file.read_text())
                    found |= {name: reports[name] for name in names}
        return found

    return lambda name: known.get(name) or compile_stale()[name]


@pytest.mark.parametrize("c", CONFIGURATIONS.values(), ids=[name.replace(" ", "-") for name in CONFIGURATIONS])
def test_fits_and_uses_the_tensor_core(c: Configuration, compiled: Callable[[str], Report]) -> None:
    report = compiled(c.name)
    assert report["stack"] == 0
    assert report["shared"] <= tiles.SHARED_LIMIT[c.target]
    assert not report["flushes"]  # widen_e4m3 counts on subnormals
    waits = {"ACQBULK", "PREEXIT"} <= set(report["instructions"])  # griddepcontrol.wait and .launch_dependents
    assert waits == bool(c.options.get("launch_pdl"))
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
    stored = set() if "order_ptr" in c.types or "order_ptr" in c.constexprs else {"UTMASTG"}  # rows of experts lie apart
    assert {"UTMALDG"} | stored <= set(report["instructions"])
    if c.constexprs["SPECIALISED"]:
        assert report["warps"] > c.options["num_warps"]
        assert "USETMAXREG" in report["instructions"]
        if c.target == "sm_90":
            assert len(report["products"]) == 2
            assert sum(m * n for m, n in report["products"]) == c.constexprs["BLOCK_M"] * c.constexprs["BLOCK_N"]


def test_every_kernel_is_compiled() -> None:
    """For Hopper; and each target has some."""
    kernels = {c.kernel.fn.__name__ for c in CONFIGURATIONS.values()}
    assert kernels == {c.kernel.fn.__name__ for c in CONFIGURATIONS.values() if c.target == "sm_90"}
    assert {c.target for c in CONFIGURATIONS.values()} == set(tiles.SHARED_LIMIT)


def test_names_are_distinct() -> None:
    assert len(CONFIGURATIONS) == len(list(configurations()))


def test_the_checks_above_can_fail(compiled: Callable[[str], Report]) -> None:
    controls = {name: compiled(name) for name in CONTROLS}
    assert controls["spills"]["stack"] > 0
    assert "HMMA" in controls["not swapped"]["instructions"]
    assert "QGMMA" not in controls["not swapped"]["instructions"]
    assert "HMMA" in controls["attention not swapped"]["instructions"]
    assert [tuple(product) for product in controls["computed twice"]["products"]] == [(64, 128), (64, 128)]
    assert controls["not specialised"]["warps"] == 8
    assert "USETMAXREG" not in controls["not specialised"]["instructions"]


def test_the_record_is_up_to_date(keys: dict[str, str]) -> None:
    """So that nothing need be compiled here. Where another Triton or ptxas is installed than the record was made with,
    everything was."""
    made_with, here = compile_kernels.read_toolchain(), compile_kernels.toolchain()
    if made_with != here:
        pytest.skip(f"recorded with {made_with}; here is {here}")
    recorded = {name: report["key"] for name, report in compile_kernels.read_record().items()}
    changed = [name for name in keys | recorded if keys.get(name) != recorded.get(name)]
    assert not changed, f"{len(changed)} kernel configurations are not as recorded: {REFRESH}"


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(lambda name, c: name in SAMPLE, id="sample"),
        *(
            pytest.param(lambda name, c, target=target: c and c.target == target, id=target, marks=pytest.mark.trust)
            for target in tiles.SHARED_LIMIT
        ),
        pytest.param(lambda name, c: not c, id="controls", marks=pytest.mark.trust),
    ],
)
def test_what_is_recorded_is_what_compiles(
    wanted: Callable[[str, Configuration | None], bool], keys: dict[str, str], tmp_path: Path
) -> None:
    names = [name for name in keys if wanted(name, CONFIGURATIONS.get(name))]
    assert names
    found, recorded = run_compiler(names, tmp_path), compile_kernels.read_record()
    for name in names:
        if recorded.get(name, {}).get("key") == keys[name]:
            assert found[name] == recorded[name], f"{name} under the same key: {REFRESH} --all"


KERNEL = """
from functools import partial
import triton.language as tl
from triton.runtime.jit import JITFunction as jit
import NAME_constants as constants

SCALE = tl.constexpr(2.0)
BY = 3

@jit
def double(x, by=BY):
    return x * by

@jit
def square(x):
    return x * x

first, second, third = double, square, square

def enclosing(added):
    @jit
    def kernel(x_ptr, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        x = third(first(tl.load(x_ptr + at)) - second(tl.load(x_ptr + at)))
        tl.store(x_ptr + at, x * SCALE + added + constants.ADDED)
    return kernel

kernel = enclosing(tl.constexpr(1))
"""
OF_ITS_FILE = {
    "nothing": ("", "", True),
    "another line": ("SCALE = tl", "\n\nSCALE = tl", True),
    "another constant": ("BY = 3", "BY, OTHER = 3, tl.constexpr(4)", True),
    "its text": ("x * SCALE", "x - SCALE", False),
    "the text of one called": ("return x * by", "return x + by", False),
    "a constant": ("tl.constexpr(2.0)", "tl.constexpr(4.0)", False),
    "a default": ("BY = 3", "BY = 4", False),
    "a constant of another module": ("ADDED = 5", "ADDED = 6", False),
    "a constant of the function around it": ("tl.constexpr(1)", "tl.constexpr(2)", False),
    "what names stand for": ("square, square", "square, double", False),
    "its decorator": ("    @jit", "    @partial(jit, do_not_specialize=['n'])", False),
    "the decorator of one called": ("@jit\ndef square", "@partial(jit, noinline=True)\ndef square", False),
}
NUMBERS = itertools.count()  # of modules, of which Python reads each name once
EXAMPLE = Configuration(
    "", None, "sm_90", {"x_ptr": "*fp32", "n": "i32"}, {"BLOCK": 64}, {"num_warps": 4, "maxnreg": 128}
)


@pytest.fixture
def key_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The key of KERNEL after an edit and a change of configuration."""
    monkeypatch.syspath_prepend(tmp_path)

    def key(old: str = "", new: str = "", **changes: Any) -> str:
        name = f"kernel_{next(NUMBERS)}"
        for file, text in ((name, KERNEL), (f"{name}_constants", "ADDED = 5")):
            (tmp_path / f"{file}.py").write_text((text.replace(old, new) if old else text).replace("NAME", name))
        return compile_kernels.key(replace(EXAMPLE, kernel=importlib.import_module(name).kernel, **changes))

    return key


@pytest.mark.parametrize(("old", "new", "same"), OF_ITS_FILE.values(), ids=OF_ITS_FILE)
def test_a_key_follows_the_kernel(old: str, new: str, same: bool, key_after: Callable[..., str]) -> None:
    assert (KERNEL + "ADDED = 5").count(old) == 1 or not old
    assert (key_after(old, new) == key_after()) == same


def test_a_key_follows_the_configuration(key_after: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"target": "sm_100"},
        {"target": "gfx942", "options": {"num_warps": 4}},
        {"types": {"x_ptr": "*bf16", "n": "i32"}},
        {"types": {"x_ptr": "*fp32", "n": "i64"}},
        {"types": {"x_ptr": "*fp32"}, "constexprs": {"n": None, "BLOCK": 64}},
        {"constexprs": {"BLOCK": 128}},
        {"options": {"num_warps": 8, "maxnreg": 128}},
        {"options": {"num_warps": 4}},
        {"options": {"num_warps": 4, "maxnreg": 128, "num_stages": 2}},
    )
    keys = {key_after(**change) for change in changes}
    monkeypatch.setenv("PTXAS_OPTIONS", "-O1")
    keys.add(key_after())
    monkeypatch.setattr(triton, "__version__", "3.7.2")
    keys.add(key_after())
    monkeypatch.setattr(nvidia, "get_ptxas_version", lambda arch: "release 13.9")
    keys.add(key_after())
    monkeypatch.setattr(compile_kernels, "report", compile_kernels.compile_)  # that is: written otherwise
    keys.add(key_after())
    assert len(keys) == len(changes) + 4

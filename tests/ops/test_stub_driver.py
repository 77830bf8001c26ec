"""A rank's step through Triton's own path of a launch, for a GPU that is not there (support/stub_driver.py).

OTHER_TRITON names a folder with another release of Triton, unpacked, for these tests to run under:

    pip download --no-deps triton==3.6.0 && unzip -d /tmp/triton-3.6.0 triton-3.6.0-*.whl
    OTHER_TRITON=/tmp/triton-3.6.0 pytest tests/ops/test_stub_driver.py
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from support.limits import LAST_RESORT, run_within

pytestmark = pytest.mark.timeout(LAST_RESORT)
PROGRAM = Path(__file__).parents[1] / "support" / "step_launches.py"
SECONDS = 120  # of processor time; 8 are usual


def run_program(*arguments: str, cache: Path) -> dict[str, Any]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.environ.get("OTHER_TRITON", "")}
    done = run_within(SECONDS, [sys.executable, str(PROGRAM), *arguments], env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_program(cache=tmp_path_factory.mktemp("triton"))


def test_every_compilation_of_a_step_is_listed(counted: dict[str, Any]) -> None:
    """So that what compile_kernels.py makes beforehand is what the JIT looks for, key by key."""
    missed = sorted(name for key, name in counted["compilations"].items() if key not in counted["listed"])
    assert len(counted["compilations"]) > 30
    assert not missed, f"{len(missed)} of {len(counted['compilations'])} would be compiled again: {missed}"


def test_a_step_is_as_many_launches(counted: dict[str, Any]) -> None:
    """At most, and no fewer than one of each layer. Up to 32 sequences a layer of experts has 16, one after another, its
    shared expert with the others."""
    at_most = {"decode 1": 1000, "decode 8": 1000, "decode 32": 1000, "decode 128": 1225, "prefill 4096": 1525}
    found = {name: step["launches"] for name, step in counted["steps"].items()}
    assert all(61 * 8 < found[name] <= most for name, most in at_most.items()), found
    assert counted["steps"]["prefill 4096"]["counts"]["aten::cumsum"] == 1, "lengths are added up once for all layers"


@pytest.mark.parametrize("step", ["decode 1", "decode 8", "decode 32"])
def test_a_layer_of_experts_is_sixteen_launches(step: str, counted: dict[str, Any]) -> None:
    found = counted["steps"][step]
    assert found["side"] == 0 and len(found["chains"]["moe"]) <= 16 and len(found["chains"]["dense"]) <= 15
    assert not [name for name in found["chains"]["moe"] if name.startswith("aten::")]


@pytest.mark.parametrize("step", ["decode 1", "decode 8", "decode 32"])
def test_kernels_are_brought_on_while_the_one_before_runs(step: str, counted: dict[str, Any]) -> None:
    """All of a step but torch's collectives."""
    not_yet = {name for name, dependent in counted["steps"][step]["dependent"].items() if not dependent}
    assert not_yet == {"all_reduce", "all_gather"}, not_yet


def test_layers_chains_add_up_to_the_step(counted: dict[str, Any]) -> None:
    for name, step in counted["steps"].items():
        layers = 3 * len(step["chains"]["dense"]) + 58 * len(step["chains"]["moe"])
        assert 0 < step["launches"] - step["side"] - layers < 50, name


def test_what_was_compiled_beforehand_is_found(tmp_path: Path) -> None:
    """Compiled from the list, one of them with descriptors, and launched by the ops, twice."""
    found = run_program("--compile", cache=tmp_path)
    assert found["first"]["hits"] == found["second"]["hits"] == found["compiled"] > 0
    assert found["first"]["compilations"] == found["compiled"]
    assert found["first"]["allocated"] > 0, "descriptors lie in memory that the allocator gave"
    refused = ("must be a tensor or None", "is no i32", "no such grid as (1, 65536, 1)", "shared memory")
    assert all(text in said for text, said in zip(refused, found["refused"], strict=True)), found["refused"]


def test_sampling_is_one_launch_and_one_wait(tmp_path: Path) -> None:
    """And one copy to the device, with temperature and top-p, of 32 requests with drafts or without, and of proposals.
    Where logits lie in two places they are brought together first."""
    found = run_program("--sample", cache=tmp_path)
    assert all(step["waits"] == ["tolist"] for step in found.values()), found
    apart = found.pop("in two places")["launches"]
    assert all(step["launches"] == ["aten::_to_copy", "sample_kernel"] for step in found.values()) and len(found) == 3
    assert apart.count("sample_kernel") == 1 and len(apart) <= 8


def test_the_model_of_a_step_has_these_launches(counted: dict[str, Any]) -> None:
    """After a change of the launches: python benchmarks/bench.py step-model, then benchmarks/tables.py."""
    record = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "step_model.json").read_text())
    for name, step in counted["steps"].items():
        modelled: Counter[str] = Counter()
        for row in record["results"]["steps"][name]["rows"]:
            modelled[row["kernel"]] += row["launches"]
        assert modelled == step["counts"], name

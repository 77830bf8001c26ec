"""The model of a step on a GPU (benchmarks/step_model.py): what it recorded follows from its counts, and its arithmetic
holds where the answer is known. That the counts are those of today's launches: tests/ops/test_stub_driver.py."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import step_model
from step_model import ASSUMED
from support.limits import LAST_RESORT, run_within

SCRIPT = Path(step_model.__file__)
RECORD: dict[str, Any] = json.loads((SCRIPT.parent / "results" / "step_model.json").read_text())
STEPS: dict[str, Any] = RECORD["results"]["steps"]
KERNELS: dict[str, Any] = RECORD["results"]["kernels"]
COPY = ASSUMED["copy"].value
START = 1e6 * (ASSUMED["start"].value + ASSUMED["gap"].value)
SMALL = {"registers": 32, "stack": 0, "shared": 0, "warps": 4, "instructions": 100, "loops": [], "fit": 16}


def test_the_record_follows_from_its_counts() -> None:
    assert RECORD["kind"] == "predicted"
    for name, step in STEPS.items():
        assert step["launches"] == sum(row["launches"] for row in step["rows"])
        for row in step["rows"]:
            again = step_model.predict(row, KERNELS.get(row.get("compiled", "")))
            assert (again["us"], again["bound"]) == (row["us"], row["bound"]), (name, row["kernel"])
        assert step["ms"] == pytest.approx(step_model.step_ms(name, step["rows"])["ms"])
    assert RECORD["results"]["assumed"] == {name: one._asdict() for name, one in ASSUMED.items()}
    assert all(one.source for one in ASSUMED.values())


def test_every_kernel_of_ours_is_known() -> None:
    rows = [row for step in STEPS.values() for row in step["rows"]]
    assert {row["compiled"] for row in rows if "compiled" in row} == set(KERNELS)
    assert not {row["kernel"] for row in rows if not row.get("trips_known", True)}, "how often do their loops run?"
    assert not [one["kernel"] for one in KERNELS.values() if one["stack"]]


@pytest.mark.parametrize("b", [1, 8, 32, 128])
def test_limits_are_the_bytes_of_a_rank(b: int) -> None:
    """W(B): the weights that rank 0 of eight reads in a step of b tokens, by the sizes of V3's layers, and latents."""
    experts = 256 * (1 - (31 / 32) ** b)
    weights = 61 * 38.7e6 + 3 * 49.5e6 + 58 * (5.5e6 + 3.7e6 + 5.505e6 * experts) + 232e6
    step = STEPS[f"decode {b}"]
    assert step["limit_bytes"] == pytest.approx(weights + b * 4096 * 70.3e3, rel=0.02)
    assert step["limit_ms"] == pytest.approx({1: 1.42, 8: 5.56, 32: 15.0, 128: 28.0}[b], rel=0.02)
    moved = sum(row["launches"] * row["bytes"] for row in step["rows"])
    assert 1 <= moved / step["limit_bytes"] < 1.15, "what launches move is the limit's bytes and activations"
    assert step["limit_ms"] < step["ms_at_peak"] <= step["ms"]


def test_more_sequences_and_longer_prompts_take_longer() -> None:
    for kind in ("decode", "prefill"):
        times = [step["ms"] for name, step in STEPS.items() if name.startswith(kind)]
        assert times == sorted(times) and len(set(times)) == len(times) > 2


def test_losses_are_ranked_and_add_up() -> None:
    for name, step in STEPS.items():
        lost = [one["lost_ms"] for one in step["losses"]]
        assert lost == sorted(lost, reverse=True)
        assert sum(one["ms"] for one in step["losses"]) == pytest.approx(step["device_ms"], rel=1e-3), name


def test_known_bytes_take_their_time() -> None:
    """A gigabyte in enough programs; in one program, which a multiprocessor's own speed bounds; in a small launch."""
    row = {"kernel": "copy", "launches": 1, "bytes": 10**9, "programs": 10**5}
    found = step_model.predict(row, SMALL)
    assert found["bound"] == "memory" and found["us"] == pytest.approx(1e15 / COPY + START, rel=1e-3)
    alone = step_model.predict(row | {"programs": 1}, SMALL)
    assert alone["us"] > 30 * found["us"]
    few = step_model.predict(row | {"bytes": 10**5, "programs": 132}, SMALL)
    assert few["memory_us"] == pytest.approx(1e6 * ASSUMED["latency"].value)  # one round trip
    beside = step_model.predict(row | {"side": True}, SMALL)
    assert beside["us"] == pytest.approx(found["us"] - START, rel=1e-3)
    dependent = step_model.predict(row | {"dependent": True}, SMALL)
    assert beside["us"] < dependent["us"] < found["us"]


def test_instructions_and_products_take_turns() -> None:
    """Twice the trips of a loop of 1,000 instructions; a group that multiplies waits for itself, two of them do not."""
    looped = SMALL | {"loops": [[1000, True], [3000, False]], "instructions": 5000, "fit": 1}
    assert step_model.instructions_of(looped, 10, 1) == 4000 + 10 * 1000
    row = {"kernel": "product", "launches": 1, "bytes": 1, "programs": 132, "trips": 100, "flops": 10**12}
    one = step_model.predict(row, looped)
    assert one["bound"] == "turns" and one["turns_us"] == pytest.approx(one["tensor_us"] + one["issue_us"], rel=1e-3)
    two = step_model.predict(row | {"specialised": True}, looped | {"warps": 12})
    assert two["turns_us"] < one["turns_us"]


def test_tiles_of_rows_of_experts() -> None:
    """One token fills a tile of each expert it chose; many tokens, hardly more tiles than rows need."""
    assert step_model.row_tiles(1, 16) == pytest.approx(8)
    assert step_model.row_tiles(32, 1) == pytest.approx(32 * 8, rel=1e-6)
    assert 256 < step_model.row_tiles(4096, 64) - 4096 * 8 / 64 / 2 < 512
    assert step_model.touched(1) == pytest.approx(8) and step_model.touched(128) == pytest.approx(251.6, abs=0.1)


def test_work_of_launches() -> None:
    arguments = {"x_ptr": "float8_e4m3fn(64, 7168)", "w_ptr": "float8_e4m3fn(2112, 7168)", "out_ptr": "bfloat16(64, 2112)",
                 "M": 64, "N": 2112, "K": 7168}  # fmt: skip
    launch = SimpleNamespace(name="gemm_kernel", grid=(33, 1, 1), arguments=arguments, ours=True, key="k",
                             constants={"BLOCK_M": 64, "BLOCK_N": 64, "SPLIT": False})  # fmt: skip
    work = step_model.work_of(launch, (64, 1, 0))
    assert work.nbytes == 64 * 7168 + 2112 * 7168 + 2 * 64 * 2112
    assert work.flops == work.useful == 2 * 64 * 2112 * 7168 and work.kind == "fp8" and work.trips == 56
    experts = {"x_ptr": "float8_e4m3fn(1, 7168)", "w_ptr": "float8_e4m3fn(256, 512, 7168)",
               "w_s_ptr": "float32(256, 4, 56)", "N": 512, "K": 7168}  # fmt: skip
    launch = SimpleNamespace(name="grouped_gemm_kernel", grid=(64, 2, 1), arguments=experts, ours=True, key="k",
                             constants={"BLOCK_M": 16, "BLOCK_N": 64, "SPLIT": True})  # fmt: skip
    work = step_model.work_of(launch, (1, 1, 4096))
    assert work.nbytes == pytest.approx(7168 + 8 * (512 * 7168 + 4 * 4 * 56))  # of the experts chosen alone
    assert work.useful == 8 * 2 * 512 * 7168 and work.flops == pytest.approx(16 * work.useful) and work.trips == 28
    launch.arguments["ids_ptr"] = "int64(1, 8)"  # tiles are looked for by all 128 programs, and half of them have none
    launch.grid = (128, 2, 1)
    idle = step_model.work_of(launch, (1, 1, 4096))
    assert (idle.programs, idle.trips) == (256, pytest.approx(work.trips * work.programs / 256))
    arguments = {"0": "bfloat16(3, 5)", "1": "bfloat16(5, 7)", "2": "bfloat16(3, 7)"}
    product = SimpleNamespace(name="aten::mm", grid=(1, 1, 1), arguments=arguments, ours=False, constants={})
    assert step_model.work_of(product, (1, 1, 0))[:2] == (2 * (15 + 35 + 21), 2 * 3 * 5 * 7)


@pytest.mark.trust
@pytest.mark.timeout(LAST_RESORT)
def test_a_sample_compiles_to_what_was_recorded() -> None:
    triton = pytest.importorskip("triton")
    if triton.__version__ != RECORD["machine"]["versions"]["triton"]:
        pytest.skip(f"recorded with Triton {RECORD['machine']['versions']['triton']}")
    keys = {row.get("compiled") for row in STEPS["decode 1"]["rows"]} - {None}
    kernel = min((KERNELS[key] for key in keys), key=lambda one: one["instructions"])["kernel"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = run_within(120, [sys.executable, str(SCRIPT), "--compile", kernel], env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == sum(KERNELS[key]["kernel"] == kernel for key in keys) > 0
    assert all(one in KERNELS.values() for one in found.values()), found

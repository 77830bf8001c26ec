"""What the attention kernels take on Hopper, as benchmarks/attention_counts.py recorded it for both versions of Triton."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from lib import sass

import attention_counts
from ops.gpu import attention
from ops.gpu.attention_tiles import DECODE
from ops.gpu.tiles import SHARED_LIMIT
from support import compile_kernels
from support.kernel_configurations import configurations

RECORD = Path(attention_counts.__file__).parent / "results" / "attention_counts.json"
RESULTS: dict[str, Any] = json.loads(RECORD.read_text())["results"]
VERSIONS = ["3.6.0", "3.7.1"]


@pytest.mark.parametrize("version", VERSIONS)
def test_bars(version: str) -> None:
    rows = {row["kernel"]: row for row in RESULTS["compiled"] if row["triton"] == version}
    assert all(row["stack"] == 0 for row in rows.values())
    few = rows["decode sm_90 bf16 16 heads 16x64 descriptor"]
    assert few["instructions"] <= 600 and few["programs_that_fit"] >= 2 and few["shared"] <= 113 * 1024
    by_group = rows["decode sm_90 fp8 16 heads 16x64 by group"]
    assert by_group["rows"] == 16  # not filled up to 64, of which 32 keys took 8 warps 966 instructions
    # of all warps, for a key; and one program's loads go on beside the other's products
    assert by_group["instructions"] * by_group["warps"] / by_group["keys"] < 70 and by_group["programs_that_fit"] >= 2
    prompt = rows["prefill sm_90 16 heads 128x128"]
    assert prompt["instructions"] / prompt["keys"] < 423 / 64  # what the tile of 64 keys took


def test_the_counts_are_of_the_kernels_that_are_here() -> None:
    compiled = compile_kernels.read_record()
    names = {name for name in (c.name for c in configurations(attention)) if attention_counts.wanted(name)}
    for version in VERSIONS:
        assert {row["kernel"] for row in RESULTS["compiled"] if row["triton"] == version} == names
    version = compile_kernels.read_toolchain().split(",")[0].removeprefix("Triton ")
    for row in RESULTS["compiled"]:
        if row["triton"] == version:
            report = compiled[row["kernel"]]
            assert (row["registers"], row["shared"]) == (report["registers"], report["shared"]), row["kernel"]


@pytest.mark.parametrize("target", [target for target in SHARED_LIMIT if target != "gfx942"])
def test_programs_side_by_side_have_room(target: str) -> None:
    """As many as the tables count on, by registers and by shared memory."""
    compiled = compile_kernels.read_record()
    for c in configurations(attention):
        if c.name.startswith(f"decode {target} "):
            table = DECODE[target, " fp8 " in c.name]
            warps, rows = c.options["num_warps"], c.constexprs["ROWS"]
            tile = next(tile for tile in table if (tile.rows, tile.warps) == (rows, warps))
            report = compiled[c.name]
            registers = math.ceil(report["registers"] / 8) * 8 * 32 * warps
            assert tile.programs * registers <= sass.REGISTERS, c.name
            assert tile.programs * (report["shared"] + 1024) <= SHARED_LIMIT[target] + 1024, c.name


def test_balance_is_what_the_bar_wants() -> None:
    assert {row["lengths"]: row["efficiency"] for row in RESULTS["simulated"]} == {
        name: attention_counts.balance(lengths)["efficiency"] for name, lengths in attention_counts.CASES.items()
    }
    assert all(row["efficiency"] >= 0.9 for row in RESULTS["simulated"])


CODE = """
.L_x_1:
        /*0010*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0020*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4] ;
        /*0030*/              @P0  FADD R2, R2, R3 ;
        /*0040*/              @P0  BRA `(.L_x_0) ;
        /*0050*/                   FADD R2, R2, R3 ;
.L_x_2:
        /*0060*/                   FADD R2, R2, R3 ;
        /*0070*/              @P1  BRA `(.L_x_2) ;
        /*0080*/              @P1  BRA `(.L_x_1) ;
        /*0090*/                   BRA `(.L_x_3) ;
.L_x_3:
"""


def test_the_innermost_loop_that_multiplies_is_counted() -> None:
    assert sass.inner_loops(CODE) == [3]
    assert sass.inner_loops(CODE.replace("HGMMA", "MOV")) == []

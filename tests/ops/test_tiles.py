"""The choice of tiles: by rule, and from a table of measured ones, whose rows are checked before they are used."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from ops.gpu import tiles
from ops.gpu.tiles import Tile

GOOD = {"op": "fp8_gemm", "arch": "sm_90", "n": 2112, "k": 7168} | asdict(Tile(16, 16, 128, True, 4, 4, split=8))


@pytest.fixture
def fresh() -> Iterator[None]:
    """Choices are remembered: forget them before and after."""
    for remembered in (tiles.measured, tiles._choice):
        remembered.cache_clear()
    yield
    for remembered in (tiles.measured, tiles._choice):
        remembered.cache_clear()


@pytest.mark.parametrize("tables", tiles.DEFAULTS.values(), ids=list(tiles.DEFAULTS))
def test_defaults_serve_every_m(tables: dict[str, tuple[Tile, ...]]) -> None:
    for table in tables.values():
        bounds = [tile.max_rows for tile in table]
        assert bounds == sorted(set(bounds)) and bounds[-1] == math.inf
        assert all(m <= tiles.tile_for(table, m).max_rows for m in (1, 16, 17, 128, 1000, 1 << 20))
    assert tuple(sorted(tiles.BUCKETS)) == tiles.BUCKETS and tiles.BUCKETS[-1] == math.inf


def test_defaults_and_shipped_rows_have_no_fault() -> None:
    assert [
        (op, arch, tile, found) for op, arch, tile in tiles.reachable() if (found := tiles.fault(op, arch, tile))
    ] == []


def test_a_choice_depends_on_m_through_its_bucket_only(fresh: None) -> None:
    smallest = 1
    for max_rows in tiles.BUCKETS:
        largest = 1 << 20 if max_rows == math.inf else int(max_rows)
        for n, k in ((2112, 7168), (100, 4096), (32768, 512)):
            first = tiles.choose("fp8_gemm", "sm_90", n, k, smallest)
            assert first == tiles.choose("fp8_gemm", "sm_90", n, k, largest) and first.max_rows == max_rows
        smallest = largest + 1


def test_all_blocks_of_a_short_k_are_read_before_the_first_product() -> None:
    """A pipeline reads ahead one block less than it has stages."""
    tile = tiles.GROUPED_W8A8["sm_90"][0]
    assert [tile.for_channels(k).stages for k in (100, 256, 257, 7168)] == [2, 3, 4, tile.stages]


@pytest.mark.parametrize(
    "n, k, split",
    [
        (2112, 7168, 4),
        (7168, 2048, 1),  # 112 programs: a sum of parts would take longer than they lose
        (4096, 7168, 2),
        (3072, 1536, 2),
        (24576, 1536, 1),
        (576, 7168, 8),
        (576, 1000, 2),
    ],
)
def test_k_is_split_where_the_grid_is_too_small(n: int, k: int, split: int) -> None:
    """132 multiprocessors, or as many parts as there are four blocks each."""
    for m in (1, 16, 17, 64):
        assert tiles.choose("fp8_gemm", "sm_90", n, k, m).split == split
    assert tiles.choose("fp8_gemm", "sm_90", n, k, 512).split == 1


def test_persistent_where_there_are_several_tiles_to_a_program() -> None:
    assert tiles.choose("fp8_gemm", "sm_90", 7168, 2048, 1024).persistent
    assert not tiles.choose("fp8_gemm", "sm_90", 2112, 7168, 1024).persistent  # 136 tiles
    assert not tiles.choose("fp8_gemm", "sm_90", 576, 7168, 1 << 16).swap
    assert all(not tiles.plain("fp8_gemm", arch).persistent for arch in tiles.W8A8)


def test_a_measured_row_goes_first(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = tiles.choose("fp8_gemm", "sm_90", 2112, 7168, 17)
    table = tmp_path / "tiles.json"
    table.write_text(json.dumps([GOOD]))
    tiles.measured.cache_clear()
    tiles._choice.cache_clear()
    monkeypatch.setattr(tiles, "TABLE", table)
    assert tiles.choose("fp8_gemm", "sm_90", 2112, 7168, 16) == Tile(16, 16, 128, True, 4, 4, split=8)
    assert tiles.choose("fp8_gemm", "sm_90", 2112, 7168, 17) == usual
    assert tiles.choose("fp8_gemm", "sm_90", 2112, 7040, 16).block_n == 64
    assert tiles.choose("w8a16_gemm", "sm_90", 2112, 7168, 16).block_n == 64
    assert ("fp8_gemm", "sm_90", Tile(16, 16, 128, True, 4, 4, split=8)) in tiles.reachable()


def test_a_table_reads_as_written(tmp_path: Path) -> None:
    last = Tile(math.inf, 128, 128, False, 4, 4, persistent=1, specialised=True)
    rows = {
        ("fp8_gemm", "sm_90", 2112, 7168, 16): Tile(16, 16, 64, True, 4, 6, split=8),
        ("fp8_gemm", "sm_90", 2112, 7168, math.inf): last,
        ("w8a16_gemm", "gfx942", 576, 7168, 512): Tile(512, 64, 64, False, 4, 2, registers=128),
    }
    tiles.write(tmp_path / "t.json", rows)
    assert tiles.read(tmp_path / "t.json") == rows
    tiles.write(tmp_path / "t.json", {})
    assert tiles.read(tmp_path / "t.json") == {}


BAD: list[tuple[Any, str]] = [
    ({"arch": "sm_75"}, "there is no fp8_gemm for sm_75"),
    ({"op": "gemm"}, "there is no gemm for sm_90"),
    ({"arch": "sm_80"}, "there is no fp8_gemm for sm_80"),
    ({"n": 0}, "N = 0, K = 7168"),
    ({"max_rows": 17}, "max_rows is 17, expected one of 16, 32"),
    ({"warps": "4"}, "warps is '4', expected int"),
    ({"warps": True}, "warps is True, expected int"),
    ({"swap": 1}, "swap is 1, expected bool"),
    ({"stages": None}, "stages is None, expected int"),
    ({"extra": 1}, "expected an object of op, arch, n, k, max_rows"),
    ({"block_m": 24}, "a tile of 24 x 128"),
    ({"block_n": 256}, "a tile of 16 x 256"),
    ({"warps": 2}, "2 warps"),
    ({"stages": 0}, "0 stages"),
    ({"split": 3}, "split 3"),
    ({"registers": 300}, "300 registers"),
    ({"persistent": 5, "split": 1, "swap": False, "block_m": 64}, "persistent is 5"),
    ({"persistent": 1, "block_m": 64, "swap": False}, "neither swapped nor split"),
    ({"persistent": 1, "op": "w8a16_gemm", "split": 1, "swap": False, "block_m": 64}, "persistent is for fp8_gemm"),
    ({"specialised": True}, "specialised without persistent"),
    ({"specialised": True, "persistent": 1, "split": 1, "swap": False, "block_m": 64}, "needs 128 rows and 4 warps"),
    ({"specialised": True, "persistent": 1, "split": 1, "swap": False, "block_m": 128, "warps": 8}, "needs 128 rows and"),
    ({"swap": False}, "needs 64 rows"),
    ({"block_m": 128}, "128 x 128 sums are too many for 4 warps"),
    ({"block_m": 128, "warps": 8, "stages": 8}, "262144 bytes of shared memory"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_a_bad_row_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([GOOD | {"n": 100}, GOOD | change]))
    with pytest.raises(UserError) as refused:
        tiles.read(path)
    assert str(refused.value).startswith(f"{path}, row 2: ") and message in str(refused.value)


def test_a_bad_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    for text, message in [
        ("[", "Expecting value"),
        ("{}", "expected a list"),
        (json.dumps([GOOD, GOOD]), "row 2: a second"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            tiles.read(path)
    with pytest.raises(UserError, match="No such file"):
        tiles.read(tmp_path / "none.json")


def test_tuning_without_times(tmp_path: Path) -> None:
    """The whole path of the script, interpreted: it keeps other rows, and what it writes can be read."""
    pytest.importorskip("triton")
    table = tmp_path / "tiles.json"
    kept = ("fp8_gemm", "sm_90", 2112, 7168, 16)
    tiles.write(table, {kept: Tile(16, 16, 64, True, 4, 6, split=8)})
    script = Path(__file__).parents[2] / "benchmarks" / "tune_gemm.py"
    arguments = ["--smoke", "--table", str(table), "--shape", "40", "576", "--tokens", "3"]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    written = tiles.read(table)
    assert set(written) == {kept} | {(op, "sm_90", 40, 576, 16) for op in tiles.DEFAULTS}
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "benchmark": "tune_gemm",
        "timed": False,
        "rows": 1 + len(tiles.DEFAULTS),
        "none_right": 0,
    }


def test_candidates_begin_with_the_default_and_have_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import tune_gemm

    for op, tables in tiles.DEFAULTS.items():
        for arch in tables:
            for max_rows in (16, 512, math.inf):
                field = list(tune_gemm.candidates(op, arch, 2112, 7168, max_rows))
                assert field[0] == tiles.default(op, arch, 2112, 7168, max_rows)
                assert len(set(field)) == len(field) > 5
                assert all(tile.max_rows == max_rows and tiles.fault(op, arch, tile) is None for tile in field)

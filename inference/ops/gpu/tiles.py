"""The tile that each GEMM computes with, dense or grouped: by architecture and number of rows, or as measured.

A choice for a dense GEMM depends on the op, the architecture, N, K and the bucket that M falls in, and on nothing else
of the batch. Nothing is tuned at start-up: benchmarks/tune_gemm.py writes tiles.json, and what is not there is decided
here by rule.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from core.config import BLOCK_SIZE
from core.errors import UserError
from ops.gpu.tile_tables import DEFAULTS as DEFAULTS
from ops.gpu.tile_tables import GROUP_M as GROUP_M
from ops.gpu.tile_tables import GROUPED_FLOAT32 as GROUPED_FLOAT32
from ops.gpu.tile_tables import GROUPED_PLAIN as GROUPED_PLAIN
from ops.gpu.tile_tables import GROUPED_W4A16 as GROUPED_W4A16
from ops.gpu.tile_tables import GROUPED_W8A8 as GROUPED_W8A8
from ops.gpu.tile_tables import GROUPED_W8A16 as GROUPED_W8A16
from ops.gpu.tile_tables import SHARED_LIMIT as SHARED_LIMIT
from ops.gpu.tile_tables import SM_COUNT as SM_COUNT
from ops.gpu.tile_tables import W8A8 as W8A8
from ops.gpu.tile_tables import W8A16 as W8A16
from ops.gpu.tile_tables import Tile as Tile

BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, math.inf)  # a bucket is named by the largest M in it
SPLITS = (1, 2, 4, 8, 16)
SPLIT_MAX_ROWS = 256  # tokens: with more, the partial sums would weigh as much as the weights
SPLIT_BLOCKS = 4  # of K, at least, for each part
TABLE = Path(__file__).with_name("tiles.json")


# --------------------------------------------------------------------------------------------------------------------
# Choosing
# --------------------------------------------------------------------------------------------------------------------


def choose(op: str, arch: str, n: int, k: int, m: int) -> Tile:
    """The tile for M tokens by a weight (N, K): the measured one if tiles.json has it, otherwise the default.

    op: "fp8_gemm", "w8a16_gemm" or "w4a16_gemm"; arch: a key of its table. Raises UserError for a tiles.json that
    cannot be used.
    """
    return _choice(op, arch, n, k, bucket(m))


@cache
def _choice(op: str, arch: str, n: int, k: int, max_rows: float) -> Tile:
    return measured().get((op, arch, n, k, max_rows)) or default(op, arch, n, k, max_rows)


def bucket(m: int) -> float:
    return next(max_rows for max_rows in BUCKETS if m <= max_rows)


class HasMaxRows(Protocol):
    @property
    def max_rows(self) -> float: ...


AnyTile = TypeVar("AnyTile", bound=HasMaxRows)


def tile_for(table: tuple[AnyTile, ...], rows: float) -> AnyTile:
    """The first tile of a table, which is in order of max_rows, that serves so many rows."""
    return next(tile for tile in table if rows <= tile.max_rows)


def default(op: str, arch: str, n: int, k: int, max_rows: float) -> Tile:
    """The choice by rule for a bucket."""
    tile = tile_for(DEFAULTS[op][arch], max_rows)
    if tile.persistent and tile.count(min(max_rows, BUCKETS[-2]), n) < 2 * SM_COUNT[arch]:
        tile = plain(op, arch)
    split = 1
    if max_rows <= SPLIT_MAX_ROWS:
        split = split_for(tile.count(max_rows, n), math.ceil(k / BLOCK_SIZE), SM_COUNT[arch])
    return replace(tile, max_rows=max_rows, split=split)


def without_tma(table: tuple[Tile, ...], tile: Tile) -> Tile:
    """A grouped GEMM's tile, or where it is persistent and rows do not allow that, the largest that is not."""
    return next(t for t in reversed(table) if not t.persistent) if tile.persistent else tile


def plain(op: str, arch: str) -> Tile:
    """For many tokens, where N and K do not allow the persistent tile or do not need it."""
    return next(tile for tile in reversed(DEFAULTS[op][arch]) if not tile.persistent)


def split_for(programs: int, k_blocks: int, sms: int) -> int:
    """The fewest parts of K that give most multiprocessors a program, each no shorter than SPLIT_BLOCKS. (112 programs,
    of N = 7168, keep an H200's memory busy: see above. A sum of parts would take longer than they lose.)"""
    allowed = [split for split in SPLITS if split == 1 or k_blocks >= split * SPLIT_BLOCKS]
    return next((split for split in allowed if programs * split >= 0.8 * sms), allowed[-1])


def split_for_few_rows(tile: Tile, rows: float, n_local: int, n: int, k: int, arch: str) -> Tile:
    """A grouped GEMM's tile for the fewest rows to an expert, with K in so many parts that (nearly) every
    multiprocessor has a program, when `rows` are expected for the n_local experts, of weights (N, K), together."""
    used = min(math.ceil(rows), n_local)  # row tiles: with few rows hardly one falls to an expert that has one already
    return replace(tile, split=split_for(used * math.ceil(n / tile.block_n), math.ceil(k / BLOCK_SIZE), SM_COUNT[arch]))


# --------------------------------------------------------------------------------------------------------------------
# The table of measured choices
# --------------------------------------------------------------------------------------------------------------------

Key = tuple[str, str, int, int, float]  # op, architecture, N, K, bucket


@cache
def measured() -> dict[Key, Tile]:
    return read(TABLE)


def read(path: Path) -> dict[Key, Tile]:
    """tiles.json: a list of rows, each with op, arch, n, k and the fields of Tile; max_rows null is the last bucket.

    Raises UserError naming the row for anything that could not be launched or would leave the tensor core.
    """
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: {e}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows")
    table: dict[Key, Tile] = {}
    for number, row in enumerate(rows, 1):
        try:
            key, tile = _row(row)
            if key in table:
                raise ValueError("a second row for the same op, arch, n, k and max_rows")
        except ValueError as e:
            raise UserError(f"{path}, row {number}: {e}") from None
        table[key] = tile
    return table


def _row(row: Any) -> tuple[Key, Tile]:
    known = {"op": str, "arch": str, "n": int, "k": int} | {field.name: int for field in fields(Tile)}
    known |= {"swap": bool, "specialised": bool}
    if not isinstance(row, dict) or set(row) != set(known):
        raise ValueError(f"expected an object of {', '.join(known)}")
    for name, kind in known.items():
        absent = row[name] is None and name in ("max_rows", "registers")
        if type(row[name]) is not kind and not absent:
            raise ValueError(f"{name} is {row[name]!r}, expected {kind.__name__}")
    values = row | {"max_rows": math.inf if row["max_rows"] is None else row["max_rows"]}
    op, arch, n, k = (values.pop(name) for name in ("op", "arch", "n", "k"))
    tile = Tile(**values)
    if arch not in DEFAULTS.get(op, ()):
        raise ValueError(f"there is no {op} for {arch}")
    if n < 1 or k < 1:
        raise ValueError(f"N = {n}, K = {k}")
    if tile.max_rows not in BUCKETS:
        raise ValueError(f"max_rows is {row['max_rows']}, expected one of {', '.join(map(str, BUCKETS[:-1]))} or null")
    if found := fault(op, arch, tile):
        raise ValueError(found)
    return (op, arch, n, k, tile.max_rows), tile


def write(path: Path, table: dict[Key, Tile]) -> None:
    """Writes a table as `read` takes it, a row to a line."""
    lines = []
    for (op, arch, n, k, _), tile in sorted(table.items(), key=lambda item: item[0]):
        row = {"op": op, "arch": arch, "n": n, "k": k} | asdict(tile)
        lines.append(json.dumps(row | {"max_rows": None if tile.max_rows == math.inf else tile.max_rows}))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")


def fault(op: str, arch: str, tile: Tile) -> str | None:
    """Why a tile cannot be used, as far as that is known without compiling it."""
    sizes = (16, 32, 64, 128)
    if tile.block_m not in sizes or tile.block_n not in sizes:  # no more than 128 channels: one weight scale to a tile
        return f"a tile of {tile.block_m} x {tile.block_n}, expected sides of 16, 32, 64 or 128"
    if tile.warps not in (4, 8) or not 1 <= tile.stages <= 8 or tile.split not in SPLITS:
        return f"{tile.warps} warps, {tile.stages} stages, split {tile.split}, expected 4 or 8, 1 to 8, one of {SPLITS}"
    if tile.registers is not None and not 64 <= tile.registers <= 255:
        return f"{tile.registers} registers, expected 64 to 255"
    if not 0 <= tile.persistent <= 4:
        return f"persistent is {tile.persistent}, expected 0 to 4"
    if tile.persistent and (op != "fp8_gemm" or arch not in ("sm_90", "sm_100") or tile.swap or tile.split > 1):
        return "persistent is for fp8_gemm on sm_90 and sm_100, neither swapped nor split"
    if tile.specialised and not tile.persistent:
        return "specialised without persistent"
    if tile.specialised and arch == "sm_90" and (tile.block_m, tile.warps) != (128, 4):
        return "on sm_90 specialised needs 128 rows and 4 warps"
    if arch in ("sm_90", "sm_100") and (tile.block_n if tile.swap else tile.block_m) < 64:
        return "the first operand needs 64 rows (channels, where swapped) for the tensor core"
    groups = 2 if tile.specialised and arch == "sm_90" else 1
    if tile.block_m * tile.block_n > 64 * 32 * tile.warps * groups:
        return f"{tile.block_m} x {tile.block_n} sums are too many for {tile.warps} warps' registers"
    x_bytes, w_bytes = {"fp8_gemm": (1, 1), "w8a16_gemm": (2, 1), "w4a16_gemm": (2, 0.5)}[op]
    shared = int(tile.stages * (tile.block_m * x_bytes + tile.block_n * w_bytes) * BLOCK_SIZE)
    if shared * max(1, tile.persistent) > SHARED_LIMIT[arch]:
        return f"{shared} bytes of shared memory, {max(1, tile.persistent)} times, of {SHARED_LIMIT[arch]}"
    return None


def reachable() -> Iterator[tuple[str, str, Tile]]:
    """(op, architecture, tile) for all that `choose` can return, whatever N and K; split in 2 stands for any."""
    for op, tables in DEFAULTS.items():
        for arch, table in tables.items():
            yield from ((op, arch, tile) for tile in table)
            few = {tile_for(table, max_rows) for max_rows in BUCKETS if max_rows <= SPLIT_MAX_ROWS}
            yield from ((op, arch, replace(tile, split=2)) for tile in table if tile in few)
    yield from ((op, arch, tile) for (op, arch, *_), tile in measured().items())

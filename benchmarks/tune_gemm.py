"""Chooses a tile for every shape and bucket of M by measurement, and writes the table that ops/gpu/tiles.py reads.

    python benchmarks/tune_gemm.py
    python benchmarks/tune_gemm.py --shape 2112 7168 --tokens 16 32 --output benchmarks/results/tune.json
    python benchmarks/tune_gemm.py --smoke --table build/tiles.json

Every candidate is checked against float64 before it is timed; what is wrong or cannot be launched is left out. A time
is the median over replays of a CUDA graph, the candidates taking turns; in the graph each call meets another set of
weights, so that the L2 cache is cold. A row is written only where the best beats the default by MARGIN. With --smoke
all of this but the timing happens on a CPU, in Triton's interpreter, on small shapes: that shows that the script works,
and the table it writes means nothing.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lib import report
from lib.race import CALLS
from lib.timing import between_events, relative_error

from core.config import BLOCK_SIZE
from core.errors import UserError
from kernel_gpu import GROUP, SHAPES, dequantised, int4, widened
from ops import reference
from ops.gpu import tiles

MARGIN = 0.02
TOLERANCE = 5e-3  # of the norm of the error: rounding inputs to bf16 makes 2e-3, FP8 tensor cores' own sums 1e-3
ROUNDS = 11
MOST_TOKENS = 8192  # measured for the last bucket, which has no largest M


def candidates(op: str, arch: str, n: int, k: int, up_to: float) -> Iterator[tiles.Tile]:
    """The default first, then all tiles that are not known to be at fault and that make sense for the bucket."""
    chosen = tiles.default(op, arch, n, k, up_to)
    yield chosen
    rows = min(up_to, MOST_TOKENS)
    kinds = [(0, False), (1, False), (2, False), (1, True)]
    axes = product((16, 32, 64, 128), (32, 64, 128), (False, True), (4, 8), (2, 3, 4, 5, 6), (None, 168), tiles.SPLITS)
    for (persistent, specialised), values in product(kinds, axes):
        tile = tiles.Tile(up_to, *values, persistent, specialised)
        count, sums = tile.count(rows, n), tile.block_m * tile.block_n
        few = 2 * tile.split * BLOCK_SIZE <= k and count * tile.split <= 4 * tiles.SM_COUNT[arch]
        sensible = (
            min(64, rows) <= tile.block_m <= max(16, rows)  # fewer rows would read the weights more than once
            and (tile.registers is None or sums == 64 * 128)
            and (tile.split == 1 or (up_to <= tiles.SPLIT_MAX_ROWS and few))
            and (not persistent or (rows > tiles.SPLIT_MAX_ROWS and tile.stages >= 3))
            and (tile.warps == 4 or sums >= 64 * 128)
            and (tile.stages % 2 == 0 or sums >= 64 * 128)  # small tiles: a pipeline of 2, 4 or 6 stages
        )
        if sensible and tile != chosen and tiles.fault(op, arch, tile) is None:
            yield tile


class Set:
    """One weight (N, K) of FP8, as both products take it, and one of INT4, where K is a number of whole groups."""

    def __init__(self, n: int, k: int, device: torch.device, fnuz: bool) -> None:
        from ops.gpu.backend import GpuBackend

        self.w = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
        self.s = 0.01 + 0.01 * torch.rand(math.ceil(n / BLOCK_SIZE), math.ceil(k / BLOCK_SIZE), device=device)
        self.w_fp8, self.s_fp8 = reference.to_fnuz(self.w, self.s) if fnuz else (self.w, self.s)
        if k % GROUP == 0:
            self.int4 = int4(torch.Generator(device).manual_seed(0), n, k)
            assert self.int4.scale is not None
            copy = self.int4._replace(data=self.int4.data.clone(), scale=self.int4.scale.clone())
            self.packed = GpuBackend().pack_weight(copy)


class Problem:
    """One product, M tokens by each of several sets of weights of the same shape, and its exact result."""

    def __init__(self, op: str, m: int, sets: list[Set]) -> None:
        from ops.gpu.quantisation import act_quant

        self.op, self.sets = op, sets
        q, q_s = act_quant(torch.randn(m, sets[0].w.shape[1], device=sets[0].w.device).bfloat16())
        meant, first = widened(q, q_s), sets[0]
        if op == "w4a16_gemm":
            assert first.int4.scale is not None
            w = dequantised(first.int4.data, first.int4.scale, first.int4.block)
        else:
            w = dequantised(first.w, first.s)
        self.exact = meant @ w.T
        self.x: torch.Tensor = q if op == "fp8_gemm" else meant.bfloat16()
        self.x_s: torch.Tensor | None = q_s if op == "fp8_gemm" else None

    def run(self, tile: tiles.Tile, w: Set) -> torch.Tensor:
        from ops.gpu import gemm

        if self.op == "w4a16_gemm":
            assert w.packed.scale is not None
            return gemm.gemm(self.x, None, w.packed.data, w.packed.scale, torch.bfloat16, tile, w.packed.block)
        data, scale = (w.w_fp8, w.s_fp8) if self.op == "fp8_gemm" else (w.w, w.s)
        return gemm.gemm(self.x, self.x_s, data, scale, torch.bfloat16, tile)

    def right(self, tile: tiles.Tile) -> bool:
        """Whether the tile can be launched here and its result is near enough. Says on stderr when it is not near."""
        try:
            error = relative_error(self.run(tile, self.sets[0]), self.exact)
        except Exception as e:  # Triton has no common class for what a device or its compiler refuses
            print(f"{tile}: refused, {str(e).strip().splitlines()[0] if str(e) else type(e).__name__}", file=sys.stderr)
            return False
        if not error < TOLERANCE:
            print(f"{tile}: WRONG, error {error:.1e}", file=sys.stderr)
        return error < TOLERANCE

    def times(self, field: list[tiles.Tile]) -> list[float]:
        """Seconds a call, for each tile: medians of interleaved replays."""
        calls = max(CALLS, len(self.sets)) if len(self.exact) <= 128 else len(self.sets)
        pool = torch.cuda.graph_pool_handle()  # nobody reads the results, so the graphs may share their memory
        graphs = []
        for tile in field:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                for i in range(calls):
                    self.run(tile, self.sets[i % len(self.sets)])
            graphs.append(graph)
        turns = [[between_events(graph.replay) / calls for graph in graphs] for _ in range(ROUNDS + 1)][1:]
        return [statistics.median(column) for column in zip(*turns, strict=True)]


def tune(op: str, arch: str, m: int, up_to: float, sets: list[Set], timed: bool) -> dict[str, Any]:
    """A record of the best tile; `row` in it is True where it should be written."""
    n, k = sets[0].w.shape
    problem = Problem(op, m, sets)
    field = list(candidates(op, arch, n, k, up_to))
    if not timed:
        field = field[:1] + field[1 :: max(1, len(field) // 6)]
    right = [tile for tile in field if problem.right(tile)]
    record = {"op": op, "arch": arch, "n": n, "k": k, "m": m, "tried": len(field), "right": len(right)}
    if not right:
        return record | {"row": False}
    if not timed:
        return record | {"row": True, "tile": right[-1]}
    took = dict(zip(right, problem.times(right), strict=True))
    best = min(took, key=lambda tile: took[tile])
    usual = took.get(field[0], math.inf)
    record |= {"us": took[best] * 1e6, "default_us": usual * 1e6 if usual < math.inf else None}
    return record | {"row": took[best] < (1 - MARGIN) * usual, "tile": best}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"), help="default: all of V3's")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M", help="one in each bucket to tune; default: all")
    parser.add_argument("--op", choices=list(tiles.DEFAULTS), action="append", help="default: all")
    parser.add_argument("--table", type=Path, help="default: the table that ops/gpu/tiles.py reads")
    parser.add_argument("--smoke", action="store_true", help="on a CPU, small and untimed; needs --table")
    parser.add_argument("--output", help="JSON file for the times")
    options = parser.parse_args()
    if options.smoke and options.table is None:
        parser.error("--smoke would overwrite the real table: name another with --table")
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        print("error: tuning needs a GPU, and torch sees none; --smoke does without", file=sys.stderr)
        return 2
    from ops.gpu.device import architecture, fp8_dtype

    device = torch.device("cpu") if options.smoke else torch.device("cuda", torch.cuda.current_device())
    arch = architecture(device)
    torch.manual_seed(0)
    path = options.table or tiles.TABLE
    cache = 0 if options.smoke else torch.cuda.get_device_properties(device).L2_cache_size
    shapes = options.shape or ([(100, 1056)] if options.smoke else SHAPES)
    tokens = options.tokens or ([5, 40] if options.smoke else tiles.BUCKETS)
    records = []
    try:
        table = tiles.read(path) if path.exists() else {}
        for n, k in shapes:
            fnuz = fp8_dtype(device) == torch.float8_e4m3fnuz
            sets = [Set(n, k, device, fnuz) for _ in range(max(2, math.ceil(4 * cache / (n * k))))]
            for up_to, op in product(dict.fromkeys(map(tiles.bucket, tokens)), options.op or tiles.DEFAULTS):
                if arch not in tiles.DEFAULTS[op] or (op == "w4a16_gemm" and k % GROUP):
                    continue
                record = tune(op, arch, int(min(up_to, MOST_TOKENS)), up_to, sets, timed=not options.smoke)
                key = (op, arch, n, k, up_to)
                table.pop(key, None)
                if record["row"]:
                    table[key] = record["tile"]
                tiles.write(path, table)  # after every step: what was measured is not lost
                times = (
                    f"{record['us']:.1f} µs, default {record['default_us'] or math.nan:.1f}" if "us" in record else ""
                )
                shown = f"{op} {n}x{k} M {record['m']}: {record['right']}/{record['tried']} right"
                print(f"{shown}, {record.get('tile', 'none')} {times}", flush=True)
                records.append(record | ({"tile": asdict(record["tile"])} if "tile" in record else {}))
        tiles.read(path)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    report.save(options.output, records)
    wrong = sum(record["right"] == 0 for record in records)
    print(json.dumps({"benchmark": "tune_gemm", "timed": not options.smoke, "rows": len(table), "none_right": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

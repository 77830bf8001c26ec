"""The tables of tiles that GEMMs compute with, dense and grouped, for every architecture; see tiles.py."""

import math
from dataclasses import dataclass, replace
from typing import Any

from core.config import BLOCK_SIZE

GROUP_M = 16
SM_COUNT = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304}
KIB = 1024
SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_89": 99 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}


@dataclass(frozen=True)
class Tile:
    """How a GEMM computes: the tile of the output, its operands' order, the warps and the pipeline's stages."""

    max_rows: float  # the largest M, or mean number of rows of an expert, that it is for
    block_m: int
    block_n: int
    swap: bool
    warps: int
    stages: int
    registers: int | None = None  # at most, per thread
    split: int = 1  # parts of K, each a program of its own; their sums are added up by a second kernel
    persistent: int = 0  # programs a multiprocessor runs, which read through TMA and go from tile to tile; 0: neither
    specialised: bool = False  # a persistent program's warps divide: some only read, the others only multiply

    def constexprs(self) -> dict[str, Any]:
        """The compile-time arguments of the kernel that the tile is for."""
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "GROUP_M": GROUP_M, "STAGES": self.stages}
        own = {"SPECIALISED": self.specialised} if self.persistent else {"SWAP": self.swap, "SPLIT": self.split > 1}
        return sizes | own

    def for_channels(self, k: int) -> "Tile":
        """With no more stages than serve K's blocks, which are then all under way before the first product (an expert
        split by its inner width has two blocks): one less than the stages is what the pipeline reads ahead."""
        return replace(self, stages=min(self.stages, math.ceil(k / BLOCK_SIZE) + 1))

    def __str__(self) -> str:
        marks = [f"{self.block_m}x{self.block_n}", f"{self.warps}w", f"{self.stages}s", "swap" * self.swap]
        marks += ["persistent" * bool(self.persistent), "specialised" * self.specialised]
        marks += [f"{self.registers}r" if self.registers else "", "split" * (self.split > 1)]
        return " ".join(filter(None, marks))

    def options(self) -> dict[str, int]:
        cap = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps} | cap

    def count(self, m: float, n: int) -> int:
        """How many of it an output (M, N) takes."""
        return math.ceil(m / self.block_m) * math.ceil(n / self.block_n)


# What limits a table: registers (255 a thread, 64 Ki a multiprocessor) and shared memory (SHARED_LIMIT).
# tests/test_compile.py holds every row to the limits and to its tensor-core instruction. `registers` stands where ptxas
# by itself would spill to fit in a program more than shared memory has room for.
#
# Few tokens. Each weight is read once, so all that counts is how many bytes are on their way. By Little's law 4.3 TB/s
# (an H200's copy) times a latency of about 1 µs under load is 4.3 MB, or 33 KB to each of 132 multiprocessors. A
# program of 64 channels has STAGES - 1 tiles of 8 KB under way: with 6 stages 41 KB, so one program to a multiprocessor
# is enough, given that every one has a program. Narrower tiles than 64 channels would leave the FP8 tensor core; where
# N gives fewer tiles than there are multiprocessors, K is split (`split_for`), so that 2112 x 7168, 33 tiles of 56
# blocks, becomes 132 programs of 14 blocks. 61 KB of shared memory lets three programs share a multiprocessor.
#
# Many tokens. A persistent program keeps reading ahead from one tile into the next, which pays when there are several
# tiles to a program (`default`). On Hopper `specialised` is one group of four warps that reads and two that multiply
# 64 x 128 each, so that one group's promotion to float32 runs beside the other's tensor-core product. That needs 128
# rows and 4 warps, which the compiler triples: with 64 rows it makes both groups compute the same, with 8 warps it
# ignores the request, and descriptors made by the host it cannot halve. On Blackwell 8 warps multiply beside 4.
W8A8 = {
    "sm_89": (
        Tile(32, 16, 64, False, 4, 4),
        Tile(math.inf, 64, 128, False, 4, 3),
    ),
    "sm_90": (
        Tile(16, 16, 64, True, 4, 6),
        Tile(32, 32, 64, True, 4, 6),
        Tile(256, 64, 64, False, 4, 4),
        Tile(512, 64, 128, False, 4, 3, registers=168),  # three programs to a multiprocessor
        Tile(math.inf, 128, 128, False, 4, 4, persistent=1, specialised=True),
    ),
    "sm_100": (
        Tile(16, 16, 64, True, 4, 6),
        Tile(32, 32, 64, True, 4, 5),
        Tile(256, 64, 64, False, 4, 4, registers=168),
        Tile(512, 128, 128, False, 8, 4),
        Tile(math.inf, 128, 128, False, 8, 4, persistent=1, specialised=True),
    ),
    "gfx942": (
        Tile(256, 32, 32, False, 4, 2),
        Tile(2048, 64, 64, False, 4, 2),
        Tile(math.inf, 64, 128, False, 4, 2),
    ),
}
W8A16 = {
    "sm_80": (
        Tile(16, 16, 64, False, 4, 5),
        Tile(64, 64, 64, False, 4, 4, registers=255),
        Tile(math.inf, 128, 128, False, 8, 3),
    ),
    "sm_89": (
        Tile(16, 16, 64, False, 4, 5),
        Tile(math.inf, 64, 64, False, 4, 4),
    ),
    "sm_90": (  # swapped throughout: the widened weights are then the operand that need not go back to shared memory
        Tile(16, 16, 64, True, 4, 5),
        Tile(32, 32, 64, True, 4, 4),
        Tile(64, 64, 64, True, 4, 4),
        Tile(math.inf, 128, 128, True, 8, 3),
    ),
    "sm_100": (
        Tile(16, 16, 64, True, 4, 5),
        Tile(64, 64, 64, True, 4, 4, registers=168),
        Tile(math.inf, 128, 128, True, 8, 3),
    ),
    "gfx942": (
        Tile(64, 16, 64, False, 4, 2),
        Tile(math.inf, 64, 64, False, 4, 2),
    ),
}
W4A16 = {  # of INT4, and of INT8 in groups of channels: a scale for each row takes registers
    "sm_80": (
        Tile(16, 16, 64, False, 4, 5),
        Tile(32, 32, 64, False, 4, 4, registers=255),
        Tile(math.inf, 64, 128, False, 8, 3),
    ),
    "sm_89": (
        Tile(16, 16, 64, False, 4, 5),
        Tile(32, 32, 64, False, 4, 4, registers=255),
        Tile(math.inf, 64, 128, False, 8, 3),
    ),
    "sm_90": (
        Tile(16, 16, 64, True, 4, 6),
        Tile(32, 32, 64, True, 4, 5),
        Tile(64, 64, 64, True, 4, 4),
        Tile(math.inf, 128, 64, True, 8, 4),
    ),
    "sm_100": (
        Tile(16, 16, 64, True, 4, 6),
        Tile(32, 32, 64, True, 4, 5, registers=168),
        Tile(64, 64, 64, True, 4, 4),
        Tile(math.inf, 128, 64, True, 8, 4),
    ),
    "gfx942": (
        Tile(64, 16, 64, False, 4, 2),
        Tile(math.inf, 64, 64, False, 4, 2),
    ),
}
DEFAULTS = {"fp8_gemm": W8A8, "w8a16_gemm": W8A16, "w4a16_gemm": W4A16}

# The tiles of the grouped GEMM are keyed on the mean number of rows an expert gets. Both products of a layer have the
# same block_m, since they share its table of row tiles.
GROUPED_W8A8 = {
    "sm_89": (
        Tile(32, 16, 64, False, 4, 4),
        Tile(math.inf, 64, 128, False, 4, 3),
    ),
    "sm_90": (
        Tile(12, 16, 64, True, 4, 6),
        Tile(32, 32, 64, True, 4, 6),
        Tile(96, 64, 128, False, 4, 3),
        Tile(math.inf, 128, 128, False, 4, 4, persistent=1, specialised=True),  # rows in the order of experts
    ),
    "sm_100": (
        Tile(12, 16, 64, True, 4, 6),
        Tile(32, 32, 64, True, 4, 5),
        Tile(96, 64, 128, False, 4, 4),
        Tile(math.inf, 128, 128, False, 8, 4, persistent=1, specialised=True),
    ),
    "gfx942": (
        Tile(64, 32, 32, False, 4, 2),
        Tile(math.inf, 64, 64, False, 4, 2),
    ),
}
GROUPED_W8A16 = {
    "sm_80": (
        Tile(12, 16, 64, False, 4, 5),
        Tile(math.inf, 64, 64, False, 4, 4),
    ),
    "sm_89": (
        Tile(12, 16, 64, False, 4, 5),
        Tile(math.inf, 64, 64, False, 4, 4),
    ),
    "sm_90": (
        Tile(12, 16, 64, True, 4, 5),
        Tile(32, 32, 64, True, 4, 4),
        Tile(math.inf, 64, 64, True, 4, 4),
    ),
    "sm_100": (
        Tile(12, 16, 64, True, 4, 5),
        Tile(32, 32, 64, True, 4, 4),
        Tile(math.inf, 64, 64, True, 4, 4),
    ),
    "gfx942": (
        Tile(12, 16, 64, False, 4, 2),
        Tile(math.inf, 64, 64, False, 4, 2),
    ),
}
GROUPED_W4A16 = {
    "sm_80": (
        Tile(12, 16, 64, False, 4, 5),
        Tile(32, 32, 64, False, 4, 4, registers=255),
        Tile(math.inf, 64, 128, False, 8, 3),
    ),
    "sm_89": (
        Tile(12, 16, 64, False, 4, 5, registers=168),
        Tile(32, 32, 64, False, 4, 4, registers=255),
        Tile(math.inf, 64, 128, False, 8, 3),
    ),
    "sm_90": (
        Tile(12, 16, 64, True, 4, 6),
        Tile(32, 32, 64, True, 4, 5),
        Tile(math.inf, 64, 64, True, 4, 4),
    ),
    "sm_100": (
        Tile(12, 16, 64, True, 4, 6),
        Tile(32, 32, 64, True, 4, 5, registers=168),
        Tile(math.inf, 64, 64, True, 4, 4),
    ),
    "gfx942": (
        Tile(12, 16, 64, False, 4, 2),
        Tile(math.inf, 64, 64, False, 4, 2),
    ),
}
GROUPED_PLAIN = {
    "sm_80": (
        Tile(12, 16, 64, False, 4, 4),
        Tile(math.inf, 64, 128, False, 4, 3),
    ),
    "sm_89": (
        Tile(12, 16, 64, False, 4, 4),
        Tile(math.inf, 64, 64, False, 4, 3),
    ),
    "sm_90": (
        Tile(12, 16, 64, True, 4, 5),
        Tile(32, 32, 64, True, 4, 5),
        Tile(math.inf, 64, 128, False, 4, 4),
    ),
    "sm_100": (
        Tile(12, 16, 64, True, 4, 5),
        Tile(32, 32, 64, True, 4, 5),
        Tile(math.inf, 64, 128, False, 4, 4),
    ),
    "gfx942": (
        Tile(12, 16, 64, False, 4, 2),
        Tile(math.inf, 64, 64, False, 4, 2),
    ),
}
GROUPED_FLOAT32 = (Tile(math.inf, 16, 32, False, 4, 2),)  # for comparisons, not for speed

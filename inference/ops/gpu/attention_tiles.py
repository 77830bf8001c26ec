"""How the attention kernels compute: a tile of scores, by architecture and number of rows."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionTile:
    """How a kernel computes: rows and keys of its tile of scores, warps and stages of the pipeline."""

    max_rows: float  # rows a sequence has at most: query tokens x heads for decode, query tokens for prefill
    rows: int
    keys: int
    warps: int
    stages: int
    swap: bool = False
    programs: int = 1  # that a multiprocessor runs side by side
    descriptor: bool = False  # the tensor memory accelerator copies, for decode whole pages
    by_group: bool = False  # decode multiplies FP8 latents by group of channels (decode_fp8.py)

    def constexprs(self) -> dict[str, Any]:
        return {"ROWS": self.rows, "KEYS": self.keys, "STAGES": self.stages}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps}


# Hopper's tensor core wants 64 rows in its first operand: with fewer rows the 64 keys come first. There whole pages are
# copied through a descriptor. Up to 32 rows one page and the queries take less than half of shared memory, and one
# program's copy goes on beside the other's products; with 64 rows the result fills the registers, and two stages the
# shared memory. FP8 latents of up to 32 rows are multiplied by group, up to 16 by two programs side by side; with more
# the rows come first, 32 keys at a time, which Triton widens in registers. Blackwell keeps two copies of a pipelined
# tile that is used twice, and has no room for them: one stage; with more than 16 rows (32 of FP8 latents) the result
# spills on its way through the registers.
# Batch-invariant, the last row serves, without a descriptor: what a key is added up with must not depend on where the
# sequence ends.
DECODE = {  # by architecture and whether latents are packed
    ("sm_80", False): (AttentionTile(16, 16, 32, 4, 2, programs=2), AttentionTile(math.inf, 32, 32, 4, 2, programs=2)),
    ("sm_80", True): (AttentionTile(math.inf, 16, 32, 8, 2),),
    ("sm_89", False): (AttentionTile(16, 16, 32, 4, 2), AttentionTile(math.inf, 32, 32, 4, 2)),
    ("sm_89", True): (AttentionTile(math.inf, 16, 32, 8, 2),),
    ("sm_90", False): (
        AttentionTile(16, 16, 64, 4, 1, True, programs=2, descriptor=True),
        AttentionTile(32, 32, 64, 4, 1, True, programs=2, descriptor=True),
        AttentionTile(math.inf, 64, 64, 8, 2, descriptor=True),
    ),
    ("sm_90", True): (
        AttentionTile(16, 16, 64, 4, 1, True, programs=2, by_group=True),
        AttentionTile(32, 32, 64, 8, 1, True, by_group=True),
        AttentionTile(math.inf, 64, 32, 8, 2),
    ),
    ("sm_100", False): (AttentionTile(math.inf, 16, 64, 8, 1, True),),
    ("sm_100", True): (AttentionTile(16, 16, 64, 8, 1, True), AttentionTile(math.inf, 32, 64, 8, 1, True)),
    ("gfx942", False): (AttentionTile(16, 16, 32, 4, 1), AttentionTile(math.inf, 32, 32, 4, 1)),
    ("gfx942", True): (AttentionTile(math.inf, 32, 16, 4, 1),),
}
# Heads wider than 128 (GigaChat3's values have 192, GLM-4.7-Flash's 256) fill tiles of 256, of which a thread's
# registers hold half as many rows.
PREFILL = {  # by architecture and whether a head's keys or values, without the rotary part, are wider than 128
    ("sm_80", False): (AttentionTile(math.inf, 64, 64, 4, 2),),
    ("sm_80", True): (AttentionTile(math.inf, 64, 32, 8, 2),),
    ("sm_89", False): (AttentionTile(math.inf, 64, 32, 4, 2),),
    ("sm_89", True): (AttentionTile(math.inf, 64, 32, 8, 2),),
    ("sm_90", False): (AttentionTile(math.inf, 128, 128, 8, 2, descriptor=True),),
    ("sm_90", True): (AttentionTile(math.inf, 64, 64, 8, 2, descriptor=True),),
    ("sm_100", False): (AttentionTile(math.inf, 128, 64, 8, 2),),
    ("sm_100", True): (AttentionTile(math.inf, 64, 64, 8, 2),),
    ("gfx942", False): (AttentionTile(math.inf, 64, 32, 4, 1),),
    ("gfx942", True): (AttentionTile(math.inf, 64, 32, 4, 1),),
}

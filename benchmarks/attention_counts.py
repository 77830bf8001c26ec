"""What the attention kernels take on an H100 or H200, found without one: instructions, registers and shared memory of
the compiled code (kind "compiled"), and how evenly decode's programs share pages (kind "simulated").

    python benchmarks/attention_counts.py --output benchmarks/results/attention_counts.json

A loop's instructions are counted in the machine code, as Triton's own nvdisasm prints it: between the first and the
last of the innermost loop that multiplies, for one warp and one tile of keys. Both versions of Triton that are served
go into one file: a run replaces its own version's rows and keeps the other's.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from lib import ROOT, report, sass

sys.path.append(str(ROOT / "tests"))
import triton

from ops.gpu import attention
from ops.gpu.attention_tiles import DECODE
from ops.gpu.tiles import SM_COUNT, tile_for
from support.compile_kernels import compile_  # type: ignore[import-not-found]
from support.kernel_configurations import Configuration, configurations  # type: ignore[import-not-found]

COUNTED = r"(decode sm_90 .*(16|128) heads|prefill sm_90 16 heads)"
CASES = {
    "34 x 4k": [4096] * 34,
    "48 x 4k": [4096] * 48,
    "128 x 4k": [4096] * 128,
    "64 of 1k to 8k": [1024 + 113 * i for i in range(64)],
    "1 x 128k": [131072],
}


def wanted(name: str) -> bool:
    return re.match(COUNTED, name) is not None


def counts(c: Configuration) -> dict[str, Any]:
    """One compiled kernel: `instructions` of its shortest loop, the one without masks where there are two."""
    keys = c.constexprs["KEYS" if "KEYS" in c.constexprs else "PAGE"]
    found = sass.counts(compile_(c))
    return {
        "kernel": c.name, "triton": triton.__version__, "rows": c.constexprs["ROWS"], "keys": keys,
        "warps": found["warps"], "instructions": next(n for n, multiplies in found["loops"] if multiplies),
        "registers": found["registers"], "stack": found["stack"], "shared": found["shared"],
        "programs_that_fit": found["fit"],
    }  # fmt: skip


def balance(lengths: list[int], page: int = 64) -> dict[str, Any]:
    """Pages of sequences of one token and 16 heads over what the busiest multiprocessor would let all read in its time:
    plan_runs_kernel's rule, which tests/ops/test_kernel_attention.py holds it to."""
    multiprocessors = SM_COUNT["sm_90"]
    programs = multiprocessors * tile_for(DECODE["sm_90", False], 16).programs
    pages = sum(-(-length // page) for length in lengths)
    each, longer = divmod(pages, programs)
    shares = [each + (run < longer) for run in range(programs)]
    busiest = max(sum(shares[i::multiprocessors]) for i in range(multiprocessors))
    return {"pages": pages, "programs": programs, "efficiency": pages / (multiprocessors * busiest)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    rows = [counts(c) for c in configurations(attention) if wanted(c.name)]
    simulated = [balance(lengths) | {"lengths": name} for name, lengths in CASES.items()]
    header = ["kernel", "instructions", "registers", "stack", "shared", "programs"]
    names = ["kernel", "instructions", "registers", "stack", "shared", "programs_that_fit"]
    print(report.table(header, [[str(row[name]) for name in names] for row in rows]), end="\n\n")
    print(report.table(["lengths", "efficiency"], [[str(r["lengths"]), f"{r['efficiency']:.2f}"] for r in simulated]))
    if options.output and Path(options.output).exists():
        known = json.loads(Path(options.output).read_text())["results"]["compiled"]
        rows = [row for row in known if row["triton"] != triton.__version__] + rows
    report.save(options.output, {"compiled": rows, "simulated": simulated}, kind="compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())

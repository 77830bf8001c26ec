"""Time and peak memory of check_checkpoint.py: headers alone at V3's size, and every byte of a smaller checkpoint.

    python benchmarks/check_speed.py --output benchmarks/results/check_speed.json

The first checkpoint has all of V3's 91,991 tensors in files of the released size, with real headers and, where the
weights would be, holes that take no disk. The second has V3's widths, and lies in the page cache: what is measured is
the program, not the disk. Neither has a tokenizer, which is the one fault that has to be found.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lib import INFERENCE, report
from lib.checkpoints import V3, write_holes, write_random
from lib.machine import measure_child

LIMIT = 2048  # MiB
WHOLE = V3 | {"num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 256}
SMALL = V3 | {"num_hidden_layers": 2, "vocab_size": 16384}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="the best of so many counts (default: 3)")
    parser.add_argument("--temp", help="where to put the data, which is removed afterwards")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.temp) as temp:
        for what, config, fill, flags in (
            ("headers alone, V3", WHOLE, write_holes, ["--quick"]),
            ("every byte", SMALL, write_random, []),
        ):
            folder = Path(temp, what)
            folder.mkdir()
            fill(folder, config)
            result = Path(temp, "result.json")
            turns = []
            for _ in range(options.turns):
                command = [sys.executable, str(INFERENCE / "check_checkpoint.py"), str(folder), "--json", *flags]
                with open(result, "w") as output:
                    turns.append(measure_child(command, output, status=1))
            told = json.loads(result.read_text())
            assert [finding["check"] for finding in told["findings"]] == ["tokenizer"], told["findings"]
            best = min(turns, key=lambda turn: turn["seconds"])
            rows.append({
                "what": what, "files": told["files"], "tensors": told["tensors"], "bytes": told["bytes"],
                "seconds": best["seconds"], "seconds_without_imports": told["seconds"],
                "gb_per_second": None if flags else round(told["bytes"] / 1e9 / told["seconds"], 2),
                "peak_mib": max(turn["peak_mib"] for turn in turns),
            })  # fmt: skip
    shown = ("what", "files", "tensors", "seconds", "seconds_without_imports", "gb_per_second", "peak_mib")
    print(report.table([n.replace("_", " ") for n in shown], [[str(row[n]) for n in shown] for row in rows]))
    report.save(options.output, rows)
    worst = max(row["peak_mib"] for row in rows)
    print(json.dumps({"benchmark": "check", "peak_mib": worst, "limit_mib": LIMIT, "within": worst <= LIMIT}))
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())

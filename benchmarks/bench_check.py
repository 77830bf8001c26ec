"""Time and peak memory of check_checkpoint.py: headers alone at V3's size, and every byte of a smaller checkpoint.

    python benchmarks/bench_check.py --output benchmarks/results/check.json

The first checkpoint has all of V3's 91,991 tensors in files of the released size, with real headers and, where the
weights would be, holes that take no disk. The second has V3's widths, and lies in the page cache: what is measured is
the program, not the disk. Neither has a tokenizer, which is the one fault that has to be found.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import report
from bench_convert import INFERENCE, SHARD, V3, make, measure  # puts inference/ on the path
from checkpoint.manifest import HF_INDEX
from checkpoint.table import expected_tensors
from checkpoint.writing import Writer
from core.config import ModelArgs

LIMIT = 2048  # MiB
WHOLE = V3 | {"num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 256}
SMALL = V3 | {"num_hidden_layers": 2, "vocab_size": 16384}


def make_holes(folder: Path, config: dict[str, Any]) -> None:
    """Writes the headers of a checkpoint, and nothing else, into files of full length."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    room = SHARD
    for spec in expected_tensors(ModelArgs.from_hf(config), quantised=True).values():
        nbytes = torch.Size(spec.shape).numel() * spec.dtype.itemsize
        if nbytes > room:
            shards.append({})
            room = SHARD
        shards[-1][spec.hf] = spec.dtype, spec.shape
        room -= nbytes
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards):
        file = folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file.name)
        writer = Writer(file, tensors, {"format": "pt"})
        file.write_bytes(writer.header)
        os.truncate(file, writer.size)
    (folder / HF_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="the best of so many counts (default: 3)")
    parser.add_argument("--temp", help="where to put the data, which is removed afterwards")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.temp) as temp:
        for what, config, fill, flags in (
            ("headers alone, V3", WHOLE, make_holes, ["--quick"]),
            ("every byte", SMALL, make, []),
        ):
            folder = Path(temp, what)
            folder.mkdir()
            fill(folder, config)
            result = Path(temp, "result.json")
            turns = []
            for _ in range(options.turns):
                command = [sys.executable, str(INFERENCE / "check_checkpoint.py"), str(folder), "--json", *flags]
                with open(result, "w") as output:
                    turns.append(measure(command, output, status=1))
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

"""Time and peak memory of convert.py, fp8_cast_bf16.py and quantize.py on a random FP8 checkpoint of more than 6 GB.

    python benchmarks/convert_memory.py --output benchmarks/results/convert_memory.json

The checkpoint has the released V3's widths, vocabulary and MTP module, with fewer layers and experts. Each command runs
in a process of its own, whose /proc/PID/status is read every 10 ms: VmHWM is its peak memory, mapped file pages
included, RssAnon the anonymous part. quantize.py makes INT4 of that checkpoint, and FP8 of what the cast made of it.
Needs about four times the checkpoint's size of disk.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors  # noqa: F401 (its version belongs to the record)

from lib import INFERENCE, report
from lib.checkpoints import V3, write_random
from lib.machine import measure_child

LIMIT = 6144  # MiB, what a conversion may take


def quantizing(source: Path, target: Path, form: str) -> list[Any]:
    return ["quantize.py", "--hf-ckpt-path", source, "--save-path", target, "--format", form, "--device", "cpu"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--layers", type=int, default=V3["num_hidden_layers"], help="layers of the checkpoint")
    parser.add_argument("--temp", help="where to put the data, which is removed afterwards")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    config = V3 | {"num_hidden_layers": options.layers}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.temp) as temp:
        source, plain, target = (Path(temp, name) for name in ("source", "plain", "target"))
        source.mkdir()
        nbytes = write_random(source, config)
        print(f"checkpoint of {nbytes / 1e9:.2f} GB, {options.layers} layers, {config['n_routed_experts']} experts\n")
        # what is read, what is written, the command
        commands: dict[str, tuple[Path, Path, list[Any]]] = {
            f"convert for {n}": (source, target, ["convert.py", "--hf-ckpt-path", source, "--save-path", target,
                                                  "--model-parallel", n])
            for n in options.ranks
        }  # fmt: skip
        commands["quantize to int4 on the CPU"] = source, target, quantizing(source, target, "int4")
        commands["cast to bf16 on the CPU"] = source, plain, [
            "fp8_cast_bf16.py", "--input-fp8-hf-path", source, "--output-bf16-hf-path", plain, "--device", "cpu",
        ]  # fmt: skip
        commands["quantize to fp8 on the CPU"] = plain, target, quantizing(plain, target, "fp8")
        for name, (read, made, (script, *flags)) in commands.items():
            nbytes = sum(path.stat().st_size for path in read.glob("*.safetensors"))
            figures = measure_child([sys.executable, *map(str, (INFERENCE / script, *flags))])
            written = [path.stat().st_size for path in made.glob("*.safetensors")]
            speed = round(nbytes / 1e6 / figures["seconds"])
            rows.append({"what": name, "bytes_read": nbytes} | figures | {
                "mb_read_per_second": speed, "files": len(written), "bytes_written": sum(written),
                "largest_file_bytes": max(written),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(target, ignore_errors=True)
    shown = ("what", "seconds", "mb_read_per_second", "peak_mib", "peak_anonymous_mib", "files", "largest_file_bytes")
    print(
        report.table([name.replace("_", " ") for name in shown], [[str(row[name]) for name in shown] for row in rows])
    )
    report.save(options.output, rows)
    worst = max(row["peak_mib"] for row in rows)
    print(json.dumps({"benchmark": "convert", "peak_mib": worst, "limit_mib": LIMIT, "within": worst <= LIMIT}))
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())

"""Every benchmark that this machine can run, one after another; results as JSON in benchmarks/results/.

    python benchmarks/bench.py                 # all
    python benchmarks/bench.py cpu convert     # some of: cpu, kernel-cpu, serve, convert, demo, mtp; on a GPU
                                               # kernel-dense, kernel-moe, kernel-fused, kernel-router, kernel-decode,
                                               # kernel-prefill, rank-slice, model-v2-lite, model-moonlight

`python benchmarks/tables.py` then brings the figures into the documents.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
COMMANDS: dict[str, list[Path | str]] = {
    "cpu": [HERE / "bench_cpu.py", "--output", RESULTS / "cpu.json"],
    "kernel-cpu": [HERE / "bench_kernel_cpu.py", "--output", RESULTS / "kernel_cpu.json"],
    "serve": [HERE / "bench_serve.py", "--output", RESULTS / "serve.json"],
    "server": [HERE / "bench_server.py", "--output", RESULTS / "server.json"],
    "check": [HERE / "bench_check.py", "--output", RESULTS / "check.json"],
    "convert": [HERE / "bench_convert.py", "--output", RESULTS / "convert.json"],
    "demo": [HERE.parent / "demo" / "evaluate.py", "--output", RESULTS / "demo.json"],
    "mtp": [HERE / "bench_mtp.py", "--output", RESULTS / "mtp.json"],
}
ON_A_GPU: dict[str, list[Path | str]] = {
    **{f"kernel-{name}": [HERE / "bench_kernel.py", name, "--output", RESULTS / f"kernel_{name}.json"]
       for name in ("dense", "moe", "fused", "router", "decode", "prefill")},
    "rank-slice": [HERE / "bench_rank_slice.py", "--profile", "--output", RESULTS / "rank_slice.json"],
    "model-v2-lite": [HERE / "bench_model.py", "v2-lite", "--output", RESULTS / "model_v2_lite.json"],
    "model-moonlight": [HERE / "bench_model.py", "moonlight", "--output", RESULTS / "model_moonlight.json"],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help="which (default: all that run here)")
    args = parser.parse_args()
    commands = COMMANDS | ON_A_GPU
    unknown = [name for name in args.names if name not in commands]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r} (there are {', '.join(commands)})")
    import torch

    names = args.names or [*COMMANDS, *(ON_A_GPU if torch.cuda.is_available() else [])]
    worst = 0
    for name in names:
        print(f"--- {name}", flush=True)
        worst = max(worst, subprocess.run([sys.executable, *map(str, commands[name])]).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())

"""Every benchmark that this machine can run, one after another; results as JSON in benchmarks/results/.

    python benchmarks/bench.py                       # all that this machine can run
    python benchmarks/bench.py cpu convert-memory    # some of: cpu, compiled-reference, kernel-cpu, kernel-cpu-clang,
                                                     # offline-throughput, online-serving,
                                                     # check-speed, convert-memory, quantised-memory, demo,
                                                     # draft-acceptance, lane-throughput, scale-out, overlap, page-time,
                                                     # format-masks;
                                                     # on a GPU
                                                     # kernel-dense, kernel-moe, kernel-fused, kernel-router,
                                                     # kernel-decode, kernel-prefill, kernel-sample, rank-step,
                                                     # model-v2-lite, model-moonlight

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
    "compiled-reference": [HERE / "bench_cpu.py", "--compiled", "--output", RESULTS / "compiled_reference.json"],
    "kernel-cpu-clang": [HERE / "kernel_cpu.py", "--clang", "--output", RESULTS / "kernel_cpu_clang.json"],
    "kernel-cpu": [HERE / "kernel_cpu.py", "--output", RESULTS / "kernel_cpu.json"],
    "offline-throughput": [HERE / "offline_throughput.py", "--output", RESULTS / "offline_throughput.json"],
    "online-serving": [HERE / "online_serving.py", "--output", RESULTS / "online_serving.json"],
    "check-speed": [HERE / "check_speed.py", "--output", RESULTS / "check_speed.json"],
    "convert-memory": [HERE / "convert_memory.py", "--output", RESULTS / "convert_memory.json"],
    "quantised-memory": [HERE / "quantised_memory.py", "--output", RESULTS / "quantised_memory.json"],
    "demo": [HERE.parent / "demo" / "evaluate.py", "--output", RESULTS / "demo.json"],
    "lane-throughput": [HERE / "lane_throughput.py", "--output", RESULTS / "lane_throughput.json"],
    "host-step": [HERE / "host_step.py", "--output", RESULTS / "host_step.json"],
    "scale-out": [HERE / "scale_out.py", "--output", RESULTS / "scale_out.json"],
    "overlap": [HERE / "scale_out.py", "--overlap", "--output", RESULTS / "overlap.json"],
    "attention-counts": [HERE / "attention_counts.py", "--output", RESULTS / "attention_counts.json"],
    "step-model": [HERE / "step_model.py", "--output", RESULTS / "step_model.json"],
    "draft-acceptance": [HERE / "draft_acceptance.py", "--output", RESULTS / "draft_acceptance.json"],
    "format-masks": [HERE / "format_masks.py", "--output", RESULTS / "format_masks.json"],
    "page-time": [HERE / "page_time.py", "--output", RESULTS / "page_time.json"],
}
ON_A_GPU: dict[str, list[Path | str]] = {
    **{f"kernel-{name}": [HERE / "kernel_gpu.py", name, "--output", RESULTS / f"kernel_{name}.json"]
       for name in ("dense", "moe", "fused", "router", "decode", "prefill", "sample")},
    "rank-step": [HERE / "rank_step.py", "--profile", "--output", RESULTS / "rank_step.json"],
    "model-v2-lite": [HERE / "model_gpu.py", "v2-lite", "--output", RESULTS / "model_v2_lite.json"],
    "model-moonlight": [HERE / "model_gpu.py", "moonlight", "--output", RESULTS / "model_moonlight.json"],
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

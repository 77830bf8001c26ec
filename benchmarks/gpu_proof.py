"""Nine minutes on one H200 that say whether what was computed, compiled and predicted without one holds.

    python benchmarks/gpu_proof.py --output build/gpu-proof         on a GPU; correctness first
    python benchmarks/gpu_proof.py --dry --output build/gpu-proof   here: every step, without one

Each step is a process under its own limit (`timeout -k 5`), and what it said is in proof.json as soon as it ends; a
bench's own results are a file beside it. Nothing is installed or fetched. Where a test gives wrong results the races
are left out: they would time wrong kernels. A dry run starts every step's own command on the CPU: benches with --smoke,
tests collected instead of run, the compiler for one kernel in a hundred.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from lib import report

ROOT = Path(__file__).parents[1]
SECONDS = 540  # of all steps together
MOST_FILES = 8


class Step(NamedTuple):
    """One process: its limit, its command, what a dry run has in place of its last words; whether it only times."""

    name: str
    limit: int  # seconds
    command: list[str]
    dry: list[str]
    races: bool = False


def steps(folder: Path, jobs: int) -> list[Step]:
    """In the order of what matters: what fails early makes the rest pointless."""
    here = str(Path(__file__).resolve())
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "40"]
    parallel = [*tests, "-n", str(jobs)]
    kernels = [f"tests/ops/test_kernel{name}.py" for name in ("", "_fused", "_moe", "_attention", "_sample")]
    kernels += ["tests/ops/test_casts.py"]
    warm = [sys.executable, "tests/support/compile_kernels.py", "--warm", str(jobs + 2), "sm_90"]

    def bench(script: str, name: str, *arguments: str) -> list[str]:
        return [sys.executable, f"benchmarks/{script}.py", *arguments, "--output", str(folder / f"{name}.json")]

    smoke, collected = ["--smoke"], ["--collect-only"]
    slice_ = ("--contexts", "4096", "--rounds", "5", "--profile", "--v3-gemm")
    return [
        Step("ceilings", 10, [sys.executable, here, "--ceilings"], ["--dry"]),
        Step("warm", 35, warm, ["--every", "100"]),
        Step("kernels", 90, [*parallel, "-k", "not persistent", *kernels], collected),
        Step("persistent", 25, [*tests, "-k", "persistent", "tests/ops/test_kernel.py"], collected),
        Step("engine", 40, [*tests, "tests/engine/test_on_gpu.py"], collected),
        Step("slice", 120, bench("rank_step", "slice", "--budget", "100", *slice_), smoke),
        Step("decode", 45, bench("kernel_gpu", "decode", "decode", "--budget", "35", "--quick"), smoke, True),
        Step("dense", 40, bench("kernel_gpu", "dense", "dense", "--budget", "30", "--quick"), smoke, True),
        Step("moe", 30, bench("kernel_gpu", "moe", "moe", "--budget", "22", "--quick"), smoke, True),
        Step("prefill", 25, bench("kernel_gpu", "prefill", "prefill", "--budget", "18", "--quick"), smoke, True),
        Step("sample", 15, bench("kernel_gpu", "sample", "sample", "--budget", "10", "--quick"), smoke, True),
        Step("v3", 45, bench("rank_step", "v3", "--budget", "5", "--contexts", "4096", "--batches", "1",
                             "--prefill", "4096", "--rounds", "3", "--v3-gemm", "bf16"), smoke, True),
    ]  # fmt: skip


def ceilings(dry: bool) -> dict[str, Any]:
    """What the machine is, its copy, and the fastest products that its libraries make."""
    import torch
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    if dry:
        return found | {"gpu": None}
    from lib.timing import between_events, copy_bandwidth

    device = torch.device("cuda", 0)
    found |= {"gpu": torch.cuda.get_device_name(device), "copy_gb_per_s": copy_bandwidth(device) / 1e9}
    a = torch.randn(8192, 8192, device=device).bfloat16()
    for name in ("bf16", "fp8"):
        one = torch.ones((), device=device)
        x = a.to(torch.float8_e4m3fn) if name == "fp8" else a

        def product(x: torch.Tensor = x, one: torch.Tensor = one, fp8: bool = name == "fp8") -> None:
            torch._scaled_mm(x, x.T, one, one, out_dtype=torch.bfloat16) if fp8 else torch.mm(x, x.T)

        product()
        found[f"{name}_tflops"] = 2 * 8192**3 / min(between_events(product) for _ in range(10)) / 1e12
    return found


def run(step: Step, dry: bool, seconds: float) -> dict[str, Any]:
    """A step's end: status, seconds, and its last words; those that are JSON as they are."""
    command = ["timeout", "-k", "5", f"{seconds:.0f}", *step.command, *(step.dry if dry else [])]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if not dry:
        environment.pop("TRITON_INTERPRET", None)
    began = time.perf_counter()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, **pipes)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    found: dict[str, Any] = {"status": done.returncode, "seconds": round(time.perf_counter() - began, 1)}
    found |= {"timed_out": done.returncode in (124, 137), "limit": step.limit, "said": lines[-8:]}
    if lines and lines[-1].startswith("{"):
        found["result"] = json.loads(lines[-1])
    return found


def prove(folder: Path, dry: bool, jobs: int, only: list[str]) -> int:
    """Runs the steps that the time allows; 0 if none of them failed."""
    folder.mkdir(parents=True, exist_ok=True)
    began, wrong = time.perf_counter(), False
    found: dict[str, dict[str, Any]] = {}
    for step in steps(folder, jobs):
        if only and step.name not in only:
            continue
        left = SECONDS - (time.perf_counter() - began)
        if wrong and step.races:
            found[step.name] = {"skipped": "the kernels are wrong: rerun the failing test under compute-sanitizer"}
        elif left < 10 and not dry:
            found[step.name] = {"skipped": "the time was over"}
        else:
            found[step.name] = run(step, dry, max(step.limit, 240) if dry else min(step.limit, left))
            wrong = wrong or (step.name in ("kernels", "persistent") and found[step.name]["status"] != 0)
        shown = {key: found[step.name].get(key) for key in ("status", "seconds", "result", "skipped")}
        print(step.name, shown, flush=True)
        record = {"steps": found, "dry": dry}
        report.save(str(folder / "proof.json"), record, "python benchmarks/gpu_proof.py" + " --dry" * dry)
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) <= MOST_FILES, files
    return int(any(one.get("status", 0) != 0 for one in found.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="without a GPU")
    parser.add_argument("--ceilings", action="store_true", help="the first step alone")
    parser.add_argument("--jobs", type=int, default=12, help="processes of tests at a time")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-proof", metavar="FOLDER")
    options = parser.parse_args()
    if options.ceilings:
        print(json.dumps(ceilings(options.dry)))
        return 0
    if shutil.which("timeout") is None:
        print("error: gpu-proof needs the command timeout, of coreutils", file=sys.stderr)
        return 2
    return prove(options.output.resolve(), options.dry, options.jobs, options.only)


if __name__ == "__main__":
    sys.exit(main())

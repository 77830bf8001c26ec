"""What the host does in a step that decodes: Python's milliseconds, beside a GPU that takes no time.

    python benchmarks/host_step.py --output benchmarks/results/host_step.json
    python benchmarks/host_step.py --smoke                                       # few steps, times mean nothing

The engine schedules, packs, replays, samples and commits as on a GPU, for a small model with tables for contexts
of --context tokens. A replay returns at once, as a graph's launch does; what it would have computed is what its buffers
hold. Tensors are the CPU's, which computes what a GPU would be given: the vocabulary is cut to 256, to keep that small.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lib import CONFIGS, report
from lib.weights import fill

from core.config import load_config
from core.numerics import Numerics
from core.run_config import PAGE_SIZE, RunConfig
from core.sampling_params import SamplingParams
from engine.engine import Engine
from model import Transformer

WAYS = {"greedy": {"temperature": 0.0}, "temperature, top-p": {"temperature": 0.7, "top_p": 0.95}}


def no_gpu(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Stands in for a capture: what is replayed takes no time."""
    result = run()
    return lambda: result


def engine_of(b: int, context: int, mtp: int) -> Engine:
    args = replace(load_config(CONFIGS / "config_demo.json"), max_seq_len=context, vocab_size=256)
    torch.manual_seed(0)
    model = Transformer(args, Numerics(torch.float32))
    fill(model)
    n_pages = -(-context // PAGE_SIZE) + 1 + b * 8
    run = RunConfig(
        n_pages=n_pages, max_model_len=context, max_num_seqs=b, mtp=mtp, prefix_reuse=True, max_num_batched_tokens=1024
    )  # fmt: skip
    return Engine(model.prepare(), None, run, capture=no_gpu)


def timed_steps(engine: Engine, b: int, steps: int, sampling: dict[str, float]) -> list[float]:
    """Milliseconds of each step in which b sequences decode."""
    params = SamplingParams(max_new_tokens=steps + 8, ignore_eos=True, seed=1, **sampling)  # type: ignore[arg-type]
    requests = [engine.add([1 + i % 200] * (30 + i % 30), params) for i in range(b)]
    while not all(request.tokens for request in requests):
        engine.step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        times.append(1e3 * (time.perf_counter() - began))
    while engine.busy:
        engine.step()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=163_840, help="the longest sequence, in tokens")
    parser.add_argument("--mtp", type=int, nargs="+", default=[0, 1], help="drafts")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for b in options.batches:
        for mtp in options.mtp:
            for name, sampling in WAYS.items():
                engine = engine_of(b, options.context, mtp)
                times = timed_steps(engine, b, 5 if options.smoke else options.steps, sampling)
                rows.append({
                    "b": b, "mtp": mtp, "sampling": name, "ms": statistics.median(times), "best_ms": min(times),
                    "worst_ms": max(times), "steps": len(times),
                })  # fmt: skip
                text = "B={b:<4} mtp {mtp}  {sampling:20} median {ms:.3f} ms, best {best_ms:.3f}, worst {worst_ms:.3f}"
                print(text.format(**rows[-1]), flush=True)
                engine.close()
    if options.output and not options.smoke:
        command = f"python benchmarks/host_step.py --context {options.context}"
        report.save(options.output, {"rows": rows, "context": options.context, "page": PAGE_SIZE}, command, "measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())

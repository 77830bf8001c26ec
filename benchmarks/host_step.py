"""What the host does in a step that decodes: Python's milliseconds, beside a GPU that takes no time.

    python benchmarks/host_step.py --output benchmarks/results/host_step.json
    python benchmarks/host_step.py --smoke                                       # few steps, times mean nothing

The engine schedules, packs, replays, samples and commits as on a GPU, for a small model with tables for contexts
of --context tokens. A replay returns at once, as a graph's launch does; what it would have computed is what its buffers
hold. Sampling launches its kernel by Triton's own path, up to a driver that does nothing (the tests' stub_driver.py);
with temperature all tokens are 1, and every draft is accepted. Tensors are the CPU's, with a vocabulary of 256, and
their copies stand for those to and from a GPU. What CUDA itself takes for a launch or a copy is left out.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lib import CONFIGS, ROOT, report
from lib.weights import fill

from core.config import load_config
from core.numerics import Numerics
from core.run_config import PAGE_SIZE, RunConfig
from core.sampling_params import SamplingParams
from engine.engine import Engine
from model import Transformer
from ops.distributions import SamplingMetadata
from ops.gpu import sample
from ops.reference_backend import ReferenceBackend

sys.path.append(str(ROOT / "tests"))
from support import stub_driver  # type: ignore[import-not-found]

WAYS = {"greedy": {"temperature": 0.0}, "temperature, top-p": {"temperature": 0.7, "top_p": 0.95}}


class Launching(ReferenceBackend):
    """Sampling as on a GPU, but for the kernel."""

    def sample(
        self, logits: torch.Tensor, choice: torch.Tensor, metadata: SamplingMetadata, keep: bool = False
    ) -> tuple[torch.Tensor, Sequence[Any]]:
        found, kept = sample.sample(logits, choice, metadata, keep)
        return found.fill_(1), kept  # finite, accepted, token 1


def no_gpu(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Stands in for a capture: what is replayed takes no time."""
    result = run()
    return lambda: result


def engine_of(b: int, context: int, mtp: int) -> Engine:
    args = replace(load_config(CONFIGS / "config_demo.json"), max_seq_len=context, vocab_size=256)
    torch.manual_seed(0)
    model = Transformer(args, Numerics(torch.float32), backend=Launching())
    fill(model)
    n_pages = -(-context // PAGE_SIZE) + 1 + b * 8
    run = RunConfig(
        n_pages=n_pages, max_model_len=context, max_num_seqs=b, mtp=mtp, prefix_reuse=True, max_num_batched_tokens=1024
    )  # fmt: skip
    return Engine(model.prepare(), None, run, capture=no_gpu)


def timed_steps(engine: Engine, b: int, steps: int, sampling: dict[str, float]) -> list[float]:
    """Milliseconds of each step in which b sequences decode."""
    most = (steps + 4) * (1 + engine.mtp)
    params = SamplingParams(max_new_tokens=most, ignore_eos=True, seed=1, **sampling)  # type: ignore[arg-type]
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
                with stub_driver.installed(notes=False):
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

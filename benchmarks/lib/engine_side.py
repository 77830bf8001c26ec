"""This engine as one side of `bench_cpu.py --forms`, in a process of its own, so that its memory is its own: started by
lib.forms, never by hand.

    python benchmarks/lib/engine_side.py CHECKPOINT

A request is a line of JSON on stdin, the answer a line on stdout: `load`, then `run`, `reads` and `memory`.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))
from lib.timing import reason

from checkpoint.directory import Checkpoint, choose_args
from checkpoint.load import load_into
from core.run_config import PAGE_SIZE, RunConfig
from engine import rank_memory, recorded_steps, setup
from engine.choose_numerics import choose_numerics
from engine.runner import ModelRunner
from model import Transformer
from ops.cpu.captured_calls import Scratch


class Side:
    def __init__(self, path: str):
        self.path = path

    def load(self, room: int, threads: int) -> dict[str, Any]:
        """With latents for `room` tokens. The answer says how the engine chose to compute, and what it counts."""
        torch.set_num_threads(threads)
        began = time.perf_counter()
        checkpoint = Checkpoint(self.path)
        args = choose_args(checkpoint, None)
        run = RunConfig()
        device = torch.device("cpu")
        num, says = choose_numerics(args, device, run.dtype, run.gemm, specs=checkpoint.expected(args))
        self.model = Transformer(args, num, mtp=False)
        load_into(self.model, checkpoint, progress=False)
        self.model.prepare()
        seconds = time.perf_counter() - began
        self.rank = setup.rank_of(self.model)
        self.step = run.max_num_batched_tokens
        run = replace(run, max_model_len=room, n_pages=-(-room // PAGE_SIZE))
        recorded = recorded_steps.records(self.rank, run)
        scratch = Scratch(recorded_steps.scratch_bytes(self.rank, run)) if recorded else None
        self.runner = ModelRunner(self.model, run, None, False, scratch)
        self.tokens = torch.Generator().manual_seed(1)
        return {
            "load_s": seconds, "numerics": says,
            "parameters": rank_memory.parameters(self.rank),
            "weight_bytes": sum(rank_memory.weight_bytes(self.rank).values()),
        }  # fmt: skip

    def reads(self, sequences: int, context: int) -> dict[str, Any]:
        """Bytes that a decode step reads."""
        return rank_memory.decode_reads(self.rank, sequences, context)._asdict()

    @torch.inference_mode()
    def run(self, sequences: int, prompt: int, new: int) -> dict[str, float]:
        """Seconds for prompts of so many random tokens, as many at a time as the engine takes by default, and for so
        many steps after them, each with logits and the greedy token."""
        vocab = self.model.args.vocab_size
        ids = torch.randint(vocab, (sequences, prompt + new), generator=self.tokens).tolist()
        per = -(-(prompt + new) // PAGE_SIZE)
        pages = [list(range(i * per, (i + 1) * per)) for i in range(sequences)]
        some = max(self.step // sequences, 1)

        def forward(first: int, last: int) -> None:
            step = self.runner.run([(ids[i][first:last], first, pages[i]) for i in range(sequences)])
            assert step is not None
            if last >= prompt:
                ends = range(last - first - 1, sequences * (last - first), last - first)
                step.scores(ends, self.runner.logits).read()

        began = time.perf_counter()
        for first in range(0, prompt, some):
            forward(first, min(first + some, prompt))
        filled = time.perf_counter()
        for i in range(new):
            forward(prompt + i, prompt + i + 1)
        return {"prefill": filled - began, "decode": time.perf_counter() - filled}

    def memory(self) -> dict[str, int]:
        """MiB: the most so far, mapped pages of files included, and what is anonymous now."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {key: int(status[name].split()[0]) // 1024
                for key, name in (("peak_mib", "VmHWM"), ("anonymous_mib", "RssAnon"))}  # fmt: skip


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr
    side = Side(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(side, request.pop("do"))(**request)
        except Exception as e:
            answer = {"refused": reason(e)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

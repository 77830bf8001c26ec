"""Is one revision of this project slower than another? Both run side by side, in turns, through their public doors.

    python benchmarks/revisions.py f7d20d2 HEAD --output benchmarks/results/revisions.json
    python benchmarks/revisions.py f7d20d2 HEAD --checkpoint DIR       # also bench_cpu.py's columns, on its checkpoint

Each revision is unpacked from git and answers from processes of its own, which stay alive and wait while the other
works. Measured are the start of `generate.py --help`, the demo's first token from the start of `generate.py`, the load
of the demo that offline_throughput.py has, and with --checkpoint (bench_cpu.py keeps its own with that flag) prefill
and decoding of random prompts through the engine, without prefix reuse. A figure is the best of a side's turns; a ratio
is the median of the turns' ratios, above 1 where the second revision is faster.
"""

import argparse
import io
import json
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lib import ROOT, report
from lib.timing import take_turns, timed

DEMO = ROOT / "demo" / "checkpoint"
# Name, sequences, tokens of a prompt, tokens of an answer; with one token the prompt is timed, with more all after it.
CASES = (
    ("prefill 512", 1, 512, 1), ("decode, 1 sequence", 1, 512, 17), ("decode, 8 sequences", 8, 64, 9),
    ("prefill 4096", 1, 4096, 1), ("decode at 4096 context", 1, 4096, 9),
)  # fmt: skip


def work(root: Path, checkpoint: str, threads: int, longest: int) -> None:
    """In a process of a revision: an engine, and a case for each line of JSON on stdin, its seconds on stdout."""
    sys.path[:0] = [str(root / "inference"), str(root / "demo")]
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch

    from engine import Engine, SamplingParams  # this revision's

    torch.set_num_threads(threads)
    limits: dict[str, Any] = {"max_model_len": longest, "max_num_seqs": 16}
    try:
        engine: Any = Engine.from_pretrained(checkpoint, device="cpu", **limits, prefix_reuse=False)
    except TypeError:  # as it was called before
        engine = Engine.from_pretrained(checkpoint, device="cpu", **limits, reuse=False)
    vocabulary = engine.model.args.vocab_size
    for line in sys.stdin:
        case = json.loads(line)
        draw = random.Random(case["seed"])
        if "messages" in case:
            prompts, new = case["messages"], 300
        else:
            prompts = [[draw.randrange(vocabulary) for _ in range(case["prompt"])] for _ in range(case["sequences"])]
            new = case["new"]
        params = SamplingParams(temperature=0, max_new_tokens=new, ignore_eos="messages" not in case)
        began = time.perf_counter()
        requests = [engine.add(prompt, params, i) for i, prompt in enumerate(prompts)]
        assert not any(r.error for r in requests), requests[0].error
        if new > 1 and "messages" not in case:
            while not all(r.tokens for r in requests):
                engine.step()
            began = time.perf_counter()
        while engine.busy:
            engine.step()
        print(json.dumps(time.perf_counter() - began), file=answers, flush=True)


def unpack(revision: str, folder: Path) -> Path:
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


class Side:
    def __init__(self, root: Path, checkpoint: Path, threads: int, longest: int, stack: ExitStack):
        command = [sys.executable, __file__, "--worker", str(root), str(checkpoint), str(threads), str(longest)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = stack.enter_context(process)
        stack.callback(process.kill)

    def seconds(self, **case: Any) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))


def demo_questions(n: int) -> list[Any]:
    """Those of offline_throughput.py."""
    from evaluate import KINDS, held_out  # type: ignore[import-not-found]

    kinds = [kind for kind in KINDS if kind != "long_lookup"]
    asked = [c for kind in kinds for c in held_out(kind, -(-n // len(kinds)), seed=3)]
    random.Random(0).shuffle(asked)
    return [c.messages() for c in asked[:n]]


def compare(name: str, sides: dict[str, Callable[[], float]], turns: int) -> dict[str, Any]:
    for side in sides.values():  # a process's first is slow
        side()
    seconds, ratios = take_turns(sides, turns)
    first, second = seconds
    ratio = 1 / statistics.median(ratios[second])
    print(f"{name:26} {min(seconds[first]):8.3f} s {min(seconds[second]):8.3f} s   {ratio:.3f} ×", flush=True)
    return {
        "name": name,
        "turns": turns,
        "seconds": {side: min(taken) for side, taken in seconds.items()},
        "ratio": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("revisions", nargs=2, metavar="REV", help="before and after")
    parser.add_argument("--checkpoint", type=Path, help="bench_cpu.py's random one, for prefill and decoding")
    parser.add_argument("--requests", type=int, default=200, help="of the demo's load (default: 200)")
    parser.add_argument("--longest", type=int, default=4096, help="leave longer random prompts out (default: 4096)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="JSON file for the results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        roots = {revision: unpack(revision, folder / f"{i}") for i, revision in enumerate(args.revisions)}
        (folder / "prompts.txt").write_text("What is 347 + 285?\n")

        def start(*flags: object) -> dict[str, Callable[[], float]]:
            def once(root: Path) -> Callable[[], object]:
                command = [sys.executable, root / "inference" / "generate.py", *flags]
                return lambda: subprocess.run([*map(str, command)], capture_output=True, check=True)

            return {revision: timed(once(root)) for revision, root in roots.items()}

        rows.append(compare("generate.py --help", start("--help"), args.turns))
        one = ("--ckpt-path", DEMO, "--input-file", folder / "prompts.txt", "--max-new-tokens", 1, "--device", "cpu")
        rows.append(compare("the demo's first token", start(*one, "--threads", args.threads), args.turns))

        loaded = {revision: Side(root, DEMO, args.threads, 2560, stack) for revision, root in roots.items()}
        questions = demo_questions(args.requests)

        def ask(side: Side) -> Callable[[], float]:
            return lambda: side.seconds(messages=questions, seed=0)

        rows.append(compare("the demo's load", {r: ask(side) for r, side in loaded.items()}, args.turns))
        if args.checkpoint:
            whole = folder / "checkpoint"  # with a tokenizer, which an engine asks for; it is not used
            whole.mkdir()
            for path in args.checkpoint.resolve().iterdir():
                (whole / path.name).symlink_to(path)
            for path in DEMO.glob("tokenizer*.json"):
                shutil.copy(path, whole)
            loaded = {revision: Side(root, whole, args.threads, 4200, stack) for revision, root in roots.items()}
            for name, sequences, prompt, new in (case for case in CASES if case[2] <= args.longest):
                seeds = {revision: iter(range(1000)) for revision in loaded}

                def case(revision: str, n: int = sequences, length: int = prompt, new: int = new, seeds: Any = seeds,
                         sides: Any = loaded) -> Callable[[], float]:  # fmt: skip
                    def run() -> float:  # another prompt each turn, so that no prefix is reused; the same for both
                        return float(
                            sides[revision].seconds(
                                sequences=n, prompt=length, new=new, seed=f"{n} {length} {next(seeds[revision])}"
                            )
                        )

                    return run

                rows.append(compare(name, {revision: case(revision) for revision in loaded}, args.turns))
        short = [subprocess.run(["git", "rev-parse", "--short", revision], cwd=ROOT, capture_output=True, text=True,
                                check=True).stdout.strip() for revision in args.revisions]  # fmt: skip
        report.save(args.output, {"revisions": short, "threads": args.threads, "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
    else:
        main()

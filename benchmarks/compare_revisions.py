"""Speed of this engine on a CPU at two git revisions, in one run by turns: is the newer one slower anywhere?

    python benchmarks/compare_revisions.py BASE [REVISION] --checkpoint DIR --output benchmarks/results/revisions.json

BASE and REVISION (by default HEAD) are checked out, and each runs in a process of its own: the model on bench_cpu.py's
random checkpoint of 1.7 billion parameters (made where DIR has none), then the engine on the demo's held-out questions.
A figure is the best of a side's turns; a ratio is the median over the turns of BASE's seconds divided by REVISION's, so
that above 1 the newer one is faster. Start-up is the wall time of `generate.py --help`, and of one token of an answer
to each of the demo's prompts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHORT, LONG, SEQUENCES, QUESTIONS = 512, 4096, 8, 100
WORK = {  # tokens that a turn of each takes or makes; of "demo" counted by the worker
    f"prefill {SHORT}": SHORT, "decode, 1 sequence": 16, f"decode, {SEQUENCES} sequences": 8 * SEQUENCES,
    f"prefill {LONG}": LONG, f"decode at {LONG} context": 8, "demo, 100 questions": 0,
}  # fmt: skip
START = ("generate.py --help", "demo, a token each")


# --------------------------------------------------------------------------------------------------------------------
# One revision, in a process of its own
# --------------------------------------------------------------------------------------------------------------------


def serve(root: Path, checkpoint: Path) -> None:
    """Answers lines of standard input, each the name of a turn, with a line [tokens, seconds]."""
    sys.path[:0] = [str(root / "inference"), str(root / "demo")]
    import torch

    model, batch_type, page = load_model(checkpoint)
    per = -(-(LONG + 64) // page)
    cache = model.new_cache(per * SEQUENCES)
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(1000, (n,), generator=generator).tolist()

    def forward(prompts: list[list[int]], start: int) -> None:
        rows = [(tokens, start, list(range(i * per, (i + 1) * per))) for i, tokens in enumerate(prompts)]
        hidden = model(batch_type.pack(rows), cache)
        ends = torch.tensor([len(tokens) for tokens in prompts]).cumsum(0) - 1
        model.logits(hidden[ends]).argmax(-1).tolist()

    def decode(steps: int, start: int, sequences: int) -> None:
        for i in range(steps):
            forward([[7 + b] for b in range(sequences)], start + i)

    short, long, many = [ids(SHORT)], [ids(LONG)], [ids(64) for _ in range(SEQUENCES)]
    engine, load, params = load_engine(root)
    turns: dict[str, Callable[[], Any]] = {
        f"prefill {SHORT}": lambda: forward(short, 0),
        "decode, 1 sequence": lambda: decode(16, SHORT, 1),
        f"decode, {SEQUENCES} sequences": lambda: decode(8, 64, SEQUENCES),
        f"prefill {LONG}": lambda: forward(long, 0),
        f"decode at {LONG} context": lambda: decode(8, LONG, 1),
    }
    forward(many, 0)  # what eight sequences decode behind
    print("ready", flush=True)
    for line in sys.stdin:
        name, tokens = line.strip(), 0
        began = time.perf_counter()
        if name in turns:
            turns[name]()
        else:
            engine.scheduler.pool.forget_all()
            requests = [engine.add(prompt, params, id=i) for i, prompt in enumerate(load)]
            while engine.busy:
                engine.step()
            tokens = sum(len(r.tokens) for r in requests)
        print(json.dumps([tokens, time.perf_counter() - began]), flush=True)


def load_model(checkpoint: Path) -> tuple[Any, Any, int]:
    """The model, class Batch and the page size, under whatever names the revision has them."""
    import importlib

    def find(name: str, *modules: str) -> Any:
        for module in modules:
            try:
                return getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError):
                continue
        raise SystemExit(f"error: this revision has no {name} in {', '.join(modules)}")

    opened = find("Checkpoint", "checkpoint.directory", "checkpoint", "checkpoint.weights", "weights")(checkpoint)
    model = find("Transformer", "model")(opened.args, mtp=False)
    find("load_into", "checkpoint.load", "checkpoint", "checkpoint.weights", "weights")(model, opened, progress=False)
    model.prepare()
    return model, find("Batch", "core.batch", "model"), find("PAGE_SIZE", "core.run_config", "model")


def load_engine(root: Path) -> tuple[Any, list[list[int]], Any]:
    """The demo in bfloat16 behind the engine, held-out questions as token ids, and greedy parameters."""
    import random

    import engine as door
    from evaluate import KINDS, held_out  # type: ignore[import-not-found]

    kind: Any = getattr(door, "SamplingParams", None)
    if kind is None:  # the flat layout
        from sampling import SamplingParams as kind  # type: ignore[import-not-found, no-redef]
    engine = door.Engine.from_pretrained(root / "demo" / "checkpoint", max_num_seqs=16)
    topics = [topic for topic in KINDS if topic != "long_lookup"]
    asked = [c for topic in topics for c in held_out(topic, -(-QUESTIONS // len(topics)), seed=3)]
    random.Random(0).shuffle(asked)
    assert engine.tokenizer is not None
    load = [engine.tokenizer.encode_chat(c.messages()) for c in asked[:QUESTIONS]]
    return engine, load, kind(temperature=0, max_new_tokens=300)


# --------------------------------------------------------------------------------------------------------------------
# Both, by turns
# --------------------------------------------------------------------------------------------------------------------


class Side:
    """A revision's process."""

    def __init__(self, name: str, root: Path, checkpoint: Path):
        self.name, self.root = name, root
        command = [sys.executable, __file__, "--serve", str(root), str(checkpoint)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> str:
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) and not line.startswith(("ready", "[")):
            pass
        if not line:
            raise SystemExit(f"error: the process of {self.name} ended")
        return line

    def turn(self, name: str) -> tuple[int, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        tokens, seconds = json.loads(self.read())
        return tokens or WORK[name], seconds

    def start(self, what: str) -> float:
        """Seconds that a command takes from start to end."""
        script = str(self.root / "inference" / "generate.py")
        demo = [script, "--ckpt-path", str(self.root / "demo" / "checkpoint"), "--max-new-tokens", "1"]
        prompt = str(self.root / "demo" / "prompts.txt")
        command = [script, "--help"] if what == START[0] else [*demo, "--input-file", prompt, "--temperature", "0"]
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        return time.perf_counter() - began


def compare(sides: list[Side], turns: int) -> list[dict[str, Any]]:
    rows = []
    for name in (*WORK, *START):
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        tokens = 0
        for turn in range(turns + 1):  # the first is to warm up
            for side in sides if turn % 2 == 0 else reversed(sides):
                if name in START:
                    taken = side.start(name)
                else:
                    tokens, taken = side.turn(name)
                if turn:
                    seconds[side.name].append(taken)
        base, newer = (seconds[side.name] for side in sides)
        ratios = [b / n for b, n in zip(base, newer, strict=True)]
        row = {"name": name, "turns": turns, "seconds": {s: min(t) for s, t in seconds.items()},
               "tok_s": {s: tokens / min(t) for s, t in seconds.items()} if tokens else None,
               "ratio": statistics.median(ratios), "ratios": ratios}  # fmt: skip
        figures = {s: f"{tokens / min(t):.1f} tok/s" if tokens else f"{min(t):.2f} s" for s, t in seconds.items()}
        speeds = "  ".join(f"{side} {figure}" for side, figure in figures.items())
        print(f"{name:26} {speeds}  ratio {row['ratio']:.3f}", flush=True)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the older revision")
    parser.add_argument("revision", nargs="?", default="HEAD", help="the newer one (default: HEAD)")
    parser.add_argument("--checkpoint", type=Path, required=True, help="bench_cpu.py's checkpoint; made if not there")
    parser.add_argument("--turns", type=int, default=6, help="counted turns of each (default: 6)")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    from lib import report

    import bench_cpu

    if not (options.checkpoint / "config.json").exists():
        options.checkpoint.mkdir(parents=True, exist_ok=True)
        bench_cpu.make_checkpoint(options.checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        sides = []
        for name in (options.base, options.revision):
            commit = subprocess.check_output(["git", "rev-parse", "--short", name], cwd=ROOT, text=True).strip()
            tree = Path(scratch) / commit
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
            sides.append(Side(commit, tree, options.checkpoint))
            sides[-1].read()
        try:
            rows = compare(sides, options.turns)
        finally:
            for side in sides:
                side.process.kill()
                subprocess.run(["git", "worktree", "remove", "--force", str(side.root)], cwd=ROOT, check=True)
    report.save(options.output, {"base": sides[0].name, "revision": sides[1].name, "rows": rows})
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())

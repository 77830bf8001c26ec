"""Two ranks as two data-parallel lanes, as two pipeline stages, or tensor parallel: tokens a second, in turns.

    python benchmarks/lane_throughput.py --output benchmarks/results/lane_throughput.json
    python benchmarks/lane_throughput.py --checkpoint DIR       # also bench_cpu.py's random model
    sudo python benchmarks/lane_throughput.py --links 1gbit 100mbit,1ms --output benchmarks/results/slow_links.json

Each side is two processes with half of the cores each, which stay alive and wait while the others work; with --links,
in network namespaces whose cable has that rate and, each way, that delay (see lib/delayed_link.py; the round trip is
measured, without load, and the relay runs on the same cores as the ranks). Its first rank
answers so many random prompts at a time (CONCURRENT) through the engine, greedily and to a fixed length; a figure is
the tokens of all answers over the time from the first prompt to the last token, prefill included, the best of a side's
turns, and a ratio the median of the turns' ratios. What one decode step of these sends is counted beside it: bytes of
all collectives of activations of a rank, and what engine/layouts.py says for the same.
"""

import argparse
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lib import INFERENCE, ROOT, report
from lib.delayed_link import DelayedLink, round_trip
from lib.timing import take_turns

sys.path.append(str(ROOT / "deploy"))
from two_hosts import Hosts  # type: ignore[import-not-found]

DEMO = ROOT / "demo" / "checkpoint"
CONCURRENT = (1, 8, 64)
PROMPT = 32  # tokens
SIDES: dict[str, dict[str, int]] = {"tensor parallel": {}, "lanes": {"dp": 2}, "pipeline": {"pp": 2}}


def work(checkpoint: str, layout: dict[str, Any]) -> None:
    """A rank; the first takes a case for each line of JSON on stdin, and answers with a line on stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import time

    import torch

    from core.sampling_params import SamplingParams
    from engine.engine import Engine
    from parallel import startup
    from parallel.group import Group

    torch.set_num_threads(1)
    sent = 0

    def counted(name: str) -> None:
        """Has a collective of activations add what it is given to `sent`."""
        collective: Any = getattr(Group, name)

        def call(self: Group, *given: Any) -> Any:
            nonlocal sent
            if self.size > 1:
                parts = [part for part in given if isinstance(part, torch.Tensor)]
                rows = given[0][self.rank] if name == "gather" else None
                sent += sum((part if rows is None else part[:rows]).nbytes for part in parts)
            return collective(self, *given)

        setattr(Group, name, call)

    for name in ("all_reduce", "all_gather", "gather", "scatter_sum"):
        counted(name)
    world = startup.join(3600)
    engine = Engine.from_pretrained(
        checkpoint, world=world, device="cpu", max_model_len=256, max_num_seqs=64 // layout.get("dp", 1),
        prefix_reuse=False, **layout,
    )  # fmt: skip
    if world.rank > 0:
        engine.serve()
        return
    vocabulary = engine.model.args.vocab_size
    for line in sys.stdin:
        case = json.loads(line)
        draw = random.Random(case["seed"])
        prompts = [[draw.randrange(vocabulary) for _ in range(case["prompt"])] for _ in range(case["sequences"])]
        params = SamplingParams(temperature=0, max_new_tokens=case["new"], ignore_eos=True)
        began = time.perf_counter()
        requests = [engine.add(prompt, params, i) for i, prompt in enumerate(prompts)]
        assert not any(r.error for r in requests), requests[0].error
        of_step = 0
        while engine.busy:
            sent = 0
            engine.step()
            of_step = sent  # in the end, of a step in which all sequences decode
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "sent": of_step}), file=answers, flush=True)
    engine.close()


class Side:
    """Two ranks of one layout."""

    def __init__(self, checkpoint: Path, layout: dict[str, int], stack: ExitStack, hosts: Hosts | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = []
        for rank in range(2):
            env = os.environ | {
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0" if hosts else str(rank),
                "LOCAL_WORLD_SIZE": "1" if hosts else "2", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": hosts.address(0) if hosts else "127.0.0.1", "PYTHONPATH": str(INFERENCE),
            }  # fmt: skip
            command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(checkpoint), json.dumps(layout)]
            pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            if hosts is None:
                process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
            else:
                process = hosts.start(rank, command, environment=env, stdin=pipe, stdout=pipe)
            ranks.append(stack.enter_context(process))
            stack.callback(process.kill)
        self.first = ranks[0]
        self.sent: dict[int, int] = {}

    def seconds(self, sequences: int, prompt: int, new: int, seed: str) -> float:
        assert self.first.stdin is not None and self.first.stdout is not None
        case = {"sequences": sequences, "prompt": prompt, "new": new, "seed": seed}
        self.first.stdin.write(json.dumps(case) + "\n")
        self.first.stdin.flush()
        said = json.loads(self.first.stdout.readline())
        self.sent[sequences] = said["sent"]
        return float(said["seconds"])


def predicted(checkpoint: Path, lanes: int, sequences: int) -> int:
    """What plan counts that a rank gives to the collectives of one decode step."""
    import torch

    from checkpoint.directory import Checkpoint, choose_args
    from engine import layouts
    from engine.choose_numerics import choose_numerics
    from engine.rank_memory import RankSpec

    held = Checkpoint(checkpoint)
    args = choose_args(held, None)
    specs = held.expected(args)
    num, _ = choose_numerics(args, torch.device("cpu"), "auto", "auto", specs=specs)
    rank = RankSpec(args, num, 2, gpu=False, lanes=lanes)
    [layout] = [found for found in layouts.layouts(rank, 2, "whole") if isinstance(found, layouts.Layout)
                and found.rank.lanes == lanes]  # fmt: skip
    rows = -(-sequences // lanes)
    total = 0
    for message in layouts.messages(layout, rows, rows):
        everybody = sequences if lanes > 1 else rows  # a partial sum has the rows of all lanes
        total += message.nbytes // rows * everybody if message.collective == "scatter_sum" else message.nbytes
    return total


def compare(
    checkpoint: Path, model: str, new: int, turns: int, stack: ExitStack, link: str | None = None
) -> list[dict[str, Any]]:
    hosts, round_trip_s, rate = None, None, ""
    if link is not None:
        hosts = stack.enter_context(Hosts())
        rate, _, delay = link.partition(",")
        if delay:
            stack.enter_context(DelayedLink(hosts, (milliseconds(delay) or 0) / 1e3))
        round_trip_s = round_trip(hosts)
    sides = {name: Side(checkpoint, layout, stack, hosts) for name, layout in SIDES.items()}
    for side in sides.values():  # loaded, over a cable that is still fast
        side.seconds(1, PROMPT, 2, "first")
    if hosts is not None:
        for i in range(2):
            hosts.slow_down(i, rate)
    rows = []
    for sequences in CONCURRENT:
        seeds = {name: iter(range(1000)) for name in sides}

        def case(name: str, n: int = sequences, seeds: Any = seeds) -> Callable[[], float]:
            return lambda: sides[name].seconds(n, PROMPT, new, f"{n} {next(seeds[name])}")  # the same for all

        seconds, ratios = take_turns({name: case(name) for name in sides}, turns)
        row: dict[str, Any] = {"model": model, "link": link, "concurrent": sequences, "new": new, "turns": turns}
        row |= {} if link is None else {"round_trip_s": round_trip_s}
        for name, side in sides.items():
            row[name] = {"tokens_s": sequences * new / min(seconds[name])}
            if name in ratios:  # above 1 where it is faster than tensor parallel
                row[name]["ratio"] = 1 / statistics.median(ratios[name])
            if name != "pipeline":
                counted = predicted(checkpoint, SIDES[name].get("dp", 1), sequences)
                row[name] |= {"sent": side.sent[sequences], "predicted": counted}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def rate_and_delay(text: str) -> str:
    """A flag's type: a rate as tc has it, and perhaps a delay."""
    rate, comma, delay = text.partition(",")
    if not re.fullmatch(r"\d+(\.\d+)?[kmg]bit", rate) or (comma and milliseconds(delay) is None):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1gbit or 100mbit,1ms")
    return text


def milliseconds(text: str) -> float | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)ms", text)
    return float(found[1]) if found else None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="also this one, bench_cpu.py's random one")
    parser.add_argument("--links", nargs="+", metavar="RATE[,DELAY]", type=rate_and_delay,
                        help="between network namespaces, such as 100mbit,1ms; the delay is of each way")  # fmt: skip
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--new", type=int, default=24, help="tokens of an answer (default: 24)")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    rows = []
    for link in options.links or [None]:
        with ExitStack() as stack:
            rows += compare(DEMO, "the demo", options.new, options.turns, stack, link)
        if options.checkpoint is not None:
            with ExitStack() as stack:
                whole = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # with a tokenizer, which is not used
                for path in [*options.checkpoint.resolve().iterdir(), *DEMO.glob("tokenizer*.json")]:
                    (whole / path.name).symlink_to(path)
                rows += compare(whole, "1.7 B", options.new, options.turns, stack, link)
    report.save(options.output, rows)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], json.loads(sys.argv[3]))
    else:
        sys.exit(main())

"""Clients at server.py, and at `transformers serve` on the same checkpoint: latencies, throughput, goodput, errors.

    pip install "transformers[serving]"            # into any environment; --peer-python names its interpreter
    python benchmarks/online_serving.py --output benchmarks/results/online_serving.json
    python figures/server_load.py                  # draws it

The checkpoint is the demo cast to bfloat16, because transformers computes with FP8 weights on GPUs only. Both servers
run all the time, with their defaults (ours with --flags), and take turns: at each rate both get the same held-out
questions of all kinds at the same moments, which follow a Poisson process. Latencies count from the moment a question
was due, so a client that falls behind hides nothing. `between_tokens` are the gaps between two texts that reach a
client, one token each. Goodput counts the requests with a first token and a mean gap within the bounds. Answers are
greedy, and counted where they are right.
"""

import argparse
import asyncio
import itertools
import math
import os
import random
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import torch

from lib import INFERENCE, ROOT, report
from lib.timing import percentile

OURS, PEER = "server.py", "transformers serve"
MOST_TOKENS = 300
PATIENCE = 600.0  # seconds that a server may take to start, or for one answer


@dataclass
class Outcome:
    """What became of one question; in seconds since it was due."""

    first: float = math.nan
    end: float = math.nan
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0  # as the server counts them; transformers counts the end token too
    right: bool = False
    error: str | None = None

    def good(self, first: float, between: float) -> bool:
        return self.error is None and self.first <= first and (not self.gaps or statistics.mean(self.gaps) <= between)


def arrivals(n: int, rate: float, seed: int) -> list[float]:
    """When each of n requests is due, in seconds: `rate` a second in the mean, or all at once for an infinite one."""
    draw = random.Random(seed)
    return list(itertools.accumulate(draw.expovariate(rate) if rate < math.inf else 0.0 for _ in range(n)))


def questions(n: int, seed: int) -> list[Any]:
    """Held-out conversations, all kinds mixed."""
    from evaluate import KINDS, held_out  # type: ignore[import-not-found]

    asked = [c for kind in KINDS for c in held_out(kind, -(-n // len(KINDS)), seed)]
    random.Random(seed).shuffle(asked)
    return asked[:n]


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": percentile(values, p) for p in (50, 90, 99)} if values else {}


def summary(outcomes: list[Outcome], seconds: float, bounds: tuple[float, float]) -> dict[str, Any]:
    done = [outcome for outcome in outcomes if outcome.error is None]
    tokens = sum(outcome.tokens for outcome in done)
    return {
        "answers": len(done), "errors": [outcome.error for outcome in outcomes if outcome.error],
        "right": sum(outcome.right for outcome in done), "seconds": seconds, "tokens": tokens,
        "tokens_per_second": tokens / seconds, "requests_per_second": len(done) / seconds,
        "good_requests_per_second": sum(outcome.good(*bounds) for outcome in outcomes) / seconds,
        "first_token_s": percentiles([outcome.first for outcome in done]),
        "between_tokens_s": percentiles([gap for outcome in done for gap in outcome.gaps]),
        "end_to_end_s": percentiles([outcome.end for outcome in done]),
    }  # fmt: skip


async def ask(client: openai.AsyncOpenAI, model: str, conversation: Any, due: float) -> Outcome:
    await asyncio.sleep(due - time.perf_counter())
    outcome, said, finish, last = Outcome(), "", None, 0.0
    try:
        stream = await client.chat.completions.create(
            model=model, messages=conversation.messages(), max_tokens=MOST_TOKENS, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        async for chunk in stream:
            now = time.perf_counter() - due
            if chunk.usage:
                outcome.tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                said += choice.delta.content or ""
                if choice.delta.content or getattr(choice.delta, "reasoning_content", None):
                    if math.isnan(outcome.first):
                        outcome.first = now
                    else:
                        outcome.gaps.append(now - last)
                    last = now
        outcome.end = time.perf_counter() - due
        outcome.right = finish == "stop" and said.rpartition("</think>")[2].strip() == conversation.last.answer
        if finish is None or math.isnan(outcome.first):
            outcome.error = "the answer is empty or has no end"
    except openai.OpenAIError as e:
        outcome.error = str(e)
    return outcome


async def load(url: str, model: str, asked: list[Any], dues: list[float]) -> tuple[list[Outcome], float]:
    """Asks everything when it is due; the outcomes, and the seconds to the last one's end."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        began = time.perf_counter()
        work = [ask(client, model, c, began + due) for c, due in zip(asked, dues, strict=True)]
        outcomes = await asyncio.gather(*work)
        return outcomes, time.perf_counter() - began


@contextmanager
def running(command: list[str], threads: int, url: str, log: Path) -> Iterator[str]:
    """A server until the block ends. Raises SystemExit, naming its log's last line, where it does not start."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            began = time.monotonic()
            while not healthy(url):
                if process.poll() is not None or time.monotonic() - began > PATIENCE:
                    last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
                    raise SystemExit(f"error: {command[0]} … did not start serving: {last}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="0.5,2,8,32", help="requests a second, by commas; inf is all at once")
    parser.add_argument("--requests", type=int, default=44, help="of each rate")
    parser.add_argument("--bounds", default="1,0.1", help="seconds to the first token and between tokens, for goodput")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each server")
    parser.add_argument("--flags", default="", help='more of server.py, as in --flags="--max-num-batched-tokens 256"')
    parser.add_argument("--peer-python", default=sys.executable, help='with transformers[serving]; "" for no peer')
    parser.add_argument("--output", help="JSON file for the results")
    args = parser.parse_args()
    first, between = map(float, args.bounds.split(","))

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = folder / "demo-bf16"
        scripts, demo = INFERENCE, ROOT / "demo" / "checkpoint"
        cast = [scripts / "fp8_cast_bf16.py", "--input-fp8-hf-path", demo, "--output-bf16-hf-path", checkpoint]
        subprocess.run([sys.executable, *map(str, cast)], check=True, stderr=subprocess.DEVNULL)
        commands = {OURS: [sys.executable, str(scripts / "server.py"), "--ckpt-path", str(checkpoint)]}
        commands[OURS] += ["--threads", str(args.threads), *shlex.split(args.flags)]
        if args.peer_python:
            commands[PEER] = [args.peer_python, "-m", "transformers.cli.transformers", "serve", str(checkpoint)]
        urls = {}
        for side, command in commands.items():
            port = free_port()
            log = folder / f"{re.sub(r'[^a-z]', '-', side)}.log"
            command, url = [*command, "--port", str(port)], f"http://127.0.0.1:{port}"
            urls[side] = stack.enter_context(running(command, args.threads, url, log))
        models = {OURS: checkpoint.name, PEER: str(checkpoint)}
        for side, url in urls.items():  # the first answers of a process are slow
            asyncio.run(load(url, models[side], questions(2, seed=0), [0.0] * 2))

        rows = []
        for turn, rate in enumerate(map(float, args.rates.split(","))):
            asked, dues = questions(args.requests, seed=turn + 1), arrivals(args.requests, rate, seed=turn + 1)
            row: dict[str, Any] = {"rate": rate if rate < math.inf else "all at once"}
            for side in list(urls)[:: 1 if turn % 2 == 0 else -1]:
                row[side] = summary(*asyncio.run(load(urls[side], models[side], asked, dues)), (first, between))
                print(f"{rate:g} requests/s, {side}: {shown(row[side])}", flush=True)
            if PEER in row:
                row["throughput_ratio"] = row[OURS]["tokens_per_second"] / row[PEER]["tokens_per_second"]
                print(f"throughput ratio {row['throughput_ratio']:.2f}")
            rows.append(row)
    results = {"checkpoint": "the demo in bfloat16", "requests": args.requests, "threads": args.threads,
               "bounds": {"first_token_s": first, "between_tokens_s": between}, "rows": rows}  # fmt: skip
    report.save(args.output, results)


def shown(side: dict[str, Any]) -> str:
    ends = [side["first_token_s"], side["between_tokens_s"], side["end_to_end_s"]]
    parts = [f"{side['tokens_per_second']:.1f} tok/s", f"{side['good_requests_per_second']:.2f} good requests/s"]
    parts += [f"{name} p50 {end.get('p50', math.nan):.3f} p99 {end.get('p99', math.nan):.3f} s"
              for name, end in zip(("first token", "between tokens", "whole"), ends, strict=True)]  # fmt: skip
    return ", ".join([*parts, f"{side['right']} of {side['answers']} right, {len(side['errors'])} errors"])


if __name__ == "__main__":
    main()

"""A mixed load of requests through the engine, beside transformers' `generate` on padded batches; MTP; prefix reuse.

    python benchmarks/offline_throughput.py --output benchmarks/results/offline_throughput.json      # the demo
    python benchmarks/offline_throughput.py --checkpoint DIR --lengths 16-256:4-32 --output …        # a random one

All requests are there at the start. Ours runs them as they fit; transformers takes them in order, eight at a time,
padded to the longest prompt and run to the longest answer of the eight. Both are greedy and count the tokens a request
asked for, up to its end token. The sides take turns; ratios are taken turn by turn.
"""

import argparse
import itertools
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from lib import ROOT, report
from lib.timing import percentile

from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine.engine import Engine

Load = list[tuple[list[int], int]]  # (prompt, most new tokens)
BATCH = 8


def demo_load(engine: Engine, n: int) -> Load:
    """Held-out questions to the demo, all kinds mixed."""
    from evaluate import KINDS, held_out  # type: ignore[import-not-found]

    assert engine.tokenizer is not None
    kinds = [kind for kind in KINDS if kind != "long_lookup"]
    asked = [c for kind in kinds for c in held_out(kind, -(-n // len(kinds)), seed=3)]
    random.Random(0).shuffle(asked)
    return [(engine.tokenizer.encode_chat(c.messages()), 300) for c in asked[:n]]


def random_load(vocab: int, n: int, lengths: str) -> Load:
    """Random prompts and answer lengths, log-uniform within "P-P:A-A"."""
    spans = [[int(x) for x in span.split("-")] for span in lengths.split(":")]
    draw = random.Random(0)

    def length(span: list[int]) -> int:
        return round(span[0] * (span[1] / span[0]) ** draw.random())

    return [([draw.randrange(vocab) for _ in range(length(spans[0]))], length(spans[1])) for _ in range(n)]


def summary(tokens: int, seconds: float, first: list[float], between: list[float]) -> dict[str, float]:
    return {
        "tokens": tokens, "tokens_per_second": tokens / seconds,
        "first_token_p50_s": percentile(first, 50), "first_token_p95_s": percentile(first, 95),
        "between_tokens_p50_ms": 1e3 * percentile(between, 50), "between_tokens_p95_ms": 1e3 * percentile(between, 95),
    }  # fmt: skip


def run_ours(engine: Engine, load: Load, ends: bool) -> tuple[dict[str, float], list[list[int]]]:
    engine.scheduler.pool.unregister_all()
    began = time.perf_counter()
    requests = [
        engine.add(prompt, SamplingParams(temperature=0, max_new_tokens=new, ignore_eos=not ends), id=i)
        for i, (prompt, new) in enumerate(load)
    ]
    last: dict[int, tuple[float, int]] = {}
    first: list[float] = []
    between: list[float] = []
    while engine.busy:
        for r in engine.step():
            now = time.perf_counter()
            if r.id in last:
                was, had = last[r.id]
                between += [(now - was) / max(1, len(r.tokens) - had)] * max(1, len(r.tokens) - had)
            else:
                first.append(now - began)
            last[r.id] = (now, len(r.tokens))
    made = sum(len(r.tokens) + (r.finish_reason == "stop") for r in requests)
    return summary(made, time.perf_counter() - began, first, between), [r.tokens for r in requests]


class Clock(transformers.StoppingCriteria):
    """Notes when each step of transformers' generate ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.inference_mode()
def run_theirs(model: Any, load: Load, eos: int | None) -> tuple[dict[str, float], list[list[int]]]:
    began = time.perf_counter()
    made = 0
    first: list[float] = []
    between: list[float] = []
    answers: list[list[int]] = []
    for at in range(0, len(load), BATCH):
        part = load[at : at + BATCH]
        width = max(len(prompt) for prompt, _ in part)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in part])
        clock = Clock()
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=max(new for _, new in part), do_sample=False, pad_token_id=0,
            eos_token_id=eos, stopping_criteria=[clock], temperature=None, top_p=None,
        )  # fmt: skip
        for row, (_, new) in zip(out[:, width:].tolist(), part, strict=True):
            answer = row[:new]
            if eos is not None and eos in answer:
                answer = answer[: answer.index(eos)]
            ended = len(answer) < min(new, len(row))
            made += len(answer) + ended
            first.append(clock.times[0] - began)
            steps = clock.times[: len(answer) + ended]
            between += [b - a for a, b in itertools.pairwise(steps)]
            answers.append(answer)
    return summary(made, time.perf_counter() - began, first, between), answers


def second_turn(engine: Engine, vocab: int, length: int) -> float:
    """Seconds to the first token of a conversation's second turn, after a first one of `length` tokens."""
    draw = random.Random(1)
    conversation = [draw.randrange(vocab) for _ in range(length)]
    params = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
    [answer] = engine.generate([conversation], params)
    again = conversation + answer.tokens + [draw.randrange(vocab) for _ in range(16)]
    began = time.perf_counter()
    engine.add(again, params)
    while not any(r.tokens for r in engine.step()):
        pass
    seconds = time.perf_counter() - began
    while engine.busy:
        engine.step()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a random checkpoint (default: the demo)")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--lengths", default="16-256:4-32", help="of random prompts and answers")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--output", help="JSON file for the results")
    args = parser.parse_args()
    demo = args.checkpoint is None
    path = Path(args.checkpoint or ROOT / "demo" / "checkpoint")
    limits = dict(max_model_len=2560, max_num_seqs=2 * BATCH if demo else BATCH)
    if demo:
        from reload import load_transformers  # type: ignore[import-not-found]

        engine = Engine.from_pretrained(path, device="cpu", **limits)  # type: ignore[arg-type]
        theirs, _ = load_transformers(path, torch.bfloat16)
    else:
        from bench_cpu import Ours

        engine = Engine(Ours(path).model, None, RunConfig(**limits))  # type: ignore[arg-type]
        theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, local_files_only=True
        ).eval()
    vocab = engine.model.args.vocab_size
    load = demo_load(engine, args.requests) if demo else random_load(vocab, args.requests, args.lengths)
    eos = engine.tokenizer.eos_ids[0] if engine.tokenizer else None
    ours_runs, their_runs, ratios = [], [], []
    for turn in range(args.turns):
        for side in ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours"):
            if side == "ours":
                figures, answers = run_ours(engine, load, ends=demo)
                ours_runs.append(figures)
            else:
                figures, their_answers = run_theirs(theirs, load, eos)
                their_runs.append(figures)
            print(side, {k: round(v, 2) for k, v in figures.items()}, flush=True)
        ratios.append(ours_runs[-1]["tokens_per_second"] / their_runs[-1]["tokens_per_second"])
    same = sum(a == b for a, b in zip(answers, their_answers, strict=True))
    results: dict[str, Any] = {
        "requests": len(load), "prompt_tokens": sum(len(p) for p, _ in load), "threads": torch.get_num_threads(),
        "ours": ours_runs, "transformers": their_runs, "throughput_ratio": statistics.median(ratios),
        "same_answers": same,
    }  # fmt: skip
    print(f"throughput ratio {results['throughput_ratio']:.2f}; {same} of {len(load)} answers the same")

    if demo:
        results["mtp"] = []
        for one in (True, False):
            some = load[:24] if one else load[:64]
            for k in (0, 1, 2, 3):
                limits_k = dict(max_model_len=2560, max_num_seqs=1 if one else 2 * BATCH)
                drafting = Engine(engine.model, engine.tokenizer, RunConfig(mtp=k, **limits_k))  # type: ignore[arg-type]
                figures, _ = run_ours(drafting, some, ends=True)
                stats = drafting.stats
                row = {
                    "k": k, "sequences_at_a_time": limits_k["max_num_seqs"],
                    "tokens_per_second": figures["tokens_per_second"],
                    "tokens_per_step": stats.generated / max(1, stats.sampled_steps),
                    "acceptance": [a / d for a, d in zip(stats.accepted, stats.drafted, strict=True) if d],
                }  # fmt: skip
                print("mtp", row, flush=True)
                results["mtp"].append(row)
    reuse = {}
    for on in (True, False):
        fresh = Engine(engine.model, engine.tokenizer, RunConfig(prefix_reuse=on, **limits))  # type: ignore[arg-type]
        second_turn(fresh, vocab, 600)
        fresh.scheduler.pool.unregister_all()
        reuse["reused" if on else "not reused"] = second_turn(fresh, vocab, 2000)
    results["second_turn_first_token_s"] = reuse
    print("second turn after 2,000 tokens, seconds to the first token:", reuse)
    report.save(args.output, results)


if __name__ == "__main__":
    main()

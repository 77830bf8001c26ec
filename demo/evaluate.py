"""Asks the demo held-out questions and counts exact answers by kind.

    python demo/evaluate.py                                           # our engine, 1,100 questions
    python demo/evaluate.py --engine transformers --dtype float32     # the same questions to transformers
    python demo/evaluate.py --output benchmarks/results/demo.json

Answers are greedy. One counts as right if the text after the closing think tag is exactly the expected answer and the
model ended it by itself. No payload of these questions (numbers, word, list) was ever shown in training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tasks import END_THINK, PAD, Conversation, Questions, render

HERE = Path(__file__).resolve().parent
KINDS = (
    "addition", "subtraction", "spelling", "reversing", "sorting", "counting",
    "lookup", "several_codes", "turns", "follow_up", "long_lookup",
)  # fmt: skip
LONG_PROMPTS = (300, 2300)  # tokens of a long_lookup's prompt, evenly spread
MAX_NEW_TOKENS = 300


@dataclass(frozen=True)
class Reply:
    """What came back for one question, without the end token."""

    text: str
    finished: bool
    tokens: int


class Engine(Protocol):
    """Something that answers conversations; it counts the MTP module's drafts where it makes or checks them."""

    drafts: int
    accepted: int

    def ask(self, conversations: list[Conversation]) -> list[Reply]:
        """Greedy replies, in order."""


@dataclass
class Score:
    """One kind's count."""

    asked: int = 0
    right: int = 0
    wrong: list[dict[str, str]] = field(default_factory=list)


def held_out(kind: str, count: int, seed: int) -> list[Conversation]:
    """`count` questions of one kind, always the same for the same seed."""
    questions = Questions(seed, held_out=True)
    low, high = LONG_PROMPTS
    return [questions.conversation(kind, low + (high - low) * i // max(1, count - 1)) for i in range(count)]


def is_right(conversation: Conversation, reply: Reply) -> bool:
    """Whether the answer after the thinking is exactly the expected one."""
    return reply.finished and reply.text.rpartition(END_THINK)[2].strip() == conversation.last.answer


# -- the two engines -----------------------------------------------------------------------------------------------


class OurEngine:
    """Questions go through this project's engine."""

    def __init__(
        self, checkpoint: Path, dtype: Any, gemm: Any, device: str, mtp: int, batch: int, kv_cache_dtype: Any = "auto"
    ) -> None:
        sys.path.insert(0, str(HERE.parent / "inference"))
        from core.sampling_params import SamplingParams
        from engine.engine import Engine

        self.params = SamplingParams(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
        self.engine = Engine.from_pretrained(
            checkpoint, dtype=dtype, gemm=gemm, device=device, mtp=mtp, max_num_seqs=batch,
            kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip
        self.drafts = self.accepted = 0

    def ask(self, conversations: list[Conversation]) -> list[Reply]:
        """Replies from the engine, its own scheduler batching them."""
        requests = self.engine.generate([c.messages() for c in conversations], self.params)
        stats = self.engine.stats
        self.drafts, self.accepted = sum(stats.drafted[:1]), sum(stats.accepted[:1])
        return [Reply(r.text, r.finish_reason == "stop", len(r.tokens)) for r in requests]


class TransformersEngine:
    """Questions go through transformers, drafts are checked after the fact."""

    def __init__(self, main: Any, mtp: Any, tokenizer: Any, batch: int) -> None:
        self.main, self.mtp, self.tokenizer, self.batch = main, mtp, tokenizer, batch
        self.end, self.pad = main.config.eos_token_id, tokenizer.token_to_id(PAD)
        self.drafts = self.accepted = 0

    @classmethod
    def from_checkpoint(cls, checkpoint: Path, dtype: str, batch: int) -> TransformersEngine:
        """With the exactly dequantised weights of a checkpoint, in "bfloat16" or "float32"."""
        import torch
        from tokenizers import Tokenizer

        from reload import load_transformers

        main, mtp = load_transformers(checkpoint, getattr(torch, dtype))
        return cls(main, mtp, Tokenizer.from_file(str(checkpoint / "tokenizer.json")), batch)

    def ask(self, conversations: list[Conversation]) -> list[Reply]:
        """Replies from `generate`, the longest prompts first, in batches of similar length."""
        prompts = [self.tokenizer.encode(render(c.messages()), add_special_tokens=False).ids for c in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        replies: dict[int, Reply] = {}
        while order:
            longest = len(prompts[order[-1]])
            size = max(1, min(self.batch, 16_000 // (longest + MAX_NEW_TOKENS)))
            part, order = order[-size:], order[:-size]
            replies |= dict(zip(part, self._ask_batch([prompts[i] for i in part]), strict=True))
        return [replies[i] for i in range(len(prompts))]

    def _ask_batch(self, prompts: list[list[int]]) -> list[Reply]:
        import torch

        from reload import draft_hits

        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts])
        here = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.no_grad():
            made = self.main.generate(
                ids, attention_mask=here, max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
                eos_token_id=self.end, pad_token_id=self.pad,
            )  # fmt: skip
        replies = []
        for prompt, row in zip(prompts, made[:, width:].tolist(), strict=True):
            new = row[: row.index(self.end) + 1] if self.end in row else row
            hits, drafts = draft_hits(self.main, self.mtp, prompt, new)
            self.drafts, self.accepted = self.drafts + drafts, self.accepted + hits
            finished = new[-1] == self.end
            new = new[:-1] if finished else new
            replies.append(Reply(self.tokenizer.decode(new, skip_special_tokens=False), finished, len(new)))
        return replies


# -- scoring -------------------------------------------------------------------------------------------------------


def evaluate(engine: Engine, per_kind: int, seed: int, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """Ask `per_kind` questions of each kind and count."""
    scores: dict[str, Score] = {}
    tokens = 0
    start = time.perf_counter()
    for kind in kinds:
        score = scores[kind] = Score()
        conversations = held_out(kind, per_kind, seed)
        for conversation, reply in zip(conversations, engine.ask(conversations), strict=True):
            score.asked += 1
            if is_right(conversation, reply):
                score.right += 1
            else:
                question = conversation.last.question[-200:]
                score.wrong.append({"question": question, "answer": conversation.last.answer, "reply": reply.text})
            tokens += reply.tokens
        print(f"{kind:<16}{score.right:>6} of {score.asked:<5}{100 * score.right / score.asked:6.1f} %", flush=True)
    asked, right = sum(s.asked for s in scores.values()), sum(s.right for s in scores.values())
    print(f"{'all':<16}{right:>6} of {asked:<5}{100 * right / asked:6.1f} %")
    result = {
        "asked": asked,
        "right": right,
        "exact_percent": round(100 * right / asked, 2),
        "kinds": {kind: asdict(score) for kind, score in scores.items()},
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if engine.drafts:
        result["mtp_acceptance"] = round(engine.accepted / engine.drafts, 4)
        print(f"MTP drafts accepted: {100 * engine.accepted / engine.drafts:.1f} % of {engine.drafts}")
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--engine", choices=["ours", "transformers"], default="ours")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--gemm", default="auto", choices=["auto", "fp8", "bf16", "dequantised"])
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"])
    parser.add_argument("--device", default="cpu", choices=["cuda", "cpu"])
    parser.add_argument("--mtp", type=int, default=0, help="tokens drafted at a step; 1 also measures acceptance")
    parser.add_argument("--per-kind", type=int, default=100, help="questions of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=32, help="questions at once")
    parser.add_argument("--output", type=Path, help="write the result as JSON, for example under benchmarks/results/")
    args = parser.parse_args()

    engine: Engine
    if args.engine == "ours":
        engine = OurEngine(
            args.checkpoint, args.dtype, args.gemm, args.device, args.mtp, args.batch, args.kv_cache_dtype
        )
    else:
        engine = TransformersEngine.from_checkpoint(args.checkpoint, args.dtype, args.batch)
    result = evaluate(engine, args.per_kind, args.seed, tuple(args.kinds))
    settings = {"engine": args.engine, "dtype": args.dtype, "gemm": args.gemm if args.engine == "ours" else None}
    if args.kv_cache_dtype != "auto":
        settings["kv_cache_dtype"] = args.kv_cache_dtype
    result = {**settings, "seed": args.seed, **result}
    if args.output:
        sys.path.insert(0, str(HERE.parent / "benchmarks"))
        from lib import report

        report.save(str(args.output), result)
    print(json.dumps({key: value for key, value in result.items() if key != "kinds"}))


if __name__ == "__main__":
    main()

"""Draws needle.png, a needle in a haystack for the demo, from benchmarks/results/needle.json:

    python figures/needle.py               # draws
    python figures/needle.py --compute     # asks the demo first

The needle is one name's code among many sentences, the question asks for it, and right is an exact answer. It stands
at a depth of 0 % (first) to 100 % (last, before the question) in prompts of several lengths. There are two haystacks:
other names' codes with sentences between them, as the demo was trained on (tasks.py, `long_lookup`), and sentences
alone, on which it was not.
"""

from contextlib import suppress
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import drawing

NAMES = ("needle.json",)
LENGTHS = (512, 1024, 1536, 2048, 2560, 3072, 3584, 4032)  # tokens of the prompt
DEPTHS = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)  # per cent
HAYSTACKS = {"other codes and sentences": 0.6, "sentences alone": 0.0}  # the part of their tokens that are codes
HAYS = 8  # of each kind and length; the needle is put into each at every depth
SEED = 30_000
TRAINED = 2300  # tokens of the longest prompts in training (demo/README.md)
NEW = 48  # tokens of an answer at most; a right one has 19


class Haystack:
    """Sentences, and a fact that is not among them with the question for it, of `length` tokens together, or a few
    fewer. draw: tasks.Questions; codes: the part of the tokens that are other names' codes."""

    def __init__(self, draw: Any, tokenizer: Any, length: int, codes: float):
        import tasks

        self.count = cache(lambda sentence: len(tokenizer.encode_text(" " + sentence, alone=True)))
        n = min(len(tasks.NAMES), 1 + int(codes * length / self.count(tasks.fact(tasks.NAMES[0], "0000"))))
        while True:
            facts = draw._facts(n)
            with suppress(LookupError):  # there all questions are of the training's side
                self.turn = draw._ask(facts)
                break
        self.needle = self.turn.working
        self.sentences = [text for text in map(tasks.fact, facts, facts.values()) if text != self.needle]
        question = [{"role": "user", "content": f"{self.needle} {self.turn.question}"}]
        left = length - len(tokenizer.encode_chat(question)) - sum(map(self.count, self.sentences))
        while (left := left - self.count(filler := draw.rng.choice(tasks.FILLER))) >= 0:
            self.sentences.append(filler)
        draw.rng.shuffle(self.sentences)

    def with_needle(self, depth: int) -> Any:
        """The conversation whose needle stands behind `depth` % of the haystack's tokens, or one sentence more."""
        import tasks

        before = list(accumulate(map(self.count, self.sentences), initial=0))
        at = next(i for i, n in enumerate(before) if n >= depth / 100 * before[-1])
        text = " ".join([*self.sentences[:at], self.needle, *self.sentences[at:], self.turn.question])
        return tasks.Conversation(tasks.Turn("needle", text, self.turn.working, self.turn.answer), kind="needle")


def compute() -> dict[str, Any]:
    """How many answers of the demo are right in each cell, in bfloat16, greedy."""
    from core.sampling_params import SamplingParams
    from engine.engine import Engine
    from evaluate import Reply, is_right
    from tasks import Questions

    engine = Engine.from_pretrained(drawing.DEMO, device="cpu", dtype="bfloat16", max_num_seqs=8)
    params = SamplingParams(temperature=0.0, max_new_tokens=NEW)
    haystacks = []
    for seed, (name, codes) in enumerate(HAYSTACKS.items(), SEED):
        draw = Questions(seed, held_out=True)
        right = [[0] * len(LENGTHS) for _ in DEPTHS]
        for x, length in enumerate(LENGTHS):
            hays = [Haystack(draw, engine.tokenizer, length, codes) for _ in range(HAYS)]
            cells = [(y, hay.with_needle(depth)) for y, depth in enumerate(DEPTHS) for hay in hays]
            # the deepest first: what stands before a needle is then known
            for part in (cells[-HAYS:], cells[:-HAYS]):
                asked = [conversation for _, conversation in part]
                answers = engine.generate([c.messages() for c in asked], params)
                for (y, conversation), r in zip(part, answers, strict=True):
                    right[y][x] += is_right(conversation, Reply(r.text, r.finish_reason == "stop", len(r.tokens)))
            print(name, length, [row[x] for row in right], flush=True)
        haystacks.append({"haystack": name, "right": right})
    return {"checkpoint": "the demo in bfloat16", "lengths": LENGTHS, "depths": DEPTHS, "questions": HAYS,
            "trained": TRAINED, "haystacks": haystacks}  # fmt: skip


def draw(record: dict[str, Any], target: Path, source: str = "") -> None:
    """A heat map for each haystack: depth down, length to the right, the part of right answers as colour."""
    results = record["results"]
    lengths, depths, of = results["lengths"], results["depths"], results["questions"]
    figure, [axes] = drawing.panels(1, len(results["haystacks"]), (12, 4.6), sharey=True)
    for i, (panel, found) in enumerate(zip(axes, results["haystacks"], strict=True)):
        share = [[100 * n / of for n in row] for row in found["right"]]
        image = panel.imshow(share, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for y, row in enumerate(found["right"]):
            for x, n in enumerate(row):
                panel.text(x, y, n, ha="center", va="center", fontsize=8, color="black" if 2 * n > of else "white")
        panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth}" for depth in depths])
        panel.tick_params(length=0)
        panel.set_xlabel("prompt, tokens")
        longer = sum(n <= results["trained"] for n in lengths) - 0.5
        if longer < len(lengths) - 0.5:
            panel.axvline(longer, color="#d55e00", linewidth=2, linestyle="--")
            panel.text(longer + 0.08, -0.62, "longer than in training", fontsize=8.5, color="#d55e00", va="bottom")
        right, asked = sum(map(sum, found["right"])), of * len(lengths) * len(depths)
        panel.set_title(f"among {found['haystack']}: {right} of {asked} right", fontsize=10.5, pad=20)
        if i == 0:
            panel.set_ylabel("depth of the needle, %")
    figure.subplots_adjust(left=0.055, right=0.91, top=0.86, bottom=0.17, wspace=0.05)
    bar = figure.colorbar(image, cax=figure.add_axes((0.925, 0.17, 0.014, 0.69)))
    bar.set_label(f"right answers, % of {of}")
    drawing.finish(figure, target, f"{results['checkpoint']}. {drawing.origin(record)}", source)


if __name__ == "__main__":
    drawing.main("needle", draw, NAMES, compute, "counted")

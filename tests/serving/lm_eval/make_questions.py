"""Writes the demo's held-out questions, the ones that demo/evaluate.py asks, for lm-evaluation-harness.

    python tests/serving/lm_eval/make_questions.py DIRECTORY [--per-kind 100]

DIRECTORY gets questions.jsonl and, beside it, the two tasks that read it: `demo_chat` asks them as conversations and
compares the answers, `demo_loglikelihood` asks how likely each whole reply is and whether a greedy model says it. The
kinds with several turns are left out: a harness's question is one message.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "demo"))

from evaluate import KINDS, held_out  # noqa: E402
from tasks import render  # noqa: E402

SEED = 20_000  # evaluate.py's
ONE_TURN = tuple(kind for kind in KINDS if kind not in ("turns", "follow_up"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--per-kind", type=int, default=100, help="questions of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(ONE_TURN), choices=ONE_TURN)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    with open(args.directory / "questions.jsonl", "w", encoding="utf-8") as file:
        for kind in args.kinds:
            for asked in held_out(kind, args.per_kind, SEED):
                line = {"kind": kind, "system": asked.system or "", "question": asked.last.question,
                        "answer": asked.last.answer, "prompt": render(asked.messages()), "reply": asked.last.reply}  # fmt: skip
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    for task in HERE.glob("*.yaml"):
        text = task.read_text(encoding="utf-8").replace("QUESTIONS", str(args.directory.resolve() / "questions.jsonl"))
        (args.directory / task.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

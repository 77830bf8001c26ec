"""What MTP drafts are worth on the demo: how many are accepted at each place of a draft, and which hidden state the
module should be handed when it is applied again.

    python benchmarks/draft_acceptance.py --output benchmarks/results/draft_acceptance.json

DeepSeek-V3 trained one module, for the token after the next. Engines draft further by applying it to its own output,
which can be taken before or after the module's final norm (`shared_head.norm`); the engine takes it after. Here both
are counted on held-out questions of every kind, greedy. Acceptance at a place is of those drafts that were looked at,
that is, whose predecessors were accepted.
"""

import argparse
from typing import Any

import torch

from lib import ROOT, report

from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine.engine import Engine


class NoNorm(torch.nn.Module):
    """Stands where a norm was: the sum it would have been of."""

    def forward(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return x + delta


def skip_norm_between_drafts(runner: Any) -> None:
    """Hands the MTP module's state on as it is before the final norm, which is applied for the logits alone."""
    model, draft = runner.model, runner.draft
    norm, logits = model.mtp[0].norm, model.logits

    def changed(*args: Any) -> None:
        model.mtp[0].norm = NoNorm()
        model.logits = lambda hidden: logits(norm(hidden))
        try:
            draft(*args)
        finally:
            model.mtp[0].norm = norm
            del model.logits  # the class's own again

    runner.draft = changed


def count(engine: Engine, conversations: list[list[dict]]) -> dict[str, Any]:
    engine.generate(conversations, SamplingParams(temperature=0, max_new_tokens=300))
    stats = engine.stats
    return {
        "acceptance": [a / d for a, d in zip(stats.accepted, stats.drafted, strict=True) if d],
        "drafted": stats.drafted,
        "tokens_per_step": stats.generated / stats.sampled_steps,
    }


def main() -> None:
    from evaluate import KINDS, held_out  # type: ignore[import-not-found]

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--per-kind", type=int, default=20, help="questions of each kind")
    parser.add_argument("--output", help="JSON file for the results")
    args = parser.parse_args()
    kinds = [kind for kind in KINDS if kind != "long_lookup"]
    asked = [c.messages() for kind in kinds for c in held_out(kind, args.per_kind, seed=5)]
    plain = Engine.from_pretrained(ROOT / "demo" / "checkpoint", max_model_len=2560, device="cpu")
    rows = []
    for k in (1, 2, 3, 4):
        for name in ("after the norm", "before the norm"):
            if k == 1 and name == "before the norm":
                continue  # nothing is handed on
            engine = Engine(plain.model, plain.tokenizer, RunConfig(max_model_len=2560, max_num_seqs=16, mtp=k))
            if name == "before the norm":
                skip_norm_between_drafts(engine.runner)
            rows.append({"k": k, "handed on": name, **count(engine, asked)})
            places = ", ".join(f"{a:.1%}" for a in rows[-1]["acceptance"])
            print(f"k = {k}, {name:16} {places}   {rows[-1]['tokens_per_step']:.3f} tokens a step", flush=True)
    report.save(args.output, {"questions": len(asked), "rows": rows})


if __name__ == "__main__":
    main()

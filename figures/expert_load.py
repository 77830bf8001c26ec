"""Draws expert_load.png, which experts the demo chooses for which questions, from benchmarks/results/expert_load.json:

    python figures/expert_load.py               # draws
    python figures/expert_load.py --compute     # answers the questions with a trace first

The trace is what `generate.py --trace DIR --trace-points '*.ffn.ids'` writes: the experts of every token of questions
and answers. A load is an expert's part of a layer's choices over the even part, 1 / experts.
"""

import tempfile
from pathlib import Path
from typing import Any

import drawing

NAMES = ("expert_load.json",)
PER_KIND = 10  # held-out questions
SEED = 20_000  # evaluate.py's
MOST = 4  # times the even part, and a fourth of it: where the colours end


def count(trace: Any, kinds: list[str], n_experts: int) -> dict[str, dict[str, list[int]]]:
    """How often each expert was chosen, by layer and kind. kinds: of the trace's requests, in order."""
    counts: dict[str, dict[str, list[int]]] = {}
    for request, kind in zip(trace.requests, kinds, strict=True):
        for point in request.points:
            layer = point.removesuffix(".ffn.ids")
            found = counts.setdefault(layer, {}).setdefault(kind, [0] * n_experts)
            for expert, n in enumerate(request.points[point].flatten().bincount(minlength=n_experts).tolist()):
                found[expert] += n
    return counts


def compute() -> dict[str, Any]:
    """Choices by layer, kind and expert, of the demo in bfloat16."""
    from core.sampling_params import SamplingParams
    from engine.engine import Engine
    from evaluate import KINDS, held_out
    from verification import Selection, read_trace
    from verification.engine_trace import EngineTrace

    asked = [(kind, c.messages()) for kind in KINDS for c in held_out(kind, PER_KIND, SEED)]
    engine = Engine.from_pretrained(
        drawing.DEMO, device="cpu", dtype="bfloat16", max_num_seqs=8, eager=True, prefix_reuse=False
    )
    with tempfile.TemporaryDirectory() as folder:
        with EngineTrace(engine, Path(folder) / "trace", Selection(("layers.*.ffn.ids",)), "figures/expert_load.py"):
            engine.generate([messages for _, messages in asked], SamplingParams(temperature=0.0, max_new_tokens=300))
        trace = read_trace(Path(folder) / "trace")
        trace.requests.sort(key=lambda request: request.about["index"])
        args = engine.model.args
        counts = count(trace, [kind for kind, _ in asked], args.n_routed_experts)
    tokens = {kind: sum(counts[next(iter(counts))][kind]) // args.n_activated_experts for kind in KINDS}
    return {"checkpoint": "the demo in bfloat16", "per_token": args.n_activated_experts, "groups": args.n_expert_groups,
            "tokens": tokens, "counts": counts}  # fmt: skip


def draw(record: dict[str, Any], target: Path, source: str = "") -> None:
    """A heat map for each layer: kinds down, experts to the right, the load as colour, in times the even part."""
    results = record["results"]
    counts = results["counts"]
    kinds = list(results["tokens"])
    figure, [axes] = drawing.panels(1, len(counts), (13, 4.4), sharey=True)
    for panel, (layer, of_layer) in zip(axes, counts.items(), strict=True):
        rows = [of_layer[kind] for kind in kinds]
        rows.append([sum(column) for column in zip(*rows, strict=True)])
        n = len(rows[0])
        loads = [[n * choices / sum(row) for choices in row] for row in rows]
        clipped = [[max(load, 1 / MOST) for load in row] for row in loads]
        image = panel.imshow(clipped, cmap="PuOr_r", norm="log", vmin=1 / MOST, vmax=MOST, aspect="auto")
        for edge in range(n // results["groups"], n, n // results["groups"]):
            panel.axvline(edge - 0.5, color="#20242c", linewidth=0.8)
        panel.axhline(len(kinds) - 0.5, color="#20242c", linewidth=1.6)
        panel.set_xticks(range(0, n, max(1, n // 8)))
        panel.set_yticks(range(len(rows)), [*(kind.replace("_", " ") for kind in kinds), "all"])
        panel.tick_params(length=0)
        panel.set_xlabel("expert")
        name = layer.replace("layers.", "layer ")
        panel.set_title(f"{name} (all kinds: {min(loads[-1]):.1f} to {max(loads[-1]):.1f})", fontsize=10.5)
    figure.subplots_adjust(left=0.095, right=0.92, top=0.91, bottom=0.19, wspace=0.05)
    bar = figure.colorbar(image, cax=figure.add_axes((0.932, 0.19, 0.013, 0.72)), extend="both")
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["¼", "½", "1", "2", "4"])
    bar.minorticks_off()
    bar.set_label("load, × the even part")
    tokens = sum(results["tokens"].values())
    drawing.finish(figure, target, f"{results['checkpoint']}, {tokens:,} tokens. {drawing.origin(record)}", source)


if __name__ == "__main__":
    drawing.main("expert_load", draw, NAMES, compute, "counted")

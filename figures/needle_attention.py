"""Draws needle_attention.png, where the demo looks when it finds a code, from benchmarks/results/needle_attention.json:

    python figures/needle_attention.py               # draws
    python figures/needle_attention.py --compute     # answers a question with a trace first

A question of needle.py is answered with a trace of queries and latents, as `generate.py --trace` writes it. The token
that is looked at is the one before the code's first digit in the answer's working, where the code must be known. Its
softmax weights are computed from the trace (report, equation 10); of all heads the picture shows how much lies on the
needle, and of the head with most of it, where.
"""

import tempfile
from pathlib import Path
from typing import Any

import drawing
import needle

NAMES = ("needle_attention.json",)
LENGTH, DEPTH, CODES, SEED = 1024, 40, 0.6, 40_000  # of the prompt, see needle.py
POINTS = tuple(f"layers.*.attn.{name}" for name in ("q_nope", "q_rope", "c_kv", "k_rope"))
LEAST = 1e-9  # of a weight in the upper panel
BESIDE = 14  # tokens that the lower right panel shows on both sides of the needle


def find(tokens: list[int], part: list[int], start: int = 0) -> int:
    """Where a run of tokens begins. Raises ValueError."""
    for i in range(start, len(tokens) - len(part) + 1):
        if tokens[i : i + len(part)] == part:
            return i
    raise ValueError("the tokens are not there")


def compute() -> dict[str, Any]:
    """Weights on the needle by layer and head, and all weights of the head with most, of the demo in float32."""
    import torch

    from core.sampling_params import SamplingParams
    from engine.engine import Engine
    from tasks import Questions
    from verification import Selection, read_trace
    from verification.engine_trace import EngineTrace
    from verification.expected import Expected
    from verification.weights import Weights

    engine = Engine.from_pretrained(drawing.DEMO, device="cpu", dtype="float32", eager=True, prefix_reuse=False)
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    hay = needle.Haystack(Questions(SEED, held_out=True), tokenizer, LENGTH, CODES)
    with tempfile.TemporaryDirectory() as folder:
        with EngineTrace(engine, Path(folder) / "trace", Selection(POINTS), "figures/needle_attention.py"):
            conversation = hay.with_needle(DEPTH).messages()
            [answer] = engine.generate([conversation], SamplingParams(temperature=0.0, max_new_tokens=needle.NEW))
        assert answer.text.endswith(hay.turn.answer), answer.text
        request = read_trace(Path(folder) / "trace").requests[0]
        e = Expected(request, Weights(drawing.DEMO))
        tokens = request.tokens.tolist()
        fact = tokenizer.encode_text(" " + hay.needle, alone=True)
        code = tokenizer.encode_text(hay.turn.answer, alone=True)
        begin = find(tokens, fact)
        digits = find(tokens, code, begin)
        position = find(tokens, code, len(answer.prompt)) - 1
        layers, heads, at = range(e.args.n_layers), range(e.args.n_heads), torch.tensor([position])
        weights = [[e.attention_weights(f"layers.{i}", at, head)[0] for head in heads] for i in layers]
    on_code = [[float(f"{head[digits : digits + len(code)].sum():.4g}") for head in layer] for layer in weights]
    layer = max(layers, key=lambda i: max(on_code[i]))
    head = on_code[layer].index(max(on_code[layer]))
    return {"checkpoint": "the demo in float32", "prompt_tokens": len(answer.prompt), "position": position,
            "needle": [begin, begin + len(fact)], "code": [digits, digits + len(code)], "on_code": on_code,
            "layer": layer, "head": head, "tokens": [tokenizer.decode([token]) for token in tokens[: position + 1]],
            "weights": [float(f"{weight:.3g}") for weight in weights[layer][head]]}  # fmt: skip


def draw(record: dict[str, Any], target: Path, source: str = "") -> None:
    """Above one head's weights over all tokens; below all heads' weights on the code, and the head's around it."""
    results = record["results"]
    weights, tokens, (begin, end) = results["weights"], results["tokens"], results["needle"]
    assert len(weights) == len(tokens) == results["position"] + 1
    figure, _ = drawing.panels(1, 1, (11, 6))
    figure.clear()
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 2.3), hspace=0.42, wspace=0.16, left=0.07, right=0.98, top=0.95,
                               bottom=0.15)  # fmt: skip
    wide, heads, near = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    name = f"layer {results['layer']}, head {results['head']}"

    wide.axvspan(begin - 4, end + 4, color=drawing.COLOURS[1], alpha=0.35, linewidth=0)
    wide.vlines(range(len(weights)), LEAST, weights, color=drawing.COLOURS[0], linewidth=1)
    wide.axvline(results["prompt_tokens"] - 0.5, color=drawing.GREY, linewidth=1, linestyle=":")
    beside = dict(fontsize=9, va="top", textcoords="offset points")
    wide.annotate("the needle", (end + 4, 3), xytext=(4, -2), **beside)
    wide.annotate("end of the prompt", (results["prompt_tokens"], 3), xytext=(-6, -2), ha="right", color=drawing.GREY,
                  **beside)  # fmt: skip
    wide.set_yscale("log")
    wide.set_ylim(LEAST, 3)
    wide.set_yticks([10.0**e for e in range(-8, 1, 2)])
    wide.set_xlim(-6, len(weights) + 5)
    wide.set_xlabel("position of the token that is looked at")
    wide.set_ylabel("softmax weight")
    wide.set_title(f"{name}, over all tokens", fontsize=10)
    drawing.plain(wide, "y")

    share = [[100 * weight for weight in layer] for layer in results["on_code"]]
    heads.imshow(share, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(share):
        for x, percent in enumerate(row):
            colour = "black" if percent > 50 else "white"
            heads.text(x, y, f"{percent:.0f}", ha="center", va="center", fontsize=8, color=colour)
    heads.set_xticks(range(len(share[0])))
    heads.set_yticks(range(len(share)))
    heads.tick_params(length=0)
    heads.set_xlabel("head")
    heads.set_ylabel("layer")
    heads.set_title("weight on the code's digits, %", fontsize=10)

    first, last = max(0, begin - BESIDE), min(len(tokens), end + BESIDE)
    colours = [drawing.COLOURS[1] if begin <= i < end else drawing.COLOURS[0] for i in range(first, last)]
    near.bar(range(first, last), weights[first:last], color=colours)
    near.set_xticks(range(first, last), [token.strip() for token in tokens[first:last]], rotation=90, fontsize=8)
    near.set_xlim(first - 0.7, last - 0.3)
    near.set_title(f"{name}, around the needle", fontsize=10)
    near.set_ylabel("softmax weight")
    drawing.plain(near, "y")
    asks = "".join(tokens[results["prompt_tokens"] :]).strip()
    about = f"{results['checkpoint']}; the answer so far: “{asks}”. {drawing.origin(record)}"
    drawing.finish(figure, target, about, source)


if __name__ == "__main__":
    drawing.main("needle_attention", draw, NAMES, compute)

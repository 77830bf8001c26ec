"""Draws error_by_layer.png, the demo's errors in several formats, from benchmarks/results/error_by_layer.json:

    python figures/error_by_layer.py               # draws
    python figures/error_by_layer.py --compute     # records the traces first

This engine computes the same tokens in each format, and in float32 from exactly dequantised weights, and records the
residual stream (verification/recorder.py). An error is that of one token: |x - x32| / |x32| over the channels.
"""

import tempfile
from pathlib import Path
from typing import Any

import drawing

NAMES = ("error_by_layer.json",)
PER_KIND = 2  # held-out questions
SEED = 20_000  # evaluate.py's
QUANTILES = (10, 50, 90)  # per cent of tokens
FLOAT32 = "float32"
FORMATS: dict[str, dict[str, str]] = {  # how the engine is started; the last one from what quantize.py makes
    FLOAT32: {"dtype": "float32"},
    "BF16, dequantised weights": {"gemm": "dequantised"},
    "W8A16": {"gemm": "bf16"},
    "W8A16, FP8 latents": {"gemm": "bf16", "kv_cache_dtype": "fp8"},
    "W8A8": {"gemm": "fp8"},
    "W4A16, experts in INT4": {},
}


def points(n_layers: int) -> list[str]:
    """Names of the recorded points, in the order of execution."""
    of_layers = [f"layers.{i}.{name}" for i in range(n_layers) for name in ("after_attn", "hidden")]
    return [*of_layers, "norm", "logits"]


def errors(found: Any, exact: Any) -> list[float]:
    """Of each row of `found` (rows, n) beside the row of `exact`."""
    found, exact = found.double(), exact.double()
    return ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).tolist()  # type: ignore[no-any-return]


def quantiles(values: list[float]) -> list[float]:
    import torch

    at = torch.tensor(QUANTILES, dtype=torch.float64) / 100
    return [float(f"{q:.4g}") for q in torch.tensor(values, dtype=torch.float64).quantile(at).tolist()]


def compute() -> dict[str, Any]:
    """Quantiles of tokens' errors at each point, by format, and how many tokens have another most likely token after
    them. The tokens are questions and the answers of the model in float32."""
    import torch

    from checkpoint.quantize import quantize
    from core.sampling_params import SamplingParams
    from engine.engine import Engine
    from evaluate import KINDS, held_out
    from verification import Selection, record_tokens

    exact: Any = None
    tokens: list[list[int]] = []
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        quantize(drawing.DEMO, Path(folder) / "int4", "int4", None, "cpu")
        for name, how in FORMATS.items():
            path = drawing.DEMO if how else Path(folder) / "int4"
            engine = Engine.from_pretrained(path, device="cpu", max_model_len=4096, max_num_seqs=8, **how)  # type: ignore[arg-type]
            if exact is None:
                asked = [c.messages() for kind in KINDS for c in held_out(kind, PER_KIND, SEED)]
                answers = engine.generate(asked, SamplingParams(temperature=0.0, max_new_tokens=300))
                tokens = [request.prompt + request.tokens for request in answers]
            wanted = points(engine.model.args.n_layers)
            trace = record_tokens(engine.model, tokens, Selection(tuple(wanted)), mtp=False)
            exact = exact or trace
            pairs = list(zip(trace.requests, exact.requests, strict=True))
            found = [quantiles([error for a, b in pairs for error in errors(a.points[point], b.points[point])])
                     for point in wanted]  # fmt: skip
            other = sum(int((a.points["logits"].argmax(-1) != b.points["logits"].argmax(-1)).sum()) for a, b in pairs)
            print(name, str(trace.numerics), found[-1], other, flush=True)
            if name != FLOAT32:
                rows.append({"format": name, "errors": found, "other_tokens": other})
    return {"checkpoint": "the demo", "requests": len(tokens), "tokens": sum(map(len, tokens)), "points": wanted,
            "quantiles": QUANTILES, "formats": rows}  # fmt: skip


def label(point: str) -> str:
    """A point for the axis."""
    if not point.startswith("layers."):
        return {"norm": "last\nnorm"}.get(point, point)
    _, layer, name = point.split(".")
    return f"layer {layer}\n" + {"after_attn": "attention", "hidden": "FFN"}[name]


def draw(record: dict[str, Any], target: Path, source: str = "") -> None:
    """A line for each format: the median token; from the first to the last quantile as a thin line at each point."""
    results = record["results"]
    at = range(len(results["points"]))
    low, _, high = results["quantiles"]
    figure, [[axes]] = drawing.panels(1, 1, (10.5, 5.4))
    n = len(results["formats"])
    for i, found in enumerate(results["formats"]):
        assert len(found["errors"]) == len(at), found["format"]
        x = [place + 0.09 * (i - (n - 1) / 2) for place in at]
        lows, medians, highs = ([100 * error[q] or None for error in found["errors"]] for q in range(3))
        colour = drawing.COLOURS[i]
        axes.plot(x, [m or float("nan") for m in medians], color=colour, marker=drawing.MARKERS[i], markersize=5,
                  linewidth=1.4, label=found["format"])  # fmt: skip
        for place, bottom, top in zip(x, lows, highs, strict=True):
            if bottom and top:
                axes.plot([place, place], [bottom, top], color=colour, linewidth=1)
    axes.set_yscale("log")
    axes.minorticks_off()
    bottom, top = axes.get_ylim()
    ticks = [n * 10.0**e for e in range(-3, 3) for n in (1, 2, 5) if bottom <= n * 10.0**e <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks(list(at), [label(point) for point in results["points"]])
    axes.set_xlim(-0.5, len(at) - 0.5)
    axes.set_ylabel("relative error of a token against float32, %")
    axes.set_xlabel("residual stream after …")
    drawing.plain(axes, "y")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    figure.subplots_adjust(left=0.085, right=0.985, top=0.97, bottom=0.2)
    about = f"{results['checkpoint']}, {results['tokens']:,} tokens: median, and the {low}th to the {high}th percentile"
    drawing.finish(figure, target, f"{about}. {drawing.origin(record)}", source)


if __name__ == "__main__":
    drawing.main("error_by_layer", draw, NAMES, compute)

"""Compares formats on some layers of a checkpoint of any size: W8A8, W8A16 and a BF16 cast with exact weights.

A layer is given hidden states, and only the weights that these tokens meet are read, in windows of rows: the memory it
takes depends on the widest tensor's window, not on the model (tests/verification/test_sample.py).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from core.errors import UserError
from verification.expected import Expected
from verification.sides import prompt_ids
from verification.trace import RequestTrace, RunNumerics
from verification.trace_reading import check_shapes, read_trace
from verification.weights import Weights

OUTPUTS = ("attn.out", "ffn.out", "hidden")


class Sampled(NamedTuple):
    """A layer in a format beside the exact one: relative errors of whole outputs, (n, H) as one vector; of experts the
    part of the choices that are others. `forced`: ffn.out where the exact router's experts and weights are given."""

    layer: int
    format: str
    attn_out: float
    ffn_out: float
    hidden: float
    other_experts: float | None = None  # None: a dense layer
    forced: float | None = None


def formats(weights: Weights) -> dict[str, RunNumerics]:
    """The formats that a checkpoint's weights can be computed in, by name."""
    found = {"BF16 cast": RunNumerics("bfloat16")}
    if weights.args.dtype == "fp8":
        ue8m0 = weights.args.scale_fmt
        found |= {"W8A8": RunNumerics("bfloat16", "fp8", ue8m0), "W8A16": RunNumerics("bfloat16", "bf16"),
                  "W8A8, FP8 latents": RunNumerics("bfloat16", "fp8", ue8m0, "fp8")}  # fmt: skip
    elif weights.args.is_quantised:
        found |= {"quantised weights, BF16 activations": RunNumerics("bfloat16", "bf16")}
    return found


def chosen_layers(asked: str | None, weights: Weights) -> list[int]:
    """The layers asked for ("0,3,60"), else the first, the first with experts, and the last. Raises UserError."""
    n = weights.args.n_layers
    if asked is None:
        return sorted({0, min(weights.args.n_dense_layers, n - 1), n - 1})
    try:
        layers = [int(word) for word in asked.split(",")]
    except ValueError:
        raise UserError(f"--layers {asked}: expected numbers such as 0,3,60") from None
    if outside := [layer for layer in layers if not 0 <= layer < n]:
        raise UserError(f"--layers {asked}: the model has layers 0 to {n - 1}, not {outside[0]}")
    return layers


def states(weights: Weights, layer: int, n: int, trace: str | Path | None) -> torch.Tensor:
    """What a layer is given, (n, H) float32: a trace's hidden states of its first request, or embeddings of token ids.
    Layers norm their input, so that its size does not matter to attention. Raises UserError."""
    name = "embed" if layer == 0 else f"layers.{layer - 1}.hidden"
    if trace is not None:
        found = read_trace(trace)
        check_shapes(found, weights.args, str(trace))
        if name not in found.requests[0].points:
            raise UserError(f"{trace}: {name} is missing, which layer {layer} takes")
        return found.requests[0].points[name][:n].float()
    ids = prompt_ids(weights.path, None, n, weights.args.vocab_size)
    return torch.cat([weights.exact("embed.weight", torch.float32, i, i + 1) for i in ids])


def sample_layers(
    path: str | Path, config: str | Path | None, layers: str | None, n: int, trace: str | Path | None = None
) -> list[Sampled]:
    """Every format at every layer. Raises UserError."""
    weights = Weights(path, config, cache_bytes=0)
    return [row for layer in chosen_layers(layers, weights)
            for row in sample_layer(weights, layer, states(weights, layer, n, trace))]  # fmt: skip


def sample_layer(weights: Weights, layer: int, x: torch.Tensor) -> list[Sampled]:
    """The formats at a layer that is given hidden states x (n, H)."""
    at, prefix = torch.arange(len(x)), f"layers.{layer}"
    dense = layer < weights.args.n_dense_layers
    choice = [] if dense else [f"{prefix}.ffn.ids", f"{prefix}.ffn.weights"]

    def run(numerics: RunNumerics, given: dict[str, torch.Tensor], wanted: Iterable[str]) -> dict[str, torch.Tensor]:
        """The layer's points in one format, each computed from those before it."""
        points = {"embed" if layer == 0 else f"layers.{layer - 1}.hidden": x, **given}
        request = RequestTrace("0", at, points)
        how = Expected(request, weights, numerics, dtype=torch.float32)
        for name in [name for name in how.known if name.startswith(f"{prefix}.") and name not in points]:
            how = how.instead({})  # keeps no weights of the op before
            points[name] = how.compute(name, at)
        return {name: points[name] for name in wanted}

    names = [f"{prefix}.{name}" for name in OUTPUTS]
    exact = run(RunNumerics(), {}, [*names, *choice, f"{prefix}.after_attn"])
    rows = []
    for name, numerics in formats(weights).items():
        found = run(numerics, {}, [*names, *choice])
        attn, ffn, hidden = (relative(found[point], exact[point]) for point in names)
        others = forced = None
        if not dense:
            others = other_experts(found[choice[0]], exact[choice[0]])
            given = {point: exact[point] for point in (*choice, f"{prefix}.after_attn")}
            forced = relative(run(numerics, given, [f"{prefix}.ffn.out"])[f"{prefix}.ffn.out"], exact[names[1]])
        rows.append(Sampled(layer, name, attn, ffn, hidden, others, forced))
    return rows


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    size = float(wanted.double().norm())
    return float((found.double() - wanted.double()).norm()) / size if size else float(found.double().norm())


def other_experts(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The part of the choices (n, K) that are not among those wanted."""
    return 1 - float((found[:, :, None] == wanted[:, None, :]).any(-1).double().mean())


def table(rows: list[Sampled]) -> str:
    """For people."""
    heads = f"{'attn.out':>9} {'ffn.out':>9} {'hidden':>9} {'other experts':>14} {'ffn.out, same experts':>22}"
    lines = [f"{'layer':>5}  {'format':36} {heads}"]
    for row in rows:
        others = "–" if row.other_experts is None else f"{row.other_experts:.1%}"
        forced = "–" if row.forced is None else f"{row.forced:.2g}"
        errors = f"{row.attn_out:9.2g} {row.ffn_out:9.2g} {row.hidden:9.2g}"
        lines.append(f"{row.layer:5}  {row.format:36} {errors} {others:>14} {forced:>22}")
    return "\n".join((*lines, "relative errors against exactly dequantised weights in float32"))

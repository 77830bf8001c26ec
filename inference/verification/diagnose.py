"""Which known mistake reproduces a value that diverges; failing that, what can be said of its shape."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from verification.expected import Expected, NotRecorded, kind_of
from verification.mistakes import MISTAKES, Inapplicable, Mistake
from verification.points import LAYER_POINTS, MTP_HEAD_POINTS, MTP_POINTS, split_name

ROWS = 24  # positions that a mistake must reproduce
CLOSE = 4.0  # tolerances within which a mistake's value counts as reproduced
MOST_LAYERS = 8  # that are recomputed with a mistake where a program recorded nothing between
BETTER = 0.2  # of the right computation's error, which a mistake must stay below
Difference = Callable[[Expected, str, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Cause(NamedTuple):
    """A mistake that explains a value: its name, its sentence, and the error that is left when it is made."""

    name: str
    sentence: str
    error: float
    certain: bool = True  # it is reproduced to rounding; otherwise only the best description there is


def causes(expected: Expected, name: str, worst: int, tolerance: float, difference: Difference) -> list[Cause]:
    """The mistakes that reproduce a point that diverges, the closest first, or what its value looks like."""
    at = chosen_positions(expected, name, worst)
    found = expected.recorded(name, at)
    assert found is not None
    if not bool(found.double().isfinite().all()):
        return [Cause("not-finite", "there are NaNs or infinities in it", math.inf)]

    def error_of(value: torch.Tensor) -> float:
        errors = difference(expected, name, found, value, at)
        return float(errors.double().mean() if name.endswith(".ids") else errors.max())

    right = error_of(expected.compute(name, at))
    explained: list[Cause] = []
    for known in candidates(expected, name):
        try:
            error = error_of(expected.instead(dict.fromkeys(known.points, known.how)).compute(name, at))
        except (Inapplicable, NotRecorded, KeyError, RuntimeError, AssertionError):
            continue  # this model cannot show it
        if error <= max(CLOSE * tolerance, 0.02 if name.endswith(".ids") else 0.0) and error < BETTER * right:
            explained.append(Cause(known.name, known.sentence, error))
    if explained:
        best = min(cause.error for cause in explained)
        close = [cause for cause in explained if cause.error <= max(3 * best, tolerance)]
        return sorted(close, key=lambda cause: cause.error > 3 * best + tolerance / 50)  # equals in the list's order
    if name.endswith(".ids"):
        return describe_choice(found, expected, name, at)
    return describe_values(expected, name, found, at, tolerance, difference)


def chosen_positions(expected: Expected, name: str, worst: int) -> torch.Tensor:
    """At most ROWS of a point's positions, evenly, with the worst."""
    at = expected.request.positions(name)
    step = max(len(at) // (ROWS - 1), 1)
    chosen = {*at[::step][: ROWS - 1].tolist(), worst}
    return torch.tensor(sorted(chosen & set(at.tolist())))


def candidates(expected: Expected, name: str) -> list[Mistake]:
    """The mistakes that can show at a point: of its own op, and of ops before it whose values were not recorded."""
    seen, todo, layers = {name}, [name], {split_name(name)[0]}
    while todo:
        for earlier in inputs_of(expected, todo.pop()):
            if earlier in expected.known and earlier not in expected.request.points and earlier not in seen:
                layers.add(split_name(earlier)[0])
                if len(layers) > MOST_LAYERS:
                    break
                seen.add(earlier)
                todo.append(earlier)
    kinds = {kind_of(earlier) for earlier in seen}
    return [known for known in MISTAKES if kinds.intersection(known.points) and known.applies(expected)]


def inputs_of(expected: Expected, name: str) -> list[str]:
    """The points that a point is computed from."""
    layer, rest = split_name(name)
    if not layer:
        last = f"layers.{expected.args.n_layers - 1}.hidden"
        return {"logits": ["norm"], "norm": [last]}.get(rest, [])
    table = (*MTP_HEAD_POINTS, *MTP_POINTS, *LAYER_POINTS) if layer.startswith("mtp.") else LAYER_POINTS
    inputs = next((point.inputs for point in table if point.name == rest), ())
    return [full_name(layer, earlier) for earlier in inputs if earlier != "tokens"]


def full_name(layer: str, name: str) -> str:
    """Of an input of one of a layer's points."""
    kind, number = layer.split(".")
    if name == "previous":
        return "norm"
    if name != "before":
        return f"{layer}.{name}"
    if kind == "mtp":
        return f"{layer}.combined"
    return "embed" if number == "0" else f"layers.{int(number) - 1}.hidden"


# --------------------------------------------------------------------------------------------------------------------
# Values that no mistake reproduces
# --------------------------------------------------------------------------------------------------------------------


def describe_values(
    expected: Expected, name: str, found: torch.Tensor, at: torch.Tensor, tolerance: float, difference: Difference
) -> list[Cause]:
    """What a value looks like beside the right one: a multiple, zeros, another position's, wrong in some channels."""
    right = expected.compute(name, at)
    if not bool(found.any()):
        return [Cause("zeros", "it is zero everywhere: it was never written", 1.0)]
    flat, wanted = found.flatten(1).double(), right.flatten(1).double()
    factor = float((flat * wanted).sum() / wanted.square().sum())
    left = float(difference(expected, name, found, right * factor, at).max()) / max(abs(factor), 1e-9)
    if left <= CLOSE * tolerance < abs(factor - 1):
        return [Cause("scaled", f"it is {factor:.6g} times what it should be", left)]
    if name.endswith("attn.o") and (fitted := fit_scale(expected, name, found, at, tolerance, difference)):
        return [fitted]
    for shift in (1, -1):
        other = at + shift
        rows = (other >= 0) & (other < int(expected.request.positions(name).max()) + 1)
        if int(rows.sum()) > 1:
            try:
                shifted = expected.compute(name, other[rows])
            except NotRecorded:
                continue
            if float(difference(expected, name, found[rows], shifted, at[rows]).max()) <= CLOSE * tolerance:
                where = "after" if shift > 0 else "before"
                return [Cause("shifted", f"it is the value of the position {where}: rows are shifted by one", 0.0)]
    bad_rows = difference(expected, name, found, right, at) > tolerance
    if 0 < int(bad_rows.sum()) < len(at):
        first = int(at[bad_rows][0])
        text = f"it is wrong at {int(bad_rows.sum())} of {len(at)} positions, the first of them {first}"
        return [Cause("some-positions", text, 1.0, False)]
    wrong = ((flat - wanted).norm(dim=0) / wanted.norm(dim=0).clamp(min=1e-30)) > max(8 * tolerance, 1e-3)
    if 0 < int(wrong.sum()) < len(wrong):
        at_channel = wrong.nonzero().flatten()
        shape = "x".join(map(str, found.shape[1:]))
        span = f"{int(at_channel[0])} to {int(at_channel[-1])}"
        text = f"{int(wrong.sum())} of {len(wrong)} channels ({shape}) are wrong, {span}"
        return [Cause("some-channels", text, 1.0, False)]
    return []


def fit_scale(
    expected: Expected, name: str, found: torch.Tensor, at: torch.Tensor, tolerance: float, difference: Difference
) -> Cause | None:
    """The softmax's scale that explains attention's output, if one does: searched for from an eighth to eight times."""
    layer = split_name(name)[0]

    def error(log: float) -> float:
        value = expected.attend(layer, at, scale=expected.args.softmax_scale * math.exp(log))
        return float(difference(expected, name, found, value, at).max())

    steps = [math.log(8) * i / 16 for i in range(-16, 17)]
    best = min(steps, key=error)
    lo, hi = best - math.log(8) / 16, best + math.log(8) / 16
    for _ in range(40):
        a, b = lo + (hi - lo) / 3, hi - (hi - lo) / 3
        lo, hi = (lo, b) if error(a) < error(b) else (a, hi)
    left, factor = error((lo + hi) / 2), math.exp((lo + hi) / 2)
    if left > CLOSE * tolerance:
        return None
    return Cause("scale-fitted", f"the softmax's scale is {factor:.6g} times what it should be", left)


def describe_choice(found: torch.Tensor, expected: Expected, name: str, at: torch.Tensor) -> list[Cause]:
    if bool((found.sort(-1).values[:, 1:] == found.sort(-1).values[:, :-1]).any()):
        return [Cause("repeated", "an expert is chosen twice for one token", 1.0)]
    return []

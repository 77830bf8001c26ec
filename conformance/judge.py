"""Compares a port's values with the right ones and with those of every known mistake.

An error is ||a - b|| / ||b|| of one position's row; a point's error is its worst position's. In float32 every position
counts. In a format that rounds, those where a router decides by less than CLEAR do not: rounding may turn them.
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

import goldens
from exact_network import Network
from families import FAMILIES, KEPT
from mistakes import MISTAKES

FORMATS = ("float32", "bfloat16", "w8a8", "w8a8-bfloat16")  # W8A8 with float32, or bfloat16, between the products
KINDS = ("logits", "mtp", "router", "latents", "hidden", "scales")
TOLERANCE = {  # by format, and by kind where it is another
    "float32": {"": 2e-5},
    "bfloat16": {"": 1.5e-1, "logits": 8e-2, "mtp": 8e-2},
    "w8a8": {"": 2e-3},
    "w8a8-bfloat16": {"": 4e-1, "logits": 2.5e-1, "mtp": 2.5e-1},
}
CLEAR = 0.01  # by how much the chosen experts must lead, or of V2 which part of the best score
SAME = 4.0  # within so many tolerances of a mistake's values an answer has these; within one, where a format rounds
GUARD = 1e-6  # how far what this machine computes may lie from the golden files


class Unusable(Exception):
    """One line about what a port gave."""


class Finding(NamedTuple):
    point: str
    error: float  # of the worst position; inf where other experts were chosen
    position: int
    tolerance: float
    typical: float  # the median of the positions' errors

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def kind(point: str) -> str:
    if point.endswith("logits") and "router" not in point:
        return "mtp" if point.startswith("mtp") else "logits"
    if point.endswith(".scale"):
        return "scales"
    if ".ffn.ids" in point or ".ffn.weights" in point or "router_logits" in point:
        return "router"
    return "latents" if point.endswith((".c_kv", ".k_rope", ".kv_a")) else "hidden"


def tolerance(point: str, format: str) -> float:
    return TOLERANCE[format].get(kind(point), TOLERANCE[format][""])


def is_w8a8(family: str, format: str) -> bool:
    return format.startswith("w8a8") and "quantization_config" in FAMILIES[family]


@cache
def network(family: str, w8a8: bool) -> Network:
    return Network(FAMILIES[family], w8a8)


@cache
def expected(family: str, w8a8: bool, mistake: str = "") -> dict[str, Tensor]:
    """Every point of the family's prompt, right or with a mistake. What is right is held to the golden file."""
    net = network(family, w8a8).copy()
    if mistake:
        MISTAKES[mistake].change(net)
    points = net.run(goldens.prompts()[family])
    if not mistake:
        prefix = "w8a8." if w8a8 else ""
        for name, value in goldens.read(family).items():
            point = name.removeprefix(prefix)
            if name == prefix + point and point in points and not point.endswith(".ids"):
                worst = float(row_errors(points[point][-len(value) :], value).max())
                if not worst < GUARD:
                    raise Unusable(
                        f"this machine computes other values than goldens/{family}.safetensors: {name}, {worst:.1e}"
                    )
    return points


@cache
def clear(family: str, w8a8: bool) -> Tensor:
    """Positions (T,) where every router decides clearly, and that are kept."""
    expected(family, w8a8)
    net = network(family, w8a8).copy()
    net.run(goldens.prompts()[family])
    return goldens.margins(net) >= CLEAR


def row_errors(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double().flatten(1), b.double().flatten(1)
    return (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-30)


def compare(answer: dict[str, Tensor], right: dict[str, Tensor], family: str, format: str) -> list[Finding]:
    """Each point that the answer has, in the order of execution. Where rows are fewer they are the last positions'."""
    found = []
    whole = clear(family, is_w8a8(family, format))
    for point, value in right.items():
        if point not in answer or point.endswith(".weights"):
            continue
        given = answer[point]
        first = len(value) - (len(given) if given.dim() else 0)
        if not given.dim() or first < 0 or given.shape[1:].numel() != value.shape[1:].numel():
            raise Unusable(f"{point} has shape {tuple(given.shape)}, expected {tuple(value.shape)} or fewer rows")
        value, given = value[first:], given.reshape(len(given), *value.shape[1:])
        counts = torch.arange(first, first + len(value)) >= len(whole) - KEPT
        if "bfloat16" in format:
            counts &= whole[first : first + len(value)]
        if point.endswith(".ids"):
            found += _routing(point, answer, right, given, value, counts, first, format)
            continue
        if not given.double().isfinite().all():
            raise Unusable(f"{point} is not finite")
        errors = row_errors(given, value)
        if point.endswith("_rope"):  # pairs may lie as halves: a layout, no mistake
            errors = torch.minimum(errors, row_errors(given, torch.cat((value[..., 0::2], value[..., 1::2]), -1)))
        if f"{point}.quantised" in right:  # and what is quantised at once may exist in no other form
            errors = torch.minimum(errors, row_errors(given, right[f"{point}.quantised"][first:]))
        found.append(_worst(point, errors, counts, first, format))
    return found


def _routing(
    point: str, answer: dict[str, Tensor], right: dict[str, Tensor], ids: Tensor, value: Tensor, counts: Tensor,
    first: int, format: str,
) -> list[Finding]:  # fmt: skip
    """Experts chosen, in any order, and their weights, where the same experts were chosen."""
    given, order = ids.long().sort(-1)
    wanted, own = value.long().sort(-1)
    same = (given == wanted).all(-1)
    found = [_worst(point, torch.where(same, 0.0, math.inf), counts, first, format)]
    name = point.removesuffix("ids") + "weights"
    if name in answer and bool(same[counts].all()):
        weights = answer[name].double().gather(-1, order), right[name][first:].gather(-1, own)
        found.append(_worst(name, row_errors(*weights), counts & same, first, format))
    return found


def _worst(point: str, errors: Tensor, counts: Tensor, first: int, format: str) -> Finding:
    shown = torch.where(counts, errors, -1.0)
    at = int(shown.argmax())
    typical = float(errors[counts].median()) if counts.any() else 0.0
    return Finding(point, max(float(shown[at]), 0.0), first + at, tolerance(point, format), typical)


class Distance(NamedTuple):
    """How far an answer lies from other values, in tolerances: the worst point's worst and median position."""

    worst: float
    typical: float

    def explains(self, right: "Distance", within: float) -> bool:
        """Whether the answer has these values, given its distance from the right ones. A rounding in another place
        moves some positions farther than a format's tolerance, so that the median decides; where even that is more, the
        right values must be five times farther. The right values are twice as far in any case."""
        if self.worst > 0.5 * right.worst:
            return False
        if self.typical <= within:
            return self.worst <= max(within, 0.3 * right.worst)
        return self.typical <= 0.2 * right.typical


def distance(answer: dict[str, Tensor], family: str, format: str, mistake: str = "") -> Distance:
    """From the right values, or from a mistake's."""
    values = expected(family, is_w8a8(family, format), mistake)
    if any(name in answer and value[0].numel() != answer[name][0].numel() for name, value in values.items()):
        return Distance(math.inf, math.inf)  # fewer experts, say
    found = compare(answer, values, family, format)
    return Distance(*(max(_number(value) / f.tolerance for f, value in row) for row in (
        [(f, f.error) for f in found], [(f, f.typical) for f in found])))  # fmt: skip


def _number(error: float) -> float:
    return min(error, 10.0)  # other experts, or nonsense


class Named(NamedTuple):
    """A known mistake, the families whose answers have its values, and how far these are, in tolerances."""

    name: str
    families: tuple[str, ...]
    distance: float


def diagnose(answers: dict[str, dict[str, Tensor]], format: str, failed: Iterable[str]) -> list[Named]:
    """The known mistakes whose values the failed answers are: one that explains all of them, otherwise one for each
    part of them. A mistake that would show in a family that passed is none. Two that differ by less than the format's
    rounding are both there, the nearer first. Where all points together are nobody's, the logits alone are asked."""
    logits = {
        family: {p: v for p, v in answer.items() if kind(p) in ("logits", "mtp")} for family, answer in answers.items()
    }
    left = sorted(failed, key=lambda family: len(goldens.prompts()[family]))
    known = [m.name for m in MISTAKES.values() if format.startswith(m.format)]
    near = {family: _near(logits[family], family, format, known) for family in left}
    if all(len(logits[family]) == len(answers[family]) for family in answers):
        return _cover(near, logits, format)
    wrong = {family: distance(logits[family], family, format).worst > 1 for family in left}
    near_all = {f: _near(answers[f], f, format, list(near[f]) if wrong[f] else known) for f in left}
    return _cover(near_all, answers, format) or _cover(near, logits, format)


def _near(answer: dict[str, Tensor], family: str, format: str, known: list[str]) -> dict[str, float]:
    """The mistakes that explain an answer, and how far its typical value is from theirs."""
    right = distance(answer, family, format)
    far = {name: distance(answer, family, format, name) for name in known}
    return {name: d.typical for name, d in far.items() if d.explains(right, _within(format))}


def _within(format: str) -> float:
    return 1.0 if "bfloat16" in format else SAME


def _cover(near: dict[str, dict[str, float]], answers: dict[str, dict[str, Tensor]], format: str) -> list[Named]:
    """Of each failed family's mistakes those that explain the most families together, until none is left over."""
    passed = [family for family in answers if family not in near]
    left, found = list(near), list[Named]()
    excluded: set[str] = set()  # what would have shown in a family that passed

    def shows(name: str) -> bool:
        return any(distance(answers[family], family, format, name).worst > _within(format) for family in passed)

    while left:
        explained: dict[str, list[str]] = {}
        for family in left:
            for name in near[family]:
                if name not in excluded:
                    explained.setdefault(name, []).append(family)
        if not explained:
            break
        best = max(explained, key=lambda name: (len(explained[name]), -max(near[f][name] for f in explained[name])))
        if shows(best):
            excluded.add(best)
            continue
        same = sorted(
            (max(near[f][name] for f in own), name) for name, own in explained.items() if own == explained[best]
        )
        nearest = max(near[family][best] for family in explained[best])
        close = [(d, name) for d, name in same if name == best or (d <= 2 * nearest + 0.1 and not shows(name))]
        found += [Named(name, tuple(explained[best]), d) for d, name in close]
        left = [family for family in left if family not in explained[best]]
    return found

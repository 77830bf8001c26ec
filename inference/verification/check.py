"""Judges a trace op by op: the first point that diverges beyond rounding, where, by how much, and the likely cause."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from core.config import ModelArgs
from core.errors import UserError
from verification import mistakes_attention, mistakes_formats, mistakes_moe, mistakes_norms  # noqa: F401
from verification.diagnose import Cause, causes
from verification.expected import Expected, NotRecorded, group_worth, kind_of, quantise
from verification.points import describe, names_of, split_name
from verification.tolerances import QUANTISED, QUANTISED_CHAIN, TIES, roundoff, tolerance
from verification.trace import RequestTrace, Trace
from verification.trace_reading import StoredPoints, check_shapes
from verification.weights import Weights

QUANTISED_POINTS = ("attn_norm", "attn.c_q", "attn.o", "ffn_norm")  # a W8A8 run may record them as it quantised them
MAX_DIAGNOSED = 12  # points of one request


class Judged(NamedTuple):
    """A point of a request. `local`: the largest relative error of a position's value against what it should be, given
    the run's own inputs; of ids the part of the positions whose choice no tie explains. `position`: where."""

    name: str
    rows: int
    local: float
    position: int
    tolerance: float
    accumulated: float | None = None  # against another run's value
    note: str = ""  # why it was not judged, or how

    @property
    def diverges(self) -> bool:
        return not self.local <= self.tolerance and not math.isnan(self.tolerance)

    @property
    def judged(self) -> bool:
        return not math.isnan(self.tolerance)


@dataclass
class RequestReport:
    """What was found in one request: every point in order, and of those that diverge the first few with causes."""

    name: str
    points: list[Judged] = field(default_factory=list)
    causes: dict[str, list[Cause]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # points that the run did not record

    @property
    def first(self) -> Judged | None:
        return next((judged for judged in self.points if judged.diverges), None)


@dataclass
class Report:
    """The outcome of a check."""

    what: str  # the run that was judged
    against: str  # the run that accumulated errors are measured against; empty: none
    numerics: str
    requests: list[RequestReport] = field(default_factory=list)

    @property
    def diverges(self) -> bool:
        return any(request.first for request in self.requests)

    @property
    def first(self) -> tuple[RequestReport, Judged] | None:
        """The first divergence of the first request that has one."""
        return next(((request, request.first) for request in self.requests if request.first), None)


def check(
    trace: Trace, weights: Weights, other: Trace | None = None, *, what: str = "the trace", against: str = "",
    dtype: torch.dtype = torch.float64, diagnose: bool = True,
) -> Report:  # fmt: skip
    """Judges every recorded point of a trace of the model that `weights` holds, and measures how far it is from
    `other`, a run on the same tokens. Raises UserError where the trace is not of this model, or `other` of other
    tokens."""
    check_shapes(trace, weights.args, what)
    report = Report(what, against, str(trace.numerics))
    for request in trace.requests:
        reference = None
        if other is not None:
            reference = matching_request(request, other, what, against)
        report.requests.append(check_request(request, trace, weights, reference, dtype, diagnose))
    return report


def matching_request(request: RequestTrace, other: Trace, what: str, against: str) -> RequestTrace:
    """The other run's request on the same tokens. One may have run further than the other. Raises UserError."""
    name = request.name if request.name in other.names else other.names[0]
    found = other.request(name) if len(other.names) > 1 else other.requests[0]
    n = min(len(request.tokens), len(found.tokens))
    differ = (request.tokens[:n] != found.tokens[:n]).nonzero().flatten()
    if len(differ):
        at = int(differ[0])
        own, theirs = int(request.tokens[at]), int(found.tokens[at])
        run = against or "the other run"
        raise UserError(f"{what}: request {request.name} has token {own} at position {at}, {run} has {theirs}: "
                        "compare runs on the same tokens")  # fmt: skip
    return found


def check_request(
    request: RequestTrace,
    trace: Trace,
    weights: Weights,
    other: RequestTrace | None = None,
    dtype: torch.dtype = torch.float64,
    diagnose: bool = True,
) -> RequestReport:
    """Judges one request's points in order."""
    expected = Expected(request, weights, trace.numerics, trace.rope_layout == "halves", dtype)
    known = names_of(weights.args, weights.has_mtp)
    report = RequestReport(request.name, missing=[name for name in known if name not in request.points])
    layer = ""
    for name in known:
        if split_name(name)[0] != layer:
            layer = split_name(name)[0]
            expected = expected.instead({})  # forgets the values of the layer before
        if name not in request.points:
            continue
        judged = judge(expected, name, stored_dtype(request, name))
        if other is not None and name in other.points:
            halves = trace.rope_layout == "halves"
            judged = judged._replace(accumulated=accumulated(expected, other, weights, name, dtype, halves))
        report.points.append(judged)
        if judged.diverges and diagnose and len(report.causes) < MAX_DIAGNOSED:
            report.causes[name] = causes(expected, name, judged.position, judged.tolerance, difference)
    return report


def stored_dtype(request: RequestTrace, name: str) -> torch.dtype:
    points = request.points
    return points.entries[name].dtype if isinstance(points, StoredPoints) else points[name].dtype


def judge(expected: Expected, name: str, stored: torch.dtype) -> Judged:
    """A recorded point against what it should be."""
    kind = kind_of(name)
    at = expected.request.positions(name)
    limit = tolerance(expected.numerics, kind.removeprefix("mtp."), stored)
    if not len(at):
        return Judged(name, 0, 0.0, -1, math.nan, note="no rows")
    found = expected.recorded(name, at)
    assert found is not None
    try:
        wanted = expected.compute(name, at)
    except NotRecorded as e:
        return Judged(name, len(at), math.nan, -1, math.nan, note=f"not judged: {e} was not recorded")
    errors = difference(expected, name, found, wanted, at)
    if expected.numerics.gemm == "fp8" and kind in QUANTISED_POINTS and not bool((errors <= limit).all()):
        quantised = quantise(wanted.flatten(1), expected.numerics.scale_fmt == "ue8m0").view_as(wanted)
        as_quantised = difference(expected, name, found, quantised, at)
        if float(as_quantised.max()) < float(errors.max()):
            errors, limit = as_quantised, QUANTISED_CHAIN if kind == "attn.o" else QUANTISED
    worst = int(errors.nan_to_num(math.inf).argmax())
    local = float(errors[worst])
    if kind == "ffn.ids":
        local, limit = float((errors > 0).double().mean()), 0.0
    return Judged(name, len(at), math.inf if math.isnan(local) else local, int(at[worst]), limit)


def difference(
    expected: Expected, name: str, found: torch.Tensor, wanted: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """The error (n,) of each position: relative in the 2-norm; of ids 1 where other experts were chosen than a tie
    could explain."""
    if name.endswith(".ids"):
        return choice_errors(expected, name, found, wanted, at)
    x, y = found.flatten(1).double(), wanted.flatten(1).double()
    size = y.norm(dim=-1)
    return (x - y).norm(dim=-1) / torch.where(size > 0, size, torch.ones_like(size))


def choice_errors(
    expected: Expected, name: str, found: torch.Tensor, wanted: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """1.0 for each position where the experts chosen are not those wanted, nor as good within rounding."""
    args, layer = expected.args, split_name(name)[0]
    errors = (found.sort(-1).values != wanted.sort(-1).values).any(-1).double()
    for row in errors.nonzero().flatten().tolist():
        ids = found[row]
        if len(ids.unique()) < len(ids) or int(ids.min()) < 0 or int(ids.max()) >= args.n_routed_experts:
            continue
        here = at[row : row + 1]
        logits = expected.value(f"{layer}.ffn.router_logits", here)
        choice = expected.biased(layer, expected.scores(logits))[0]
        recorded = f"{layer}.ffn.router_logits" in expected.request.points
        stored = stored_dtype(expected.request, f"{layer}.ffn.router_logits") if recorded else torch.float32
        close = TIES * roundoff(expected.numerics, "ffn.router_logits", stored) * max(1.0, float(logits.abs().max()))
        if regret(choice, ids, args) <= close:
            errors[row] = 0
    return errors


def regret(choice: torch.Tensor, found: torch.Tensor, args: ModelArgs) -> float:
    """By how much scores (E,) would have to change for the experts `found` (K,) to be the best: for their groups to be
    open, and within the open groups. Infinite where they lie in more groups than may be open."""
    n_groups = args.n_expert_groups if args.topk_method != "greedy" else 1
    per = len(choice) // n_groups
    gap, open_groups = 0.0, set(range(n_groups))
    if n_groups > 1:
        worth = group_worth(choice.view(1, n_groups, per), args)[0]
        used = {int(e) // per for e in found}
        kept = args.n_limited_groups
        if len(used) > kept:
            return math.inf
        rest = sorted((g for g in range(n_groups) if g not in used), key=lambda g: -float(worth[g]))
        open_groups = used | set(rest[: kept - len(used)])
        closed = [float(worth[g]) for g in range(n_groups) if g not in open_groups]
        if closed:
            gap = max(0.0, max(closed) - min(float(worth[g]) for g in open_groups)) / 2
    chosen = set(found.tolist())
    others = [float(choice[e]) for e in range(len(choice)) if e // per in open_groups and e not in chosen]
    if others:
        gap = max(gap, max(others) - min(float(choice[e]) for e in chosen))
    return max(gap, 0.0)


def accumulated(
    expected: Expected, other: RequestTrace, weights: Weights, name: str, dtype: torch.dtype, halves: bool
) -> float | None:
    """The largest relative difference of a position's value from another run's, of ids the part of positions with other
    experts; None where the two have no position in common."""
    reader = Expected(other, weights, dtype=dtype)
    both = sorted(set(expected.request.positions(name).tolist()) & set(other.positions(name).tolist()))
    if not both:
        return None
    at = torch.tensor(both)
    x, y = expected.recorded(name, at), reader.recorded(name, at)
    assert x is not None and y is not None
    if name.endswith(".ids"):
        return float((x.sort(-1).values != y.sort(-1).values).any(-1).double().mean())
    if name.endswith(".weights"):
        ids = name.removesuffix("weights") + "ids"
        own, others = expected.recorded(ids, at), reader.recorded(ids, at)
        if own is not None and others is not None:
            n = weights.args.n_routed_experts
            x, y = dense_weights(x, own, n), dense_weights(y, others, n)
    errors = (x.flatten(1) - y.flatten(1)).norm(dim=-1) / y.flatten(1).norm(dim=-1).clamp(min=1e-30)
    return float(errors.max())


def dense_weights(g: torch.Tensor, ids: torch.Tensor, n_experts: int) -> torch.Tensor:
    """Gating values (n, K) as those of all experts, (n, E)."""
    return g.new_zeros(len(g), n_experts).scatter_(1, ids, g)


def by_layer(report: RequestReport) -> Iterator[tuple[str, list[Judged]]]:
    """The points of each layer, in order; the model's own under ""."""
    layers: dict[str, list[Judged]] = {}
    for judged in report.points:
        layers.setdefault(split_name(judged.name)[0], []).append(judged)
    yield from layers.items()


def sentence(judged: Judged) -> str:
    """A divergence in words."""
    where = f"{judged.name}: {describe(judged.name)}"
    if judged.name.endswith(".ids"):
        return f"{where}; other experts at {judged.local:.1%} of the positions, such as {judged.position}, and no ties"
    size = f"relative error {judged.local:.2g} at position {judged.position}"
    return f"{where}; {size}, where {judged.tolerance:.1g} is rounding"

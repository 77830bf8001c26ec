"""A check's report as text and as JSON."""

import json
import math
from collections.abc import Iterator
from typing import Any

from verification.check import Judged, Report, RequestReport, by_layer, sentence
from verification.diagnose import Cause

MAX_OTHERS = 8  # divergences after the first that are told


def text(report: Report) -> str:
    """The first divergence and what such an error usually means, the other divergences, and a table by layer."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.what}: {report.numerics}"
    for request in report.requests:
        n = sum(judged.judged for judged in request.points)
        yield ""
        yield f"request {request.name}: {n} values judged, each op by its own inputs"
        if request.first is None:
            worst = max((j for j in request.points if j.judged and j.tolerance), key=share, default=None)
            yield "no divergence: every value is what it should be, within rounding" if n else "nothing could be judged"
            if worst is not None:
                yield f"nearest to its tolerance: {worst.name}, {worst.local:.2g} of {worst.tolerance:.2g}"
        else:
            yield f"FIRST DIVERGENCE  {sentence(request.first)}"
            yield from (f"  {line}" for line in _said(request.causes.get(request.first.name, [])))
            yield from _others(request, request.first)
        for note in sorted({judged.note for judged in request.points if judged.note}):
            yield f"note: {note}"
        if request.missing:
            yield f"not recorded: {_names(request.missing)}"
        yield ""
        yield from _table(request, report.against)


def _said(causes: list[Cause]) -> Iterator[str]:
    if not causes:
        yield "no known mistake reproduces it"
    for i, cause in enumerate(causes[:4]):
        how = "likely" if cause.certain else "it looks so"
        left = f"; made here, {cause.error:.1g} is left" if cause.certain and math.isfinite(cause.error) else ""
        yield f"{'or' if i else how}: {cause.sentence} ({cause.name}{left})"


def _others(request: RequestReport, first: Judged) -> Iterator[str]:
    """Other points that diverge by their own inputs; the same mistake in several layers is told once."""
    told = {_kinds(request.causes.get(first.name, []))} - {()}
    shown = more = 0
    for judged in request.points:
        if not judged.diverges or judged is first:
            continue
        kinds = _kinds(request.causes.get(judged.name, []))
        if kinds and kinds in told:
            continue
        told.add(kinds)
        if shown == MAX_OTHERS:
            more += 1
            continue
        shown += 1
        yield f"also  {sentence(judged)}"
        yield from (f"  {line}" for line in _said(request.causes.get(judged.name, [])))
    if more:
        yield f"and {more} more values diverge by their own inputs"


def _kinds(causes: list[Cause]) -> tuple[str, ...]:
    return tuple(cause.name for cause in causes)


def _names(names: list[str], n: int = 6) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _table(request: RequestReport, against: str) -> Iterator[str]:
    """Of each layer the op nearest to its tolerance or furthest beyond it, and its last value's accumulated error."""
    heads = f"{'':10} {'largest local error':>20} {'tolerances':>10}  {'at':24}"
    yield heads + (f" {'accumulated':>12}" if against else "")
    for layer, points in by_layer(request):
        judged = [point for point in points if point.judged]
        if not judged:
            continue
        worst = max(judged, key=share)
        last = points[-1].accumulated
        row = f"{layer or 'model':10} {worst.local:20.2g} {min(share(worst), 9999):10.2f}  {worst.name:24}"
        yield row + (f" {last:12.2g}" if against and last is not None else "")
    if against:
        yield f"accumulated: of a layer's last value, against {against}"


def share(judged: Judged) -> float:
    """A local error as a multiple of its tolerance."""
    if judged.tolerance:
        return judged.local / judged.tolerance
    return math.inf if judged.local else 0.0


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain values; numbers that are not finite are null."""
    return {
        "what": report.what, "against": report.against, "numerics": report.numerics, "diverges": report.diverges,
        "requests": [
            {
                "name": request.name,
                "first": request.first.name if request.first else None,
                "missing": request.missing,
                "points": [_plain(judged) | {"diverges": judged.diverges} for judged in request.points],
                "causes": {name: [_plain(cause) for cause in causes] for name, causes in request.causes.items()},
            }
            for request in report.requests
        ],
    }  # fmt: skip


def _plain(row: Judged | Cause) -> dict[str, Any]:
    values = row._asdict().items()
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values}


def dumps(report: Report) -> str:
    return json.dumps(to_json(report), indent=1) + "\n"

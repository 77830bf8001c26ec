"""A check's report as one self-contained page: what was found, a picture of the errors by layer, and every value."""

import html
import math
from collections.abc import Iterator

from verification.check import Judged, Report, RequestReport, sentence
from verification.points import describe, split_name

WIDTH, HEIGHT, LEFT, BELOW = 960, 320, 56, 40
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1b1f24; background: #fff }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .15rem .6rem; text-align: left; border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums } tr.bad { background: #fde8e6 } .first { background: #fde8e6; padding: .6rem 1rem }
.ok { background: #e7f4e8; padding: .6rem 1rem } svg text { font: 11px system-ui, sans-serif; fill: currentColor } code { font-size: 13px }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #16181c } tr.bad, .first { background: #4a2320 }
.ok { background: #1e3a22 } td, th { border-color: #333 } }
""".strip()
LOCAL, ACCUMULATED, LIMIT = "#c4572e", "#3b6fb6", "#8a8a8a"


def page(report: Report) -> str:
    """The page. It loads nothing."""
    title = html.escape(f"Verification of {report.what}")
    body = "\n".join(part for request in report.requests for part in _request(request, report))
    return (f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n<style>\n{STYLE}\n</style>\n'
            f"<h1>{title}</h1>\n<p>{html.escape(report.numerics)}</p>\n{body}\n</html>\n")  # fmt: skip


def _request(request: RequestReport, report: Report) -> Iterator[str]:
    yield f"<h2>Request {html.escape(request.name)}</h2>"
    if request.first is None:
        yield '<p class="ok">No divergence: every value is what it should be by its own inputs, within rounding.</p>'
    else:
        yield f'<div class="first"><p><b>First divergence:</b> {html.escape(sentence(request.first))}</p>'
        for cause in request.causes.get(request.first.name, []):
            yield f"<p>{html.escape(cause.sentence)} <code>{html.escape(cause.name)}</code></p>"
        yield "</div>"
    yield picture(request, report.against)
    yield "<table><tr><th>value</th><th>what</th><th>local error</th><th>tolerance</th><th>accumulated</th><th>position</th></tr>"
    for judged in request.points:
        cells = (f"<td><code>{html.escape(judged.name)}</code></td><td>{html.escape(describe(judged.name))}</td>"
                 f'<td class="n">{_number(judged.local)}</td><td class="n">{_number(judged.tolerance)}</td>'
                 f'<td class="n">{_number(judged.accumulated)}</td><td class="n">{judged.position}</td>')  # fmt: skip
        yield f"<tr{' class=bad' if judged.diverges else ''}>{cells}</tr>"
    yield "</table>"


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2g}"


def picture(request: RequestReport, against: str) -> str:
    """Errors of every value in the order of execution, by layer, on a logarithmic scale: local, tolerance, accumulated.
    SVG."""
    points = [point for point in request.points if point.judged and not point.name.endswith(".ids")]
    if not points:
        return ""
    lowest, highest = 1e-9, 10.0
    span = math.log10(highest / lowest)

    def y(value: float) -> float:
        value = min(max(value, lowest), highest)
        return 10 + (HEIGHT - BELOW - 10) * (1 - math.log10(value / lowest) / span)

    def x(i: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * i / max(len(points) - 1, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="errors by layer">']
    for exponent in range(-9, 2, 2):
        at = y(10.0**exponent)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{at:.1f}" y2="{at:.1f}" stroke="{LIMIT}" stroke-opacity=".25"/>'
                     f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">1e{exponent}</text>')  # fmt: skip
    parts += _layers(points, x)
    parts.append(_line([(x(i), y(p.tolerance)) for i, p in enumerate(points)], LIMIT, "4 3"))
    with_other = [(x(i), y(p.accumulated)) for i, p in enumerate(points) if p.accumulated is not None]
    parts.append(_line(with_other, ACCUMULATED))
    for i, point in enumerate(points):
        size, text = (4 if point.diverges else 2), html.escape(f"{point.name}: {point.local:.2g}")
        parts.append(f'<circle cx="{x(i):.1f}" cy="{y(point.local):.1f}" r="{size}" fill="{LOCAL}"><title>{text}</title></circle>')
    legend = [("local error", LOCAL), ("tolerance", LIMIT), *([(f"accumulated, against {against}", ACCUMULATED)] if with_other else [])]
    for i, (words, colour) in enumerate(legend):
        parts.append(f'<text x="{LEFT + i * 150}" y="{HEIGHT - 4}" style="fill:{colour}">● {html.escape(words)}</text>')
    return "".join((*parts, "</svg>"))


def _layers(points: list[Judged], x: object) -> Iterator[str]:
    """A mark and a name where each layer begins; of many layers some names."""
    starts = [i for i, point in enumerate(points) if not i or split_name(point.name)[0] != split_name(points[i - 1].name)[0]]
    every = max(len(starts) // 12, 1)
    for n, i in enumerate(starts):
        at = x(i)  # type: ignore[operator]
        name = split_name(points[i].name)[0].replace("layers.", "")
        yield f'<line x1="{at:.1f}" x2="{at:.1f}" y1="10" y2="{HEIGHT - BELOW}" stroke="{LIMIT}" stroke-opacity=".35"/>'
        if n % every == 0 and name:
            yield f'<text x="{at + 2:.1f}" y="{HEIGHT - BELOW + 14}">{html.escape(name)}</text>'


def _line(at: list[tuple[float, float]], colour: str, dashes: str = "") -> str:
    if not at:
        return ""
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.2" stroke-dasharray="{dashes}"/>'

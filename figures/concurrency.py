"""Draws concurrency.png, tokens a second over sequences at a time, from benchmarks/results/lane_throughput.json,
offline_throughput.json and cpu_forms.json:

    python figures/concurrency.py

Above two processes share a model in three ways (lane_throughput.py, without a slowed link). Below one process drafts up
to three tokens a step (offline_throughput.py), or has its weights in one of four forms (bench_cpu.py --forms).
"""

from pathlib import Path
from typing import Any

import drawing

NAMES = ("lane_throughput.json", "offline_throughput.json", "cpu_forms.json")
DECODE = {"decode at 512": 1, "decode, 8 sequences": 8}  # sequences of a case of bench_cpu.py
WAYS = ("tensor parallel", "lanes", "pipeline")


def lanes(record: dict[str, Any], model: str) -> dict[str, dict[int, float]]:
    """Tokens a second by way and sequences."""
    rows = [row for row in record["results"] if row["model"] == model and row["link"] is None]
    return {way: {row["concurrent"]: row[way]["tokens_s"] for row in rows if way in row} for way in WAYS}


def drafts(record: dict[str, Any]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in record["results"]["mtp"]:
        name = f"{row['k'] or 'no'} draft{'s' * (row['k'] != 1)}"
        found.setdefault(name, {})[row["sequences_at_a_time"]] = row["tokens_per_second"]
    return found


def forms(record: dict[str, Any]) -> dict[str, dict[int, float]]:
    """This engine's forms, best turns."""
    found: dict[str, dict[int, float]] = {}
    for group in record["results"]["groups"]:
        for row in group["rows"]:
            for side, speed in row["tok_s"].items():
                if row["name"] in DECODE and " " not in side:
                    found.setdefault(side.upper().replace("BF16", "bfloat16"), {})[DECODE[row["name"]]] = speed["best"]
    return found


def draw(lane_record: dict[str, Any], draft_record: dict[str, Any], form_record: dict[str, Any], target: Path,
         source: str = "") -> None:  # fmt: skip
    """Four panels, logarithmic on both axes, a line to each way."""
    ranks = "two processes of one core"
    parts = (
        (f"the demo, {ranks}", lanes(lane_record, "the demo"), lane_record),
        (f"1.7 B parameters, {ranks}", lanes(lane_record, "1.7 B"), lane_record),
        ("the demo, tokens drafted a step", drafts(draft_record), draft_record),
        ("1.7 B parameters, form of the weights", forms(form_record), form_record),
    )
    figure, grid = drawing.panels(2, 2, (10, 7.4))
    for axes, (title, lines, record) in zip(grid.flat, parts, strict=True):
        for i, (name, line) in enumerate(lines.items()):
            at = sorted(line)
            axes.plot(at, [line[n] for n in at], marker=drawing.MARKERS[i], color=drawing.COLOURS[i], label=name)
        at = sorted({n for line in lines.values() for n in line})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(at, [str(n) for n in at])
        axes.minorticks_off()
        bottom, top = axes.get_ylim()
        ticks = [n * 10**e for e in range(5) for n in (1, 2, 5) if bottom <= n * 10**e <= top]
        axes.set_yticks(ticks, [f"{n:,}" for n in ticks])
        axes.set_title(f"{title}\n", fontsize=10.5)
        said = drawing.origin(record)
        axes.text(0.5, 1.02, said, transform=axes.transAxes, ha="center", fontsize=8, color=drawing.GREY)
        axes.set_xlabel("sequences at a time")
        axes.set_ylabel("tokens/s, all sequences")
        drawing.plain(axes)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    figure.subplots_adjust(left=0.085, right=0.985, top=0.93, bottom=0.095, hspace=0.45, wspace=0.22)
    about = "Both axes are logarithmic. Panels are of different machines: compare the lines of one panel."
    drawing.finish(figure, target, about, source)


if __name__ == "__main__":
    drawing.main("concurrency", draw, NAMES)

"""Draws roofline.png, the CPU kernels under what memory and processor give, from benchmarks/results/kernel_cpu.json:

    python figures/roofline.py

A point is a case of kernel_cpu.py: operations a byte of weights (or latents) that the case reads, and operations a
second. The lines are what memory and processor give: the speed at which torch sums memory times operations a byte, and
the fastest product of the record, be it torch's in cache (`peak_gflops`) or any side's of a case; the picture says
whose. Cases in several forms of weights are not drawn.
"""

from pathlib import Path
from typing import Any

import drawing

NAMES = ("kernel_cpu.json",)
KINDS = {  # words in a row's name; the last that fit
    "products": " by ", "experts": "experts, ", "attention, decode": "attention, ", "attention, prompt": " rows at ",
}  # fmt: skip
OTHERS = ("F.linear", "oneDNN, packed", "loop over F.linear", "reference", "torch")


def kind_of(name: str) -> str:
    """The last kind whose words stand in a row's name; empty: none."""
    return next((kind for kind, words in reversed(KINDS.items()) if words in name), "")


def peak(results: dict[str, Any]) -> tuple[float, str]:
    """GFLOP/s that the processor gives, and how that is known."""
    names = {side: "this engine" if side == "ours" else side for side in ("ours", *OTHERS)}
    of_cases = [(row[side]["gflops"], name) for row in results["rows"] for side, name in names.items() if side in row]
    most, who = max([*of_cases, (results.get("peak_gflops", 0), "torch in cache")])
    return most, f"the fastest product of all, {who}"


def draw(record: dict[str, Any], target: Path, source: str = "") -> None:
    """Logarithmic on both axes; filled: this engine's kernels; hollow: the fastest other of the same case."""
    results = record["results"]
    read, (most, how) = results["read_gb_s"], peak(results)
    figure, [[axes]] = drawing.panels(1, 1, (9.5, 5.6))
    intensities = []
    for kind, colour, marker in zip(KINDS, drawing.COLOURS, drawing.MARKERS, strict=False):
        rows = [row for row in results["rows"] if kind_of(row["name"]) == kind and "ours" in row]
        others = [[row[side] for side in OTHERS if side in row] for row in rows]
        fastest = [max(sides, key=lambda at: at["gflops"]) for sides in others if sides]
        look = dict(color=colour, marker=marker, linestyle="", markersize=8)
        for points, fill, label in (([row["ours"] for row in rows], "full", kind), (fastest, "none", None)):
            x = [at["gflops"] / at["gb_s"] for at in points]
            if x:
                axes.plot(x, [at["gflops"] for at in points], fillstyle=fill, label=label, **look)
            intensities += x
    axes.plot([], [], "o", color=drawing.GREY, fillstyle="none", markersize=8, label="fastest other of the same case")
    left, right = min(intensities) / 1.6, max(intensities) * 1.8
    ridge = most / read
    axes.plot([left, ridge, right], [left * read, most, most], color="#20242c", linewidth=1.6)
    beside = dict(textcoords="offset points", fontsize=9)
    at = (left * ridge) ** 0.5
    axes.annotate(f"memory read: {read:.0f} GB/s", (at, at * read), xytext=(-10, 4), ha="right", **beside)
    axes.annotate(f"{most:,.0f} GFLOP/s: {how}", (right, most), xytext=(-4, 6), ha="right", **beside)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(top=most * 1.7)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("operations a byte of weights or latents (FLOP/byte)")
    axes.set_ylabel("GFLOP/s")
    drawing.plain(axes)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.085, right=0.98, top=0.97, bottom=0.155)
    drawing.finish(figure, target, f"bfloat16. {drawing.origin(record)}", source)


if __name__ == "__main__":
    drawing.main("roofline", draw, NAMES)

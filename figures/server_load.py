"""Draws server_load.png, beside this script, from benchmarks/results/online_serving.json:

    python figures/server_load.py

What clients saw of this engine's server and of `transformers serve` at several rates of requests (online_serving.py).
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results" / "online_serving.json"
COLOURS = {"server.py": "#3457d5", "transformers serve": "#c39a5b"}
PANELS = (
    ("answers, tokens/s", lambda side: {"": side["tokens_per_second"]}, "linear"),
    ("first token, s", lambda side: side["first_token_s"], "log"),
    ("between tokens, s", lambda side: side["between_tokens_s"], "log"),
    ("whole answer, s", lambda side: side["end_to_end_s"], "log"),
)
STYLES = {"": "-", "p50": "-", "p99": "--"}


def draw(record: dict[str, Any], target: Path) -> None:
    """A panel for each measure; a line for each server, and for latencies the median and the 99th percentile."""
    rows = record["results"]["rows"]
    rates = ["all" if isinstance(row["rate"], str) else f"{row['rate']:g}" for row in rows]
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": "#20242c"})
    figure, panels = plt.subplots(1, len(PANELS), figsize=(13, 3.8), dpi=160)
    for axes, (title, values, scale) in zip(panels, PANELS, strict=True):
        for side, colour in COLOURS.items():
            measured = [values(row[side]) if side in row else {} for row in rows]
            for percentile, style in STYLES.items():
                if any(percentile in found for found in measured):
                    line = [found.get(percentile) for found in measured]
                    axes.plot(rates, line, style, color=colour, marker="o", markersize=3,
                              label=f"{side} {percentile}".strip())  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_yscale(scale)
        axes.set_xlabel("requests/s")
        axes.grid(axis="y", color="#e9ebef")
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
    lines, labels = panels[1].get_legend_handles_labels()
    figure.legend(lines, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=9)
    machine = f"{record['machine']['cpu']}, {record['machine']['cores']} cores"
    said = f"{record['results']['checkpoint']}, {machine}, {record['date']}"
    figure.text(0.5, 0.01, said, ha="center", fontsize=8.5, color="#767c88")
    figure.subplots_adjust(left=0.045, right=0.995, top=0.82, bottom=0.2, wspace=0.25)
    figure.savefig(target, metadata={"Software": ""})


if __name__ == "__main__":
    draw(json.loads(RESULTS.read_text(encoding="utf-8")), HERE / "server_load.png")

"""What the pictures share: their command line, their looks, the line that says where the data came from, and the file.

A script has `draw(record, target)`, which draws from a JSON record alone, and `compute()`, if the record is its own. A
picture carries the name and the checksum of its data as PNG text, by which a test finds one that was not drawn again.
"""

import argparse
import io
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image, PngImagePlugin

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / "demo" / "checkpoint"
# of Okabe and Ito: told apart with any kind of colour vision
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#20242c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#767c88"

sys.path += [folder for folder in [str(ROOT / "benchmarks")] if folder not in sys.path]
import lib  # noqa: E402, F401  which puts inference/ and demo/ on the path


def panels(rows: int, columns: int, size: tuple[float, float], **more: Any) -> tuple[Any, Any]:
    """A figure and its axes, (rows, columns) of them, in the pictures' type; size is in inches."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": "#20242c"})
    return plt.subplots(rows, columns, figsize=size, dpi=120, squeeze=False, **more)


def plain(axes: Any, grid: str = "both") -> None:
    """Axes without a frame above and on the right, over a light grid."""
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e9ebef")
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)


def origin(record: dict[str, Any]) -> str:
    """How a record came to be: kind, processor, cores, date."""
    machine = record["machine"]
    cpu = machine["cpu"].replace("(R)", "")
    return f"{record['kind'].capitalize()}: {cpu}, {machine['cores']} cores, {record['date']}"


def finish(figure: Any, target: Path, about: str, source: str) -> None:
    """Writes the PNG, with a line below the picture; in few colours, which is half the bytes and the same to the eye.
    source: what the PNG says of its data, see `checksum`."""
    figure.text(0.5, 0.012, about, ha="center", fontsize=8.5, color=GREY)
    pixels = io.BytesIO()
    figure.savefig(pixels)
    plt.close(figure)
    told = PngImagePlugin.PngInfo()
    told.add_text("Source", source)
    picture = Image.open(pixels).convert("RGB").quantize(255, dither=Image.Dither.NONE)
    picture.save(target, "PNG", optimize=True, pnginfo=told)


def checksum(*names: str) -> str:
    """Names and CRC-32s of files in benchmarks/results, which a picture is drawn from."""
    return ", ".join(f"{name} {zlib.crc32((RESULTS / name).read_bytes()):08x}" for name in names)


def read(name: str) -> dict[str, Any]:
    """A record of benchmarks/results."""
    record: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return record


def main(
    script: str,
    draw: Callable[..., None],
    names: tuple[str, ...],
    compute: Callable[[], Any] | None = None,
    kind: Any = "measured",
) -> None:
    """A script's command line: draws script.png from records of benchmarks/results; with --compute makes the first
    record, of that kind, before that."""
    parser = argparse.ArgumentParser(description=f"Draws {script}.png from {' and '.join(names)}.")
    if compute:
        parser.add_argument("--compute", action="store_true", help="compute the data first, which takes minutes")
    if compute and parser.parse_args().compute:
        from lib import report

        report.save(str(RESULTS / names[0]), compute(), f"python figures/{script}.py --compute", kind)
    else:
        parser.parse_args()
    draw(*map(read, names), HERE / f"{script}.png", checksum(*names))

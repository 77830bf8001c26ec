"""What every benchmark says about itself: machine, versions, date, command and kind beside the figures."""

import datetime
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from lib.machine import machine

Kind = Literal["measured", "counted", "compiled", "simulated", "predicted"]


def _from_here(word: str) -> str:
    """A path below the current directory, as others have it; anything else as it is."""
    return os.path.relpath(word) if os.path.isabs(word) and Path(word).is_relative_to(Path.cwd()) else word


def save(path: str | None, results: Any, command: str | None = None, kind: Kind = "measured") -> None:
    """Writes the results as JSON with machine, date, kind and command (this process's, if none is given); nothing when
    no path is given."""
    if path is None:
        return
    record = {
        "date": datetime.date.today().isoformat(),
        "command": command or shlex.join(["python", *(_from_here(word) for word in sys.argv)]),
        "kind": kind,
        "machine": machine(),
        "results": results,
    }
    Path(path).write_text(json.dumps(record, indent=2) + "\n")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

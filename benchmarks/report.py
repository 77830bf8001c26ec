"""What every benchmark says about itself: machine, versions, date and command beside the figures."""

import datetime
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """The hardware and the versions that a figure depends on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "safetensors"):
        module = sys.modules.get(name)
        if module is not None:
            versions[name] = module.__version__
    found = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1), "versions": versions}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def save(path: str | None, results: Any, command: str | None = None) -> None:
    """Writes the results as JSON with machine, date and command (this process's, if none is given); nothing when no
    path is given."""
    if path is None:
        return
    record = {
        "date": datetime.date.today().isoformat(),
        "command": command or shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "machine": machine(),
        "results": results,
    }
    Path(path).write_text(json.dumps(record, indent=2) + "\n")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

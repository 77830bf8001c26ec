"""llama.cpp and ik_llama.cpp by their own llama-batched-bench, one process a run."""

import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lib.machine import measure_child

# What makes each fastest here, as its llama-batched-bench spells it.
FLAGS = {
    "llama.cpp": ["-fa", "on", "--output-format", "jsonl"],
    "ik_llama.cpp": ["-fa", "on", "-mla", "3", "-rtr"],
}


class Case(NamedTuple):
    """Random prompts of equal length, and random tokens that follow them one at a time."""

    sequences: int
    prompt: int
    new: int

    @property
    def room(self) -> int:
        """Tokens, to whole pages of any size up to 256."""
        return self.sequences * -(-(self.prompt + self.new) // 256) * 256

    @property
    def names(self) -> dict[str, str]:
        if self.sequences == 1:
            return {"prefill": f"prefill {self.prompt}", "decode": f"decode at {self.prompt}"}
        return {
            "prefill": f"prefill {self.sequences} x {self.prompt}",
            "decode": f"decode, {self.sequences} sequences",
        }


@dataclass
class Llama:
    """One of them on one file of weights."""

    name: str  # a key of FLAGS
    binary: Path
    gguf: Path
    threads: int
    start_s: float = math.inf
    peak_mib: int = 0
    anonymous_mib: int = 0

    def run(self, case: Case) -> dict[str, float]:
        """Seconds of prefill and decode as it reports them."""
        shape = {"-npp": case.prompt, "-ntg": case.new, "-npl": case.sequences, "-c": case.room, "-t": self.threads}
        flags = [str(word) for pair in shape.items() for word in pair]
        command = [str(self.binary.resolve()), "-m", str(self.gguf.resolve()), *FLAGS[self.name], *flags]
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:  # one leaves a log behind
            took = measure_child(command, output, errors=output, every=0.1, folder=folder)
            output.seek(0)
            prefill, decode = parse(output.read())
        self.start_s = min(self.start_s, took["seconds"] - prefill - decode)
        self.peak_mib = max(self.peak_mib, int(took["peak_mib"]))
        self.anonymous_mib = max(self.anonymous_mib, int(took["peak_anonymous_mib"]))
        return {"prefill": prefill, "decode": decode}

    @property
    def about(self) -> dict[str, Any]:
        """start_s: of the whole process but for what was timed: loading, repacking, a first batch of 16 tokens."""
        return {"start_s": self.start_s, "peak_mib": self.peak_mib, "anonymous_mib": self.anonymous_mib,
                "flags": FLAGS[self.name]}  # fmt: skip


def parse(text: str) -> tuple[float, float]:
    """Seconds of prefill and of decode, out of the one row that was printed, a line of JSON or of a table:
    | PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | T s | S t/s |"""
    for line in text.splitlines():
        if line.startswith("{") and "t_pp" in line:
            row = json.loads(line)
            return row["t_pp"], row["t_tg"]
        if re.match(r"\|\s*\d", line):
            cells = line.strip("| \n").split("|")
            return float(cells[4]), float(cells[6])
    raise ValueError(f"no row in what it printed: {text[-200:]!r}")

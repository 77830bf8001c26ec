"""Run by test_sample.py as a process of its own: samples layers of a checkpoint and says by how many MiB its memory grew
at most. Arguments: checkpoint, layers, tokens."""

import sys
from pathlib import Path

import torch

from verification.sample import sample_layers


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(what))


def main() -> None:
    torch.set_num_threads(1)
    torch.ones(64, 64) @ torch.ones(64, 64)  # brings libraries in
    before = resident("VmRSS")
    rows = sample_layers(sys.argv[1], None, sys.argv[2], int(sys.argv[3]))
    assert rows
    print(resident("VmHWM") - before)


main()

"""Set before anything imports Triton: without a GPU its kernels run in Triton's interpreter."""

import os
from collections import Counter, defaultdict
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--table", action="store_true", help="say at the end how each file of tests came out, and where")


def pytest_terminal_summary(terminalreporter, config):
    """The table that `make gpu` ends with: a line to a file, with its tests by outcome and the seconds they took."""
    if not config.getoption("--table"):
        return
    counts, seconds = defaultdict(Counter), Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            name = Path(report.nodeid.split("::")[0]).name
            counts[name][outcome] += 1
            seconds[name] += report.duration
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: Triton's interpreter"
    terminalreporter.section(where)
    terminalreporter.line(f"{'file':28}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for name, found in sorted(counts.items()):
        wrong = found["failed"] + found["error"]
        terminalreporter.line(f"{name:28}{found['passed']:8}{wrong:8}{found['skipped']:9}{seconds[name]:9.1f}")

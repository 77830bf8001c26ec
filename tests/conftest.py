"""Set before anything imports Triton: without a GPU its kernels run in Triton's interpreter. And `--record FILE`."""

import datetime
import json
import os
from pathlib import Path

import pytest
import torch

from report import save

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


class Record:
    """Outcomes of the tests in their long form, each saved at once, with those the file holds: such runs take hours,
    are made in parts, and get cut."""

    def __init__(self, path: Path):
        self.path = path
        self.tests = json.loads(path.read_text())["results"]["tests"] if path.exists() else {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "trust" in report.keywords and (report.when == "call" or report.outcome != "passed"):
            today = datetime.date.today().isoformat()
            self.tests[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 1), "date": today}
            save(str(self.path), {"tests": dict(sorted(self.tests.items()))}, "make trust")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="adds the long tests' outcomes to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):  # once, not in each of xdist's workers
        config.pluginmanager.register(Record(path))

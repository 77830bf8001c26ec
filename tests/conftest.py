"""Set before anything imports Triton: without a GPU its kernels run in Triton's interpreter. `--record`, `--table`."""

import contextlib
import datetime
import json
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.report import save

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # where there is no Triton, its tests skip
        from support import quick_interpreter  # noqa: F401
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's job in the background inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def own_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the interpreter add up each element of a product by itself. It calls BLAS, which on some processors (AMD's
    Zen 3 is one) adds a row up in another order where it stands elsewhere in a tile; a tensor core does not."""
    if torch.cuda.is_available():
        return
    import numpy as np
    from triton.runtime import interpreter

    class Numpy:
        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        @staticmethod
        def matmul(a: Any, b: Any, dtype: Any) -> Any:
            return np.einsum("...mk,...kn->...mn", a.astype(dtype), b.astype(dtype))

    monkeypatch.setattr(interpreter, "np", Numpy())


@pytest.fixture(scope="session", autouse=True)
def templates_are_compiled_once() -> Iterator[None]:
    """Hundreds of checkpoints here have the same chat template, which takes 50 ms to compile and is then only read."""
    from text import tokenizer
    from text.chat_template import ChatTemplate

    made: dict[str, ChatTemplate] = {}

    def template(*arguments: Any) -> ChatTemplate:
        key = repr(arguments)
        if key not in made:
            made[key] = ChatTemplate(*arguments)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "ChatTemplate", template)
        yield


class Record:
    """Outcomes of the tests in their long form, each saved at once, with those the file holds: such runs take an hour,
    are made in parts, and get cut."""

    def __init__(self, path: Path):
        self.path = path
        self.tests = json.loads(path.read_text())["results"]["tests"] if path.exists() else {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "trust" in report.keywords and (report.when == "call" or report.outcome != "passed"):
            today = datetime.date.today().isoformat()
            self.tests[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 1), "date": today}
            save(str(self.path), {"tests": dict(sorted(self.tests.items()))}, "make trust", "counted")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="adds the long tests' outcomes to this JSON file")
    parser.addoption("--table", action="store_true", help="say at the end how each file of tests came out, and where")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):  # once, not in each of xdist's workers
        config.pluginmanager.register(Record(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Names must be the same in every process, or pytest-xdist refuses to run any test."""
    if unstable := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"{unstable[0]} is named by an address; give it an id")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
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

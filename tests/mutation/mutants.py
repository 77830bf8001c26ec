"""Breaks the program in one place at a time, in ways that ports of these models have really been broken, and sees
whether the tests notice.

    python tests/mutation/mutants.py [--only NAME …] [--jobs N] [--json FILE]

Each mutant runs the tests that ought to kill it in a copy of the source tree. "killed": one of them failed; "survived":
a test is missing; "stale": the text to replace is not there exactly once; "broken": the tests did not run. As controls
all tests named are run on unchanged copies, where they must pass. Exit status 0 if every mutant was killed.

Processes are forked from this one, which has imported the libraries but nothing of the project.
"""

import argparse
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
CPU_SECONDS = 150  # of processor time, for a mutant's tests together; nothing else that the machine does counts
WAITING = 300  # seconds of wall time, for one of them: a bug may have it wait for ever
CONTROL = "control "
COPIED = ("inference", "tests", "benchmarks", "conformance")  # the rest is linked
LIBRARIES = (
    "torch", "torch.distributed", "triton", "transformers.models.deepseek_v2.modeling_deepseek_v2",
    "transformers.models.deepseek_v3.modeling_deepseek_v3", "transformers.modeling_layers", "safetensors.torch",
    "tokenizers", "jinja2", "tqdm", "hypothesis", "pytest",
)  # fmt: skip


class Mutant(NamedTuple):
    """One change of one file of inference/, and the tests, below tests/, that are to fail because of it."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # pytest's node ids
    bug: str

    def apply(self, source: str) -> str:
        """The file with the bug. Raises ValueError when the text to replace is not there exactly once."""
        if (n := source.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.old!r} {n} times, expected once")
        return source.replace(self.old, self.new)


class Outcome(NamedTuple):
    name: str
    outcome: str
    killer: str  # the test that failed first
    error: str  # of that test, its first line
    seconds: float
    log: str  # of what was not as it should be


PARTS = ("checkpoint", "cli", "commands", "core", "engine", "model", "ops", "parallel", "serving", "page", "text", "verification")  # a module of_… each
MUTANTS = [Mutant(*row) for part in PARTS for row in importlib.import_module(f"mutation.of_{part}").MUTANTS]


class Watch:
    """A plugin that notes the first test to fail, and that nothing of the project came from anywhere but the copy."""

    def __init__(self, root: Path):
        self.root, self.first = root, ("", "")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.first[0]:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message.partition("\n")[0].replace(f"{ROOT}/", "") if crash else ""
            self.first = report.nodeid.removeprefix("tests/"), said

    def pytest_sessionfinish(self) -> None:
        for file in (self.root / "inference").rglob("*.py"):
            name = ".".join(file.relative_to(self.root / "inference").with_suffix("").parts)
            module = sys.modules.get(name.removesuffix(".__init__"))
            assert module is None or Path(module.__file__ or "") == file, f"{module} is not the copy's"


def limit_processor_time() -> None:
    """Raises TimeoutError wherever this process is when it has computed for CPU_SECONDS; ends it a minute later."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    most = most if most != resource.RLIM_INFINITY else CPU_SECONDS + 60

    def out_of_time(*_: object) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))
        raise TimeoutError(f"more than {CPU_SECONDS} s of processor time")

    signal.signal(signal.SIGXCPU, out_of_time)
    resource.setrlimit(resource.RLIMIT_CPU, (min(CPU_SECONDS, most), most))


def in_copy(root: Path, mutant: Mutant | None, tests: Sequence[str]) -> None:
    """Makes a copy of the source tree, with the mutant's bug, and runs the tests in it. What came of it is left in
    outcome.json; never returns."""
    began, said = time.monotonic(), ("broken", "", "")
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        for path in ROOT.iterdir():
            if path.name in COPIED:
                shutil.copytree(path, root / path.name, symlinks=True)
            elif not path.name.startswith("."):
                (root / path.name).symlink_to(path)
        if mutant:
            file = root / "inference" / mutant.file
            file.write_text(mutant.apply(file.read_text()))
            for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
                compiled.unlink()
        import hypothesis
        import pytest

        hypothesis.settings.register_profile("once", phases=[hypothesis.Phase.generate], database=None)  # no shrinking
        hypothesis.settings.load_profile("once")
        os.chdir(root)
        sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT / "tests"]
        watch = Watch(root)
        limit_processor_time()
        options = f"-x -q -n 0 -p no:cacheprovider --timeout {WAITING} --hypothesis-seed 0".split()
        status = pytest.main(
            [*options, "--rootdir", str(root), "-c", str(root / "pyproject.toml"), *(f"tests/{t}" for t in tests)],
            plugins=[watch],
        )
        said = {0: ("survived", "", ""), 1: ("killed", *watch.first)}.get(int(status), said)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", flush=True)
    finally:
        (root / "outcome.json").write_text(json.dumps([*said, time.monotonic() - began]))
        os._exit(0)


def run(mutants: Sequence[Mutant], jobs: int) -> Iterator[Outcome]:
    """The controls, one for each file of tests, and every mutant, as they come to an end."""
    files: dict[str, set[str]] = {}
    for test in (test for m in mutants for test in m.tests.split()):
        files.setdefault(test.partition("::")[0], set()).add(test)
    waiting: list[tuple[str, Mutant | None, list[str]]] = [(f"{CONTROL}{f}", None, sorted(t)) for f, t in files.items()]
    for mutant in mutants:
        try:
            mutant.apply((ROOT / "inference" / mutant.file).read_text())
            waiting.append((mutant.name, mutant, mutant.tests.split()))
        except ValueError as e:
            yield Outcome(mutant.name, "stale", "", "", 0.0, str(e))
    running: dict[int, tuple[str, Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, mutant, tests = waiting.pop(0)
                root = Path(folder).resolve() / name.replace("/", "-")
                root.mkdir()
                if (pid := os.fork()) == 0:
                    in_copy(root, mutant, tests)
                running[pid] = name, root
            name, root = running.pop(os.wait()[0])
            left = root / "outcome.json"
            came_of_it = json.loads(left.read_text()) if left.exists() else ("broken", "", "", 0.0)
            yield Outcome(name, *came_of_it, (root / "log").read_text(errors="replace"))
            shutil.rmtree(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants by name, or by how their names begin")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="where the outcomes go, with date and machine")
    options = parser.parse_args()
    wanted = [m for m in MUTANTS if not options.only or any(m.name.startswith(name) for name in options.only)]
    if not wanted:
        parser.error("no such mutant")

    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    for name in LIBRARIES:
        importlib.import_module(name)
    began, found, bugs = time.monotonic(), [], {m.name: (m.file, m.bug) for m in wanted}
    for outcome in run(wanted, options.jobs):
        right = outcome.outcome == ("survived" if outcome.name.startswith(CONTROL) else "killed")
        found.append((outcome, right))
        print(f"{outcome.outcome:9}{outcome.name:32}{outcome.seconds:6.1f} s  {outcome.killer}", flush=True)
        if not right:
            print("    " + "\n    ".join(outcome.log.splitlines()[-40:]), flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, killed = time.monotonic() - began, sum(o.name in bugs and o.outcome == "killed" for o, _ in found)
    print(f"{killed} of {len(wanted)} mutants killed in {seconds:.0f} s")
    if options.json:
        rows = {
            o.name: {"file": bugs[o.name][0], "bug": bugs[o.name][1], "outcome": o.outcome, "killer": o.killer,
                     "error": o.error, "seconds": round(o.seconds, 1)}
            for o, _ in found if o.name in bugs
        }  # fmt: skip
        sys.path.append(str(ROOT / "benchmarks"))
        report = importlib.import_module("lib.report")
        results = {"killed": killed, "of": len(wanted), "seconds": round(seconds, 1), "jobs": options.jobs}
        results["cpu_seconds"] = round(used.ru_utime + used.ru_stime, 1)
        report.save(options.json, results | {"mutants": {m.name: rows[m.name] for m in wanted}}, kind="counted")
    return int(not all(right for _, right in found))


if __name__ == "__main__":
    sys.exit(main())

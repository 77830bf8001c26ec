"""The mutants of mutants.py: that each still is one, and that a few are killed. `make trust` runs them all."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from mutation.mutants import MUTANTS, ROOT
from ops.cpu import kernels as kernel_cpu
from support.limits import LAST_RESORT, run_within
from support.processes import environment

pytestmark = pytest.mark.timeout(LAST_RESORT)  # the processes have their own limits, of processor time

TESTS = Path(__file__).parents[1]
SAMPLE = ("config-upstream-yarn", "mla-mask", "sampling-top-p-crossing")  # of tests that take little time
OTHERS = """
import sys
from mutation.mutants import MUTANTS, Mutant, main
test = "core/test_config.py::test_families"
MUTANTS += [
    Mutant("survivor", "core/config.py", "import math\\n", "import math  #\\n", test, "none"),
    Mutant("fault", "core/config.py", "import math", "import maths", test, "the tests cannot even be loaded"),
    Mutant("stranger", "core/config.py", "no such text", "", test, "refactored away"),
]
sys.exit(main())
"""


def test_every_mutant_is_one():
    """Each text to replace is there exactly once, what comes of Python is still that, and no two come to the same."""
    found = Counter()
    for mutant in MUTANTS:
        broken = mutant.apply((ROOT / "inference" / mutant.file).read_text())
        assert mutant.old != mutant.new, f"{mutant.name} changes nothing"
        if mutant.file.endswith(".py"):
            compile(broken, mutant.file, "exec")
        found[mutant.file, broken] += 1
    assert max(found.values()) == 1 and len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) > 200


@pytest.mark.trust
@pytest.mark.skipif(kernel_cpu.library() is None, reason="there is no C compiler")
def test_mutants_in_c_compile():
    for mutant in MUTANTS:
        if mutant.file.endswith(".c"):
            command = [*kernel_cpu.compilers()[0], *kernel_cpu.FLAGS, "-fsyntax-only", "-x", "c", "-"]
            done = run_within(60, command, input=mutant.apply((ROOT / "inference" / mutant.file).read_text()))
            assert done.returncode == 0, (mutant.name, done.stderr)


def test_every_test_named_is_there():
    for mutant in MUTANTS:
        for test in mutant.tests.split():
            file, _, name = test.partition("::")
            assert f"\ndef {name.partition('[')[0]}(" in (TESTS / file).read_text(), (mutant.name, test)


@pytest.mark.trust
def test_every_outcome_is_told(tmp_path):
    """A few that are killed, and beside them one that survives, one that breaks the tests themselves and a stale one."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-c", OTHERS, "--json", str(out), "--only", *SAMPLE, "survivor", "fault", "stranger"]
    run = run_within(250, command, env=environment(PYTHONPATH=str(TESTS)))
    assert run.returncode == 1 and out.exists(), run.stdout + run.stderr
    results = json.loads(out.read_text())["results"]
    told = {name: row["outcome"] for name, row in results["mutants"].items()}
    others = {"survivor": "survived", "fault": "broken", "stranger": "stale"}
    assert told == dict.fromkeys(SAMPLE, "killed") | others, run.stdout
    assert (results["killed"], results["of"]) == (len(SAMPLE), len(SAMPLE) + 3)
    killers = {mutant.name: mutant.tests for mutant in MUTANTS}
    assert all(results["mutants"][name]["killer"].startswith(tuple(killers[name].split())) for name in SAMPLE)


@pytest.mark.trust
@pytest.mark.timeout(7200)
def test_every_mutant_is_killed():
    command = [sys.executable, str(TESTS / "mutation" / "mutants.py")]
    run = run_within(3600, command, env=environment())
    assert run.returncode == 0, run.stdout + run.stderr

"""How the C kernels come to be: compiled once, where nobody else writes, and done without where there is no compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ops.cpu import kernels
from support import processes as launch
from support.limits import LAST_RESORT, run_within
from support.processes import environment

pytestmark = pytest.mark.timeout(LAST_RESORT)  # what compiles has a limit of its own, of processor time

if kernels.library() is None:
    pytest.skip("no C compiler, or other threads than GNU OpenMP's", allow_module_level=True)

INFERENCE = kernels.SOURCE.parents[2]


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    quickly = "kernels.FLAGS += ('-O0',)"  # the last of these counts
    command = [sys.executable, "-c", f"from ops.cpu import kernels\n{quickly}\n{code}"]
    return run_within(120, command, env=environment(PYTHONPATH=str(INFERENCE), **variables))


WHERE = "print(kernels.library()._name if kernels.library() else None)"


def test_it_is_compiled_once(tmp_path):
    first = run(WHERE, XDG_CACHE_HOME=str(tmp_path))
    made = Path(first.stdout.strip())
    assert made.is_relative_to(tmp_path) and [*made.parent.iterdir()] == [made] and not first.stderr
    assert made.parent.stat().st_mode & 0o777 == 0o700
    before = made.stat()
    again = run(WHERE, XDG_CACHE_HOME=str(tmp_path))
    assert again.stdout == first.stdout and made.stat().st_mtime_ns == before.st_mtime_ns
    other = run(f"kernels.FLAGS += ('-DOTHER',)\n{WHERE}", XDG_CACHE_HOME=str(tmp_path))
    assert Path(other.stdout.strip()).parent == made.parent and other.stdout != first.stdout


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o500])
def test_a_directory_that_others_write_to_is_not_used(tmp_path, mode):
    """Who could write to it could put a library there. Nor is one that cannot be written."""
    folder = tmp_path / "deepseek-v3-inference"
    folder.mkdir()
    folder.chmod(mode)
    if mode == 0o500 and os.getuid() == 0:
        pytest.skip("root writes everywhere")
    found = run(WHERE, XDG_CACHE_HOME=str(tmp_path))
    made = Path(found.stdout.strip())
    assert made.name.startswith("kernel_cpu-") and not made.is_relative_to(tmp_path) and not any(folder.iterdir())
    assert not made.parent.exists()  # it was this process's


def test_any_locale(tmp_path):
    found = run(WHERE, XDG_CACHE_HOME=str(tmp_path), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert Path(found.stdout.strip()).is_relative_to(tmp_path), found.stderr


def test_another_command_makes_another_library(tmp_path):
    both = [run(WHERE, XDG_CACHE_HOME=str(tmp_path), CC=f"cc{more}").stdout for more in ("", " -DOTHER")]
    assert len({*both}) == 2 and len([*tmp_path.rglob("*.so")]) == 2


@pytest.mark.parametrize("command", ["/nowhere/cc", "false", "cat", '"cc'])
def test_without_a_compiler(tmp_path, command):
    """The ops that torch has, and a reason."""
    code = f"{WHERE}\nimport torch\nfrom core.numerics import Numerics\nfrom ops.backend import choose_backend\nfrom ops.formats import Weight\n"
    code += "ops = choose_backend(torch.device('cpu'), Numerics())\nw = ops.pack_weight(Weight(torch.eye(8).bfloat16()))\n"
    code += "print(ops.linear(torch.ones(1, 8).bfloat16(), w).tolist())"
    code += "\nprint(kernels.why_not())"
    done = run(code, XDG_CACHE_HOME=str(tmp_path), CC=command)
    assert done.returncode == 0 and not done.stderr
    found, product, why = done.stdout.splitlines()
    assert (found, product) == ("None", str([[1.0] * 8])) and why.startswith("no C compiler that works: ")
    assert not [*tmp_path.rglob("*.so")]


def test_the_engine_says_why_it_is_slower(tmp_path):
    """Once, from rank 0, and not where no bfloat16 is computed."""
    (tmp_path / "prompts").write_text("What is 3 + 4?\n")
    flags = ["--ckpt-path", INFERENCE.parent / "demo" / "checkpoint", "--input-file", tmp_path / "prompts"]
    flags += ["--device", "cpu", "--threads", "1", "--max-new-tokens", "1", "--dtype"]
    alone, float32 = launch.command(*flags, "bfloat16"), launch.command(*flags, "float32")
    for command, notes in ((alone, 1), (float32, 0), (launch.torchrun(*flags, "bfloat16"), 1)):
        variables = environment(XDG_CACHE_HOME=str(tmp_path), CC="/nowhere/cc")
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("note: on this CPU bfloat16 is slower") == done.stderr.count("/nowhere/cc") == notes
    assert done.stderr.count("experts: ") == 1

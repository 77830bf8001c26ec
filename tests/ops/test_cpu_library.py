"""How the C kernels come to be: compiled once, where nobody else writes, and done without where there is no compiler."""

import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ops.cpu import kernels
from support import fork_server
from support import processes as launch
from support.limits import LAST_RESORT, run_within
from support.processes import environment
from support.processor import flags_for

pytestmark = pytest.mark.timeout(LAST_RESORT)  # what compiles has a limit of its own, of processor time

if kernels.library() is None:
    pytest.skip("no C compiler, or other threads than GNU OpenMP's", allow_module_level=True)

INFERENCE = kernels.SOURCE.parents[2]


def run(code: str, alone: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    quickly = "kernels.FLAGS += ('-O0',)"  # the last of these counts
    command = [sys.executable, "-c", f"from ops.cpu import kernels\n{quickly}\n{code}"]
    env = environment(PYTHONPATH=str(INFERENCE), **variables)
    return run_within(120, command, env=env) if alone else fork_server.run(command, env=env, limit=120)


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


UNITS = "print(kernels.may_use_fixed(), kernels.may_use_tiles(), kernels.may_use_pairs())"
PRODUCTS = """
import torch
from ops.formats import Weight
for w in (Weight(torch.eye(64).bfloat16()), Weight(torch.eye(64).char(), torch.ones(64, 1), block=(1, 64))):
    print(kernels.linear(torch.ones(32, 64).bfloat16(), kernels.pack_weight(w), torch.float32, units=True).sum().item())
"""


def test_the_process_asks_for_tiles_before_anything_else():
    """An instruction for them would end it otherwise. Whoever asks first is told what will be used."""
    done = run(UNITS + PRODUCTS + UNITS)
    assert done.returncode == 0, done.stderr
    before, *products, after = done.stdout.splitlines()
    assert before == after and before.count("True") <= 1 and products == ["2048.0"] * 2
    assert before.split()[1] == str(kernels.may_use_tiles())


@pytest.mark.skipif(not kernels.may_use_tiles(), reason="this processor has no tiles")
def test_a_process_that_is_refused_tiles():
    """As by a container's filter of system calls: here of arch_prctl's request for them. Fixed point takes their place."""
    refuse = """
import ctypes, struct
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]
load, equals, end = 0x20, 0x15, 0x06  # of the system call's number and first argument: BPF
steps = [(load, 0, 0, 0), (equals, 0, 3, 158), (load, 0, 0, 16), (equals, 0, 1, 0x1023), (end, 0, 0, 0x50001), (end, 0, 0, 0x7FFF0000)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(6, b"".join(struct.pack("HBBI", *step) for step in steps)))) == 0
"""
    done = run(refuse + UNITS + PRODUCTS)
    assert (done.returncode, done.stdout) == (0, "True False False\n2048.0\n2048.0\n"), done.stderr


PROCESSORS = ["x86-64", "x86-64-v3", "x86-64-v4", "cascadelake", "cooperlake", "icelake-server", "sapphirerapids",
              "alderlake", "znver3"]  # fmt: skip


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86's processors")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_source_is_right_for_every_processor(processor):
    """A compiler that takes no code for this processor is asked for less, so that a mistake would only be slow."""
    asked = [*kernels.compilers()[0], *flags_for(f"-march={processor}"), "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fsyntax-only"]
    done = run_within(60, [*asked, str(kernels.SOURCE)])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("vendor, are_slow", [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_whose_pairs_of_bfloat16_are_slow(vendor, are_slow, tmp_path, monkeypatch):
    """They are not compiled there, unless the flags ask for them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "_processor", lambda: ["processor\t: 0", f"vendor_id\t: {vendor}", "flags\t\t: fpu"])
    asked: list[list[str]] = []

    def run(command: list[str], scratch: str) -> str:
        if "-o" in command:
            Path(command[command.index("-o") + 1]).touch()
            asked.append(command)
        return "cc"

    monkeypatch.setattr(kernels, "_run", run)
    kernels.build(["cc"], (*kernels.FLAGS, "-USLOW_PAIRS"))
    [command] = asked
    assert ("-DSLOW_PAIRS" in command[: command.index("-USLOW_PAIRS")]) == are_slow


def test_any_locale(tmp_path):
    found = run(WHERE, alone=True, XDG_CACHE_HOME=str(tmp_path), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert Path(found.stdout.strip()).is_relative_to(tmp_path), found.stderr


def test_another_command_makes_another_library(tmp_path):
    both = [run(WHERE, XDG_CACHE_HOME=str(tmp_path), CC=f"cc{more}").stdout for more in ("", " -DOTHER")]
    assert len({*both}) == 2 and len([*tmp_path.rglob("*.so")]) == 2


@pytest.mark.parametrize("command", ["/nowhere/cc", "false", "cat", '"cc'])
def test_without_a_compiler(tmp_path, command):
    """The ops that torch has, a reason, and what to install."""
    code = f"{WHERE}\nimport torch\nfrom core.numerics import Numerics\nfrom ops.backend import choose_backend\nfrom ops.formats import Weight\n"
    code += "ops = choose_backend(torch.device('cpu'), Numerics())\nw = ops.pack_weight(Weight(torch.eye(8).bfloat16()))\n"
    code += "print(ops.linear(torch.ones(1, 8).bfloat16(), w).tolist())"
    code += "\nprint(kernels.why_not())"
    done = run(code, XDG_CACHE_HOME=str(tmp_path), CC=command)
    assert done.returncode == 0 and not done.stderr
    found, product, why = done.stdout.splitlines()
    assert (found, product) == ("None", str([[1.0] * 8])) and why.startswith("no C compiler that works: ")
    assert not [*tmp_path.rglob("*.so")]


def test_what_to_install(tmp_path):
    """Where there is none at all; the package in the version that is tested."""
    pinned = (INFERENCE.parent / "requirements-dev.txt").read_text()
    assert kernels.INSTALL.split(",")[0].removeprefix("pip install ") in pinned
    code = "import importlib.util, shutil\nimportlib.util.find_spec = shutil.which = lambda name: None\nprint(kernels.library(), kernels.why_not())"
    done = run(code, XDG_CACHE_HOME=str(tmp_path), CC="")
    assert done.stdout == f"None there is no C compiler; {kernels.INSTALL}\n" and not done.stderr


def test_a_compiler_that_hangs(tmp_path):
    """It is given up, with all that it has started."""
    script = tmp_path / "cc"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n[ $1 = --version ] && echo cc && exit\nsleep 12 & wait\n")
    script.chmod(0o700)
    code = "import time\nbegan = time.monotonic()\nkernels.COMPILER_SECONDS = 0.5\nprint(kernels.library(), kernels.why_not())\nprint(time.monotonic() - began < 10)"
    done = run(code, XDG_CACHE_HOME=str(tmp_path / "cache"), CC=str(script))
    said, soon = done.stdout.splitlines()
    assert said.startswith("None no C compiler that works: ") and "timed out after 0.5 seconds" in said and soon == "True"
    group = (tmp_path / "pid").read_text().strip()
    left = [stat for path in Path("/proc").glob("[0-9]*/stat") if f" {group} " in (stat := read(path)) and ") Z " not in stat]
    assert not left, "a process of the compiler's group still runs"


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def test_a_compiler_that_does_not_know_the_processor(tmp_path):
    """As some of ARM's do not: it is asked in their words, and then for no processor in particular."""
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\ncase "$*" in *native*) echo "bad value native" >&2; exit 1;; esac\nexec cc "$@"\n')
    script.chmod(0o700)
    done = run(f"{WHERE}\nprint(kernels.panel_width())", XDG_CACHE_HOME=str(tmp_path / "cache"), CC=str(script))
    made, width = done.stdout.split()
    assert Path(made).is_relative_to(tmp_path) and width == "16", done.stderr


def test_clang_is_asked_for_no_more_of_openmp_than_there_is():
    """Every directive and clause is one that clang_openmp.h has the functions for: without them Clang's library does not
    load, and all is computed by torch."""
    used = re.findall(r"^ *#pragma omp (.*)$", kernels.SOURCE.read_text(), re.MULTILINE)
    words = {word for text in used for word in re.findall(r"[a-z_]+(?:\(static\))?", re.sub(r"num_threads\(\w+\)", "num_threads", text))}
    assert words <= {"parallel", "for", "num_threads", "schedule(static)", "nowait", "barrier"}, words


@pytest.mark.trust
def test_clang_without_a_home(tmp_path):
    """The compiler that pip installs, with no folder to write to but a temporary one, has the threads of torch."""
    pytest.importorskip("ziglang")
    code = "import importlib.util, shutil, torch\nshutil.which = lambda name: None\n" + WHERE
    code += "\ntorch.set_num_threads(3)\nx, w = torch.randn(5, 300).bfloat16(), torch.randn(700, 300).bfloat16()"
    code += "\ny = kernels.linear(x, kernels.pack(w), torch.float32)\nprint(float((y - x.float() @ w.float().T).abs().max()) < 1e-3)"
    code += "\nprint('libomp' in kernels._mapped())"
    done = run(code, XDG_CACHE_HOME="/proc/nowhere", HOME="/proc/nowhere", CC="")
    made, right, second = done.stdout.split()
    assert made.startswith("/tmp/") and (right, second) == ("True", "False"), done.stderr


def test_no_folder_at_all(tmp_path):
    code = "import tempfile\ntempfile.tempdir = '/proc/nowhere'\nprint(kernels.library(), kernels.why_not())"
    done = run(code, XDG_CACHE_HOME="/proc/nowhere", HOME="/proc/nowhere")
    assert done.stdout.startswith("None there is no folder to compile C kernels in: [Errno 2] ") and not done.stderr


def test_the_engine_says_why_it_is_slower(tmp_path):
    """Once, from rank 0, and not where no bfloat16 is computed."""
    (tmp_path / "prompts").write_text("What is 3 + 4?\n")
    flags = ["--ckpt-path", INFERENCE.parent / "demo" / "checkpoint", "--input-file", tmp_path / "prompts"]
    flags += ["--device", "cpu", "--threads", "1", "--max-new-tokens", "1", "--dtype"]
    alone, float32 = launch.command(*flags, "bfloat16"), launch.command(*flags, "float32")
    torchrun = launch.torchrun(*flags, "bfloat16")
    for command, notes in ((alone, 1), (float32, 0), (torchrun, 1)):
        variables = environment(XDG_CACHE_HOME=str(tmp_path), CC="/nowhere/cc")
        run = fork_server.run if command is not torchrun else functools.partial(run_within, 300)
        done = run(command, env=variables)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("note: on this CPU bfloat16 is slower") == done.stderr.count("/nowhere/cc") == notes
    assert done.stderr.count("experts: ") == 1


@pytest.mark.trust
@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "riscv64-linux-gnu"])
def test_it_compiles_for_other_processors(tmp_path, target):
    """Which is all that can be said of them here."""
    pytest.importorskip("ziglang")
    flags = [flag for flag in kernels.FLAGS if flag != kernels.NATIVE[0] and flag != "-fopenmp"]
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, *flags, "-Xclang", "-fopenmp"]
    kernels._run([*command, str(kernels.SOURCE), "-o", str(tmp_path / "kernels.so"), "-lm", *kernels.UNDEFINED], str(tmp_path))
    assert (tmp_path / "kernels.so").stat().st_size > 50_000

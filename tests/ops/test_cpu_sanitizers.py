"""The tests of the C kernels once more, with GCC's checks of every access and of what C leaves undefined compiled in."""

import subprocess
import sys
from pathlib import Path

import pytest

from ops.cpu import kernels
from support.limits import LAST_RESORT, run_within
from support.processes import environment

ROOT = Path(__file__).parents[2]
CHECKS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
RUN = f"import sys, pytest\nfrom ops.cpu import kernels\nkernels.FLAGS += {CHECKS}\n"
TESTS = RUN + "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
# Half of the floats that a call asks for: the allocator's guard behind them is written to.
TOO_SMALL = RUN + """
import torch
scratch = kernels._scratch
kernels._scratch = lambda floats, numbers=0: scratch(floats // 2, numbers)
kernels.linear(torch.ones(8, 4096), kernels.pack(torch.ones(32, 4096).bfloat16()), torch.float32)
"""

pytestmark = pytest.mark.timeout(LAST_RESORT)  # what compiles has a limit of its own, of processor time

if kernels.library() is None:
    pytest.skip("no C compiler, or other threads than GNU OpenMP's", allow_module_level=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs Python with these arguments, so that torch's memory too is of the allocator that guards it."""
    asked = [[*kernels.compilers()[0], f"-print-file-name=lib{name}.so"] for name in ("asan", "ubsan")]
    found = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in asked]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("this compiler brings no sanitizers")
    variables = environment(
        PYTHONPATH=f"{ROOT}/inference:{ROOT}/tests:{ROOT}/benchmarks", LD_PRELOAD=":".join(found),
        ASAN_OPTIONS="detect_leaks=0", XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache")),
    )  # fmt: skip
    return lambda *arguments: run_within(900, [sys.executable, "-c", *arguments], env=variables, cwd=ROOT)


def test_a_scratch_that_is_too_small_is_seen(run):
    done = run(TOO_SMALL)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(["tests/ops/test_cpu_forms.py", "-k", "native and (test_linear or test_experts)"], id="some"),
        *(pytest.param([f"tests/ops/{name}.py"], marks=pytest.mark.trust, id=name)
          for name in ("test_kernel_cpu", "test_cpu_forms", "test_cpu_fixed_point")),
    ],
)  # fmt: skip
def test_nothing_is_read_or_written_beside_what_is_given(files, run):
    done = run(TESTS, *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

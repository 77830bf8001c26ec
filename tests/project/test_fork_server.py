"""Processes of support/fork_server.py are like those that Python starts."""

import signal
import sys

import pytest

from support import fork_server
from support.processes import environment

ENDS = {
    "print('said', flush=True)": (0, "said\n", ""),
    "import sys; sys.exit(3)": (3, "", ""),
    "import sys; sys.exit('wrong')": (1, "", "wrong\n"),
    "import atexit; atexit.register(print, 'last'); print('first')": (0, "first\nlast\n", ""),
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()": (
        0,
        "late\n",
        "",
    ),
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": (-signal.SIGKILL, "", ""),
    "print(input())": (1, "", "EOFError: EOF when reading a line\n"),
    "import os; os.write(1, b'bytes')": (0, "bytes", ""),
}


def test_ends() -> None:
    started = [fork_server.start([sys.executable, "-c", code]) for code in ENDS]  # all at once
    for one, (status, out, err) in reversed([*zip(started, ENDS.values(), strict=True)]):
        done = one.result()
        assert (
            (done.returncode, done.stdout) == (status, out)
            and done.stderr.endswith(err)
            and bool(err) == bool(done.stderr)
        )


def test_what_they_are_given(tmp_path) -> None:
    """Arguments, folder, variables, and none of this process's modules but torch and what that imports."""
    (tmp_path / "beside.py").write_text("at = __file__")
    (tmp_path / "program.py").write_text(
        "import beside, os, sys\nassert __name__ == '__main__'\n"
        "print(sys.argv[1:], os.getcwd(), os.environ['OURS'], 'torch' in sys.modules, {'pytest', 'support', 'core'} & {*sys.modules})"
    )
    env = environment(OURS="1", PYTHONPATH="/nowhere")
    for command in (["program.py", "a b", 2], ["-m", "program", "a b", 2]):
        done = fork_server.run([sys.executable, *command], env=env, cwd=tmp_path)
        assert (done.stdout, done.stderr) == (f"['a b', '2'] {tmp_path} 1 True set()\n", "")
    done = fork_server.run([sys.executable, "-c", "import sys; print(sys.argv, sys.path[:2])", "x"], env=env)
    assert done.stdout == "['-c', 'x'] ['', '/nowhere']\n"


def test_limits() -> None:
    done = fork_server.run([sys.executable, "-c", "while True: pass"], limit=1)
    assert done.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
    with pytest.raises(ValueError, match="ATEN_CPU_CAPABILITY is read when Python or torch start: use subprocess"):
        fork_server.run([sys.executable, "-c", ""], env=environment(ATEN_CPU_CAPABILITY="avx2"))

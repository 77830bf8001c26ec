"""Python processes that need not import torch: forks of one that has imported it, and nothing of the project.

`run` is subprocess.run of a Python command, 2 s of processor time cheaper. What a process computes is its own; but
for tests of starting itself, of ends by signals, or of variables that Python or torch read when they start (those are
refused here), use subprocess.
"""

import atexit
import itertools
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

READ_AT_START = (
    "ATEN_",
    "ONEDNN_",
    "DNNL_",
    "MKL_",
    "OMP_",
    "KMP_",
    "GOMP_",
    "LD_",
    "MALLOC_",
    "LC_",
    "LANG",
    "PYTHON",
    "TORCH",
)
CPU_SECONDS = 300  # of processor time, for a process


class Started(NamedTuple):
    """A process, which may be running."""

    command: list[str]
    number: int
    folder: tempfile.TemporaryDirectory[str]

    def result(self) -> subprocess.CompletedProcess[str]:
        """Waits for its end. A negative return code is a signal's."""
        status = _server().wait(self.number)
        with self.folder as folder:
            out, err = (Path(folder, name).read_text(errors="replace") for name in ("out", "err"))
        return subprocess.CompletedProcess(self.command, os.waitstatus_to_exitcode(status), out, err)


def start(
    command: Sequence[object], env: Mapping[str, str] | None = None, cwd: object = ".", limit: int = CPU_SECONDS
) -> Started:
    """A command that begins with this Python, goes on with -c, -m or a script, and may compute for `limit` seconds."""
    from support.processes import environment  # not at the top: the server has nothing of the project

    python, *arguments = map(str, command)
    assert python == sys.executable, python
    env = dict(environment() if env is None else env)
    began_with = _server().env
    for name in env.keys() | began_with.keys():
        if name.startswith(READ_AT_START) and name != "PYTHONPATH" and env.get(name) != began_with.get(name):
            raise ValueError(f"{name} is read when Python or torch start: use subprocess")
    folder = tempfile.TemporaryDirectory(prefix="process-")
    asked = {
        "arguments": arguments,
        "env": env,
        "cwd": os.path.abspath(str(cwd)),
        "folder": folder.name,
        "limit": limit,
    }
    return Started([python, *arguments], _server().ask(asked), folder)


def run(command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    return start(command, **options).result()


class _Server:
    def __init__(self) -> None:
        from support.processes import environment

        self.env = environment()
        self.env.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=self.env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.numbers, self.ended = itertools.count(), {}
        atexit.register(self.stop)

    def stop(self) -> None:
        """It ends what still runs, and itself, when nobody can ask any more."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def ask(self, asked: dict[str, Any]) -> int:
        number = next(self.numbers)
        assert self.process.stdin
        print(json.dumps(asked | {"number": number}), file=self.process.stdin, flush=True)
        return number

    def wait(self, number: int) -> int:
        assert self.process.stdout
        while number not in self.ended:
            ended, status = json.loads(self.process.stdout.readline())
            self.ended[ended] = status
        return self.ended.pop(number)


@cache
def _server() -> _Server:
    return _Server()


# --------------------------------------------------------------------------------------------------------------------
# What follows runs in the server, and in the processes that it forks
# --------------------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Starts what the lines of standard input ask for, and says of each how it ended."""
    sys.path.pop(0)  # this file's folder
    import torch  # noqa: F401

    running: dict[int, int] = {}
    while True:
        readable, _, _ = select.select([0], [], [], 0.02 if running else None)
        if readable:
            if not (line := _read_line()):
                break
            asked = json.loads(line)
            if (pid := os.fork()) == 0:
                become(**asked)
            running[pid] = asked["number"]
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            print(json.dumps([running.pop(ended[0]), ended[1]]), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _read_line() -> bytes:
    """Unbuffered, so that `select` knows of every other."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def become(arguments: list[str], env: dict[str, str], cwd: str, folder: str, limit: int, number: int) -> None:
    """Runs as `python arguments` would; never returns."""
    status = 1
    try:
        files = [
            (os.devnull, os.O_RDONLY),
            *((f"{folder}/{name}", os.O_WRONLY | os.O_CREAT) for name in ("out", "err")),
        ]
        for at, (path, flags) in enumerate(files):
            os.dup2(os.open(path, flags), at)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(at, mode, closefd=False) for at, mode in enumerate("rww"))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        sys.path[:] = [*filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
        kind, *rest = arguments
        status = _status_of(kind, rest)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status_of(kind: str, rest: list[str]) -> int:
    try:
        if kind == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *rest[1:]]
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        elif kind == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
            sys.argv = [kind, *rest]
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as e:
        if isinstance(e.code, int | None):
            return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    serve()

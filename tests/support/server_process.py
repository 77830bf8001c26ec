"""server.py as a process of its own, or as one rank of several."""

import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import server
from support import processes as launch
from support.http_server import GENEROUS, RunningServer, await_that


def server_command(*flags: object) -> list[str]:
    return [sys.executable, str(Path(server.__file__)), *map(str, flags)]


class Process:
    """A process whose standard error is read as it comes."""

    def __init__(self, *flags: object, run: subprocess.Popen[str] | None = None, descriptors: int | None = None):
        """`run`: one that is started already; `descriptors`: at most so many."""

        def limit() -> None:
            if descriptors is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

        self.child = run or subprocess.Popen(
            server_command(*flags), env=launch.environment(), encoding="utf-8", stderr=subprocess.PIPE, preexec_fn=limit
        )
        self.said: list[str] = []  # lines
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            self.said.append(line)

    def says(self, pattern: str) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            assert self.child.poll() is None or not self._reader.is_alive(), "".join(self.said)
            return re.search(pattern, "".join(self.said))

        return await_that(found, pattern)

    def ready(self) -> RunningServer:
        running = RunningServer(int(self.says(r"listening on http://127\.0\.0\.1:(\d+)")[1]), None)
        self.says(r"ready: ")
        return running

    def left(self) -> int:
        status = self.child.wait(GENEROUS)
        self._reader.join(GENEROUS)
        return status

    def close(self) -> None:
        self.child.kill()
        self.left()

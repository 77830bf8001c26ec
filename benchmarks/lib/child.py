"""A side of a comparison in a process of its own, which is asked by lines of JSON and answers by them."""

import json
import select
import subprocess
from contextlib import suppress
from typing import Any

from lib.timing import Refused


class Child:
    """Each request is a line of JSON, and so is each answer. A process that died is started again with the next."""

    def __init__(self, command: list[str], limit: float = 580.0):
        self.command, self.limit = command, limit
        self.process: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises Refused with the child's own reason, or when it takes more than `limit` seconds or dies."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise Refused("its process ended") from None
        ready, _, _ = select.select([self.process.stdout], [], [], self.limit)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.close()
            raise Refused("its process ended" if ready else f"no answer in {self.limit:.0f} s")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with suppress(BrokenPipeError):  # a request that it did not live to read
                self.process.communicate()
            self.process = None

"""The V3 repository's code as a contestant, in a process of its own: its modules have the names of ours."""

import json
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lib.timing import Refused

HERE = Path(__file__).parent
V3 = HERE.parents[1] / ".peers" / "DeepSeek-V3" / "inference"


class Peer:
    """The V3 repository's code in a process of its own: its modules have the names of ours.

    Each request is a line of JSON, and so is each answer. A process that died is started again with the next request.
    """

    def __init__(self, root: Path, device: torch.device, limit: float = 580.0):
        self.command = [sys.executable, str(HERE / "peer_v3.py"), str(root), str(device)]
        self.limit = limit
        self.process: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises Refused with the peer's own reason, or when it takes more than `limit` seconds or dies."""
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


def find_v3(path: str | None, device: torch.device) -> Peer | None:
    """The V3 repository's `inference` folder as a peer; None, and a line that says so, where it is not."""
    root = Path(path) if path else V3
    if not (root / "kernel.py").exists():
        print(f"The V3 repository is not at {root}: its column is left out (see the top of kernel_gpu.py).")
        return None
    return Peer(root, device)

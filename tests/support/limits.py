"""Limits by processor time, for work whose wall time depends on what else the machine does."""

import subprocess
from typing import Any

LAST_RESORT = 3600  # seconds of wall time, for pytest: a child that waits without computing


def run_within(cpu_seconds: int, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run, in which the command and each of its children may compute for so many seconds.

    One that computes longer is ended by SIGXCPU: the return code is then -24, or what its parent makes of that.
    """
    limited = ["sh", "-c", 'ulimit -t "$0" && exec "$@"', str(cpu_seconds), *command]
    return subprocess.run(limited, capture_output=True, text=True, **options)

"""Limits by processor time, for work whose wall time depends on what else the machine does."""

import subprocess
from typing import Any

LAST_RESORT = 3600  # seconds of wall time, for pytest: a child that waits without computing


def limited(cpu_seconds: int, command: list[str]) -> list[str]:
    """A command that runs another one, which may compute for so many seconds, as may each of its children."""
    return ["sh", "-c", 'ulimit -t "$0" && exec "$@"', str(cpu_seconds), *command]


def run_within(cpu_seconds: int, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run of a limited command. Where it computes longer it is ended by SIGXCPU: the return code is then -24,
    or what its parent makes of that."""
    return subprocess.run(limited(cpu_seconds, command), capture_output=True, text=True, **options)

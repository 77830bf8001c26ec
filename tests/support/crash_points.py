"""Kills a function at chosen moments, as a power cut or `kill -9` would, and looks at what it leaves behind."""

import errno
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tqdm

HOW_MANY = pytest.mark.parametrize("n", [8, pytest.param(200, marks=pytest.mark.trust)])  # moments, at least
EVENTS = ("pwrite", "fsync", "replace", "unlink", "ftruncate")
KILLED = 9
tqdm.tqdm.monitor_interval = 0  # no thread of its own: we fork


def _fork() -> int:
    """os.fork, where the child does not share a lock with us: tqdm's is one between processes, and a child that is killed
    while it holds it would leave it held for good. Nor does it wait for torch's threads, which it has not."""
    if not (pid := os.fork()):
        tqdm.tqdm.set_lock(threading.RLock())
        torch.set_num_threads(1)
    return pid


def _patch(act: Callable[[str, Callable, tuple], object]) -> None:
    for name in EVENTS:
        real = getattr(os, name)
        setattr(os, name, lambda *args, name=name, real=real, **kw: act(name, lambda *a: real(*a, **kw), args))


def _in_child(action: Callable[[], object], act: Callable[[str, Callable, tuple], object] | None) -> int:
    """Runs the action in a forked child with the events going through `act`; returns its exit status."""
    pid = _fork()
    if pid == 0:
        status = 1
        try:
            if act:
                _patch(act)
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def events(action: Callable[[], object], log: Path) -> list[str]:
    """The names of the events of a whole run, in order."""

    def act(name: str, real: Callable, args: tuple) -> object:
        with open(log, "a") as f:
            f.write(name + "\n")
        return real(*args)

    log.unlink(missing_ok=True)
    assert _in_child(action, act) == 0
    return log.read_text().split()


def kill(action: Callable[[], object], at: int) -> None:
    """Runs the action up to event number `at` (a write is done by half), where its process dies."""
    assert not ends_before(action, at)


def ends_before(action: Callable[[], object], at: int) -> bool:
    """The same, where the action may end before it gets so far; says whether it did."""
    count = 0

    def act(name: str, real: Callable, args: tuple) -> object:
        nonlocal count
        if count == at:
            if name == "pwrite":
                real(args[0], args[1][: len(args[1]) // 2], args[2])
            os._exit(KILLED)
        count += 1
        return real(*args)

    status = _in_child(action, act)
    assert status in (0, KILLED)
    return status == 0


def kill_after(action: Callable[[], object], seconds: float) -> bool:
    """Runs the action in a forked child, sends it SIGKILL that long after the fork, and says whether that hit it."""
    pid = _fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)  # the child is ours to wait for, so the number is still its own
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def fill_disk(monkeypatch, at: int) -> None:
    """From event number `at` on, there is no space left for bytes to be written (renaming and removing go on)."""
    count = 0
    for name in ("pwrite", "ftruncate", "fsync"):
        real = getattr(os, name)

        def act(*args, real=real):
            nonlocal count
            count += 1
            if count > at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        monkeypatch.setattr(os, name, act)


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a folder by name, temporaries too."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def moments(log: list[str], n: int) -> list[int]:
    """Moments of a run to be killed at, as numbers of events: about n over its length, the last, those before and after
    each file takes its name, and those where removing begins and ends."""
    steps = {at + d for at, name in enumerate(log) for d in (0, 1) if name == "replace"}
    steps |= {at for at in range(1, len(log)) if (log[at] == "unlink") != (log[at - 1] == "unlink")}
    return sorted({at for at in steps if at < len(log)} | {*range(0, len(log), max(len(log) // n, 1)), len(log) - 1})

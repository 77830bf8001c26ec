"""How a rank notices that another has failed, and how each host prints one line about it before all ranks end."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

STOPPED = "is stopped"
STORE_LIMIT = 1.0  # seconds for an answer of the store, whose host may be gone


class RankFailure(RuntimeError):
    """Another rank died, hung past the timeout or left. The text is one line with the rank that noticed, and either the
    lost rank, if it ran on the same host, or the network's error."""


@dataclass(frozen=True)
class RankProcess:
    """This rank's process, and what it sees of the others without asking them."""

    rank: int = 0
    size: int = 1
    neighbours: tuple[tuple[int, int], ...] = ()  # (rank, process id) of all ranks on this host, this one included
    store: Any = field(default=None, repr=False)  # the TCPStore where the ranks met; None for one rank
    exit_lock: Any = field(default_factory=threading.Lock, compare=False, repr=False)  # held by the thread that ends us

    def dead_ranks(self) -> list[tuple[int, str]]:
        """(rank, state) of the ranks of this host that have died or are stopped."""
        states = [(rank, process_state(pid)) for rank, pid in self.neighbours if rank != self.rank]
        return [(rank, state) for rank, state in states if state]

    def describe_dead_ranks(self) -> str:
        """A line that names them; empty if there are none."""
        lost = " and ".join(f"rank {rank}, which {state}" for rank, state in self.dead_ranks())
        return lost and f"rank {self.rank} lost contact with {lost}"

    @contextlib.contextmanager
    def translate_collective_errors(self, failure: str = "lost contact with another rank") -> Iterator[None]:
        """Raises RankFailure for a RuntimeError of torch.distributed, other than one for lack of memory."""
        try:
            yield
        except (RankFailure, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            until = time.monotonic() + 0.5  # a process closes its connections a moment before it is seen to be dead
            while not (line := self.describe_dead_ranks()) and time.monotonic() < until:
                time.sleep(0.02)
            if not line:
                line = f"rank {self.rank} {failure}: {first_sentence(error)}"
            raise RankFailure(line) from error

    def abort(self, message: str, exit_code: int) -> NoReturn:
        """Ends this process at once, whatever the other ranks do. One rank of each host prints "error: " and a message
        on standard error: that of the first rank that aborted, because those after it only lost contact with it. A
        stopped rank of this host is continued: it finds itself alone and ends too."""
        self.exit_lock.acquire()  # never released
        if message := self._message_to_print(message):
            begin = "\n" if self.size > 1 else ""  # rank 0's progress bar may be in the way
            print(f"{begin}error: {message}", file=sys.stderr, flush=True)
        for rank, pid in self.neighbours:
            if rank != self.rank and process_state(pid) == STOPPED:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(exit_code)

    def _message_to_print(self, message: str) -> str:
        """The first message of all ranks, for the first rank of a host that asks; empty for the others."""
        if self.size == 1:
            return message
        host = self.neighbours[0][0] if self.neighbours else self.rank

        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives torchrun's restarts

        def elect() -> str:
            # compare_set sets a key that is not there, and returns its value
            first_message = self.store.compare_set(f"{attempt}: first message", "", message).decode()
            printer = self.store.compare_set(f"{attempt}: printer of rank {host}'s host", "", str(self.rank)).decode()
            return first_message if printer == str(self.rank) else ""

        elected: list[str] = []

        def ask() -> None:
            with contextlib.suppress(Exception):  # the store may be gone with rank 0
                elected.append(elect())

        # not by concurrent.futures: this may run in a signal handler, above a holder of its global lock
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(STORE_LIMIT)
        if elected:
            return elected[0]
        dead = {rank for rank, _ in self.dead_ranks()}  # the lowest rank that is left prints
        return message if all(rank >= self.rank or rank in dead for rank, _ in self.neighbours) else ""

    def exit_on_signal(self, number: int) -> NoReturn:
        """Aborts because of a signal from outside, which torchrun sends when another rank has ended."""
        lost = self.describe_dead_ranks()
        self.abort(lost or f"stopped from outside ({signal.Signals(number).name})", 1 if lost else 128 + number)

    def install_sigterm_handler(self) -> None:
        """Makes SIGTERM call exit_on_signal where there are several ranks. torchrun sends it to the others as soon as
        one has ended, often before they notice, and none would be left to say why. A thread answers it, because the
        main one may be waiting for a lost rank. Called on the main thread."""
        if self.size == 1:
            return
        signals, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def wait() -> None:
            while os.read(signals, 1)[0] != signal.SIGTERM:
                pass
            self.exit_on_signal(signal.SIGTERM)

        threading.Thread(target=wait, name="termination", daemon=True).start()


def first_sentence(error: BaseException) -> str:
    """An error of torch.distributed in one line: without its file, line, call stack and advice."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = re.sub(r"^\[\S+:\d+\] ", "", text).partition(". This ")[0].partition(". Original ")[0]
    return text.partition(" Exception raised from")[0].strip()[:300]


def process_state(pid: int) -> str:
    """What a process of this host is: "has died", "is stopped", or empty while it runs or where there is no /proc."""
    try:
        stat = open(f"/proc/{pid}/stat", "rb").read()  # noqa: SIM115
    except FileNotFoundError:
        return "has died" if os.path.exists("/proc/self/stat") else ""
    except OSError:
        return ""
    state = stat.rpartition(b")")[2].split()[0]  # after the name, which may hold anything
    return {b"Z": "has died", b"X": "has died", b"T": STOPPED, b"t": STOPPED}.get(state, "")

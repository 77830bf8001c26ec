"""Ranks: who I am among how many, and the few collectives the network needs. Every collective is a no-op at size 1."""

import contextlib
import datetime
import os
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from core.errors import UserError

T = TypeVar("T")
JOINING_LIMIT = 600.0  # seconds for all ranks to come up; a later one may have torch to import from a slow disk
LOADING_LIMIT = 6 * 3600.0  # seconds that the slowest rank may load longer than the fastest
MAX_PARTIAL_SUMS = 1024  # sums and gatherings whose parts are remembered, more than a step has
ERROR_BYTES = 2048  # of an error's text that travel between ranks
STOPPED = "is stopped"
STORE_LIMIT = 1.0  # seconds for a word to or from the meeting point, which may be on a host that is gone
ONE_SHOT_BYTES = 384 << 10  # up to which reading every peer's part at once beats a ring of NCCL's on eight GPUs


class RankFailure(RuntimeError):
    """Another rank died, hung past the timeout or left: the text is one line that says which rank noticed, and which
    is missing if it ran on the same host, or else what the network said."""


@dataclass(frozen=True)
class Group:
    """The tensor-parallel ranks. `pg` moves activations (NCCL or gloo), `control` moves host integers (gloo)."""

    rank: int = 0
    size: int = 1
    pg: Any = field(default=None, compare=False, repr=False)
    control: Any = field(default=None, compare=False, repr=False)
    timeout: float = field(default=300.0, compare=False)  # seconds a rank waits for another
    ordered: bool = False  # sums are taken in rank order, whatever their size (batch-invariant mode)
    one_shot: Any = field(default=None, compare=False, repr=False)  # a OneShot, where the GPUs see each other's memory
    neighbours: tuple[tuple[int, int], ...] = field(default=(), compare=False)  # (rank, process id) on this host
    store: Any = field(default=None, compare=False, repr=False)  # where the ranks met
    leaving: Any = field(default_factory=threading.Lock, compare=False, repr=False)  # held by the thread that ends us
    # what this rank brought into the latest sums and gatherings: see nonfinite_ranks
    partial_sums: Any = field(default_factory=lambda: deque(maxlen=MAX_PARTIAL_SUMS), compare=False, repr=False)

    def split(self, n: int, what: str) -> int:
        """n over the ranks; raises UserError when it does not divide."""
        if n % self.size:
            fits = [s for s in (1, 2, 4, 8, 16, 32) if n % s == 0]
            raise UserError(f"{what} {n} does not divide by {self.size} ranks (it does by {', '.join(map(str, fits))})")
        return n // self.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums x over the ranks in place, in x's own dtype, and returns it.

        A library's all-reduce adds the ranks in an order that depends on an element's place in the buffer, so with
        `ordered` the parts are gathered and added here; two ranks' sum is the same either way.
        """
        if self.size == 1:
            return x
        self._record_partial_sum(x)
        with translate_collective_errors(self):
            if self.one_shot is not None and not self.ordered and self.one_shot.takes(x):
                return self.one_shot(x)
            if not self.ordered or self.size == 2:
                dist.all_reduce(x, group=self.pg)
                return x
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x.contiguous(), group=self.pg)
        for part in parts[1:]:
            parts[0] += part
        return x.copy_(parts[0])

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n) on every rank to (..., n * size), in rank order."""
        if self.size == 1:
            return x
        self._record_partial_sum(x)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with translate_collective_errors(self):
            dist.all_gather(parts, x.contiguous(), group=self.pg)
        return torch.cat(parts, dim=-1)

    def _record_partial_sum(self, x: torch.Tensor) -> None:
        if not x.is_cuda:  # there it would be a kernel more at each of them
            self.partial_sums.append(x.sum(dtype=torch.float32))

    def nonfinite_ranks(self) -> list[int]:
        """The ranks that brought NaN or infinity in, to the first of the latest sums and gatherings that had some: from
        then on every rank has it. Every rank calls this. None is named where all were alike, and for GPUs."""
        first = next((i for i, part in enumerate(self.partial_sums) if not part.isfinite()), MAX_PARTIAL_SUMS)
        self.partial_sums.clear()
        found = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        with translate_collective_errors(self):
            dist.all_gather(found, torch.tensor([first]), group=self.control)
        ranks = [rank for rank, i in enumerate(found) if int(i) == min(map(int, found)) < MAX_PARTIAL_SUMS]
        return ranks if len(ranks) < self.size else []

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrites x, a host tensor of a shape all ranks know, with rank 0's."""
        if self.size > 1:
            with translate_collective_errors(self):
                dist.broadcast(x, src=0, group=self.control)
        return x

    def broadcast_ints(self, values: list[int]) -> list[int]:
        """Rank 0's list of integers on every rank: its length first, then the integers; nothing is pickled."""
        if self.size == 1:
            return values
        n = int(self.broadcast(torch.tensor([len(values)]))[0])
        out = torch.tensor(values, dtype=torch.int64) if self.rank == 0 else torch.empty(n, dtype=torch.int64)
        return self.broadcast(out).tolist() if n else []

    def min_int(self, value: int) -> int:
        """The smallest of the ranks' values."""
        x = torch.tensor([value])
        if self.size > 1:
            with translate_collective_errors(self):
                dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self.control)
        return int(x[0])

    def barrier(self, timeout: float) -> None:
        """Waits for every rank, `timeout` seconds: a slow phase (loading weights) may take longer than a step."""
        if self.size > 1:
            wait = datetime.timedelta(seconds=timeout)
            with translate_collective_errors(self):
                dist.monitored_barrier(group=self.control, timeout=wait)

    def heartbeat(self) -> None:
        """Waits for every rank as `barrier` does, for two thirds of the timeout: what is left is for a call every
        third of it, so that a rank that is gone is missed within the timeout."""
        if self.size > 1:
            with translate_collective_errors(self):
                work = dist.all_reduce(torch.zeros(1), group=self.control, async_op=True)
                if work is not None:  # None: this rank is not of the group
                    work.wait(datetime.timedelta(seconds=self.timeout * 2 / 3))

    def run_on_all_ranks(self, work: Callable[[], T], limit: float = LOADING_LIMIT) -> T:
        """Runs `work`, which holds no collectives, on every rank; a UserError on one of them is raised on all.

        Its text is rank 0's, or names the first rank that had one, and is the same everywhere, so that rank 0 can print
        it for all. `limit`: how long, in seconds, a rank that is done waits for the others.
        """
        if self.size == 1:
            return work()
        error = ""
        try:
            result = work()
        except UserError as e:
            error = str(e)
        self.barrier(limit)
        texts = self._gather_text(error)
        failed = [rank for rank, text in enumerate(texts) if text]
        if failed:
            raise UserError(texts[0] or f"rank {failed[0]}: {texts[failed[0]]}")
        return result

    def dead_ranks(self) -> list[tuple[int, str]]:
        """Ranks of this host that cannot answer any more, each with what has become of it."""
        fates = [(rank, process_state(pid)) for rank, pid in self.neighbours if rank != self.rank]
        return [(rank, fate) for rank, fate in fates if fate]

    def describe_dead_ranks(self) -> str:
        """A line that says which ranks of this host cannot answer any more; empty while all can."""
        missing = " and ".join(f"rank {rank}, which {fate}" for rank, fate in self.dead_ranks())
        return missing and f"rank {self.rank} lost contact with {missing}"

    def abort(self, line: str, status: int) -> NoReturn:
        """Ends this process at once, whatever state the other ranks are in. The user is told `line`, on standard error,
        by the first rank of a host to leave: later ones lost contact with the ones before. From another host than the
        one where it began, the line is that of the first of all. A rank of this host that is stopped goes on, and finds
        itself alone: it would outlive its run otherwise."""
        self.leaving.acquire()  # never released
        if line := self._line_to_tell(line):
            begin = "\n" if self.size > 1 else ""  # rank 0's progress bar may be in the way
            print(f"{begin}error: {line}", file=sys.stderr, flush=True)
        for rank, pid in self.neighbours:
            if rank != self.rank and process_state(pid) == STOPPED:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)

    def exit_on_signal(self, number: int) -> NoReturn:
        """Leaves on a signal from outside: torchrun sends one when another rank has ended."""
        lost = self.describe_dead_ranks()
        self.abort(lost or f"stopped from outside ({signal.Signals(number).name})", 1 if lost else 128 + number)

    def shutdown(self) -> None:
        """Leaves the ranks when all have done their work, or none can. torchrun ends the others as soon as one is gone
        with another status than 0: this one says no more, and waits for them to have got so far."""
        mine = self.leaving.acquire(blocking=False)
        try:
            with contextlib.suppress(RankFailure):
                self.barrier(10)
            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException:  # interrupted, say: then this rank has a line to tell after all
            if mine:
                self.leaving.release()
            raise

    def install_sigterm_handler(self) -> None:
        """From now on SIGTERM is answered with a line. torchrun sends it to all other ranks as soon as one has ended,
        often before they notice, and then there would be nobody left to say what happened. A thread of its own
        answers, because the main one may be waiting for a rank that is gone. Called on the main thread."""
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

    def _line_to_tell(self, line: str) -> str:
        """What this rank is to tell, empty if another of its host has told something; see `abort`."""
        if self.size == 1:
            return line
        host = self.neighbours[0][0] if self.neighbours else self.rank

        def ask() -> tuple[bool, str]:
            first = self.store.add(f"last words of the host of {host}", 1) == 1
            if self.store.add("last words", 1) == 1:
                self.store.set("first words", line)
                return first, line
            return first, self.store.get("first words").decode() if self.store.check(["first words"]) else line

        answers: list[tuple[bool, str]] = []

        def call() -> None:
            with contextlib.suppress(Exception):  # the meeting point may have gone with rank 0
                answers.append(ask())

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(STORE_LIMIT)
        if answers:
            return answers[0][1] if answers[0][0] else ""
        gone = {rank for rank, _ in self.dead_ranks()}
        return line if all(rank >= self.rank or rank in gone for rank, _ in self.neighbours) else ""

    def _gather_text(self, text: str) -> list[str]:
        """Every rank's text (cut to ERROR_BYTES), as bytes in a tensor: nothing is pickled."""
        mine = torch.zeros(ERROR_BYTES, dtype=torch.uint8)
        raw = text.encode("utf-8", "replace")[:ERROR_BYTES]
        mine[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with translate_collective_errors(self):
            dist.all_gather(parts, mine, group=self.control)
        return [bytes(part.tolist()).rstrip(b"\0").decode("utf-8", "ignore") for part in parts]


SOLO = Group()


def environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun set them; (0, 1, 0, 1) without it.

    Raises UserError for values that are no such thing.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, size, local, local_size = (int(os.environ.get(n, d)) for n, d in zip(names, "0101", strict=True))
    except ValueError as e:
        raise UserError(f"torchrun's environment ({', '.join(names)}) is not made of numbers: {e}") from None
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank} but WORLD_SIZE is {size}")
    return rank, size, local, local_size


def join(timeout: float) -> Group:
    """Joins the ranks torchrun started, with gloo, for tensors on CPUs; `on` follows for GPUs.

    `timeout` (seconds) is how long a rank waits for another before it gives the run up. Ranks of one host keep to its
    loopback interface unless GLOO_SOCKET_IFNAME names another. Raises UserError and RankFailure.
    """
    rank, size, _, local_size = environment()
    if size == 1:
        return SOLO
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if local_size == size and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())  # gloo takes it from there and nowhere else
    with translate_collective_errors(Group(rank, size), "could not join the others"):
        wait = datetime.timedelta(seconds=max(timeout, JOINING_LIMIT))
        store = _meeting_point(rank, size, wait)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
        hosts = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        mine = torch.tensor([_host(), os.getpid()])
        places = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(places, mine, group=hosts)
    pids = [(other, int(place[1])) for other, place in enumerate(places) if place[0] == mine[0]]
    return Group(rank, size, hosts, hosts, timeout, neighbours=tuple(pids), store=store)


def _meeting_point(rank: int, size: int, wait: datetime.timedelta) -> Any:
    """The store at MASTER_ADDR: torchrun's own, which listens on all interfaces; without torchrun rank 0 keeps it, on
    that address alone."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(f"{size} ranks, but MASTER_ADDR is {host!r} and MASTER_PORT {port!r}: start with torchrun")
    listener = None
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        try:
            family, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address[:2], family=family, backlog=size).detach()
        except OSError as e:
            raise UserError(f"MASTER_ADDR {host}, MASTER_PORT {port}: {e.strerror or e}") from None
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), size, is_master=listener is not None, timeout=wait, wait_for_workers=False,
        master_listen_fd=listener,
    )  # fmt: skip


def _host() -> int:
    """A number that ranks have in common if they can see each other's processes and belong to one torchrun."""
    try:
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        processes = 0
    return zlib.crc32(f"{socket.gethostname()} {processes} {os.environ.get('GROUP_RANK')}".encode())


def process_state(pid: int) -> str:
    """What has become of a process of this host; empty while it runs, or where the system does not say."""
    try:
        stat = open(f"/proc/{pid}/stat", "rb").read()  # noqa: SIM115
    except FileNotFoundError:
        return "has died" if os.path.exists("/proc/self/stat") else ""
    except OSError:
        return ""
    state = stat.rpartition(b")")[2].split()[0]  # after the name, which may hold anything
    return {b"Z": "has died", b"X": "has died", b"T": STOPPED, b"t": STOPPED}.get(state, "")


def on(device: torch.device, group: Group) -> Group:
    """The same ranks with tensors on `device`: over NCCL where it is a GPU. Every rank calls it with its own."""
    if group.size == 1 or device.type != "cuda":
        return group
    wait = datetime.timedelta(seconds=group.timeout)
    with translate_collective_errors(group):
        group = replace(group, pg=dist.new_group(backend="nccl", timeout=wait, device_id=device))
    if len(group.neighbours) < group.size:
        return group
    one_shot = OneShot.offered(group, device)
    return replace(group, one_shot=one_shot) if group.min_int(int(one_shot is not None)) else group


class OneShot:
    """Sums of small tensors over the GPUs of one host: each rank reads all parts from its peers' memory at once, which
    takes one kernel and no rounds (torch's symmetric memory)."""

    def __init__(self, group: Group, device: torch.device):
        """Raises RuntimeError, AttributeError or ImportError where torch or the GPUs do not offer it."""
        from torch.distributed import _symmetric_memory as symmetric

        self.name = group.pg.group_name
        self.buffer = symmetric.empty(ONE_SHOT_BYTES, dtype=torch.uint8, device=device)
        symmetric.rendezvous(self.buffer, group=self.name)

    @classmethod
    def offered(cls, group: Group, device: torch.device) -> "OneShot | None":
        """One that has summed a sample rightly, or None. Every rank calls it."""
        try:
            found = cls(group, device)
            sample = torch.arange(8, device=device, dtype=torch.bfloat16) + group.rank
            expected = torch.arange(8, device=device) * group.size + group.size * (group.size - 1) // 2
            return found if torch.equal(found(sample).float(), expected.to(torch.bfloat16).float()) else None
        except (RuntimeError, AttributeError, ImportError, TypeError, ValueError):
            return None

    def takes(self, x: torch.Tensor) -> bool:
        return x.nbytes <= ONE_SHOT_BYTES and x.nbytes % 16 == 0 and x.is_contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the ranks, in x."""
        part = self.buffer[: x.nbytes].view(x.dtype).view(x.shape)
        part.copy_(x)
        return x.copy_(torch.ops.symm_mem.one_shot_all_reduce(part, "sum", self.name))


def choose_threads(asked: int | None, local_size: int) -> int:
    """CPU threads of this rank: as asked, else the cores over the ranks of this host. Raises UserError for more than
    the host has cores.

    torchrun sets OMP_NUM_THREADS=1 for several ranks a host, which would leave the other cores idle.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked is not None and asked > (most := max(cores, os.cpu_count() or 1)):
        raise UserError(f"--threads is {asked}, this host has {most} cores")
    threads = asked or max(1, cores // local_size)
    torch.set_num_threads(threads)
    return threads


class translate_collective_errors:
    """Turns a collective's failure into one line that names this rank, and the missing one if it ran on this host."""

    def __init__(self, group: Group, failure: str = "lost contact with another rank"):
        self.group, self.failure = group, failure

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, RankFailure | torch.OutOfMemoryError):
            return
        until = time.monotonic() + 0.5  # a process closes its connections a moment before it is seen to be dead
        while not (said := self.group.describe_dead_ranks()) and time.monotonic() < until:
            time.sleep(0.02)
        if not said:
            cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
            cause = re.sub(r"^\[\S+:\d+\] ", "", cause).partition(". This is typically")[0]  # gloo's own trimmings
            said = f"rank {self.group.rank} {self.failure}: {cause}"
        raise RankFailure(said) from error

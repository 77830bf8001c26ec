"""Ranks: who I am among how many, and the few collectives the network needs. Every collective is a no-op at size 1."""

import datetime
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from errors import UserError

T = TypeVar("T")
ExpertLayout = Literal["whole", "split"]  # a rank has some experts whole, or a share of every one's inner width
JOINING_LIMIT = 600.0  # seconds for all ranks to come up; a later one may have torch to import from a slow disk
LOADING_LIMIT = 6 * 3600.0  # seconds that the slowest rank may load longer than the fastest
ERROR_BYTES = 2048  # of an error's text that travel between ranks


class RankFailure(RuntimeError):
    """Another rank died, hung past the timeout or left: the text is one line that says which rank noticed and why."""


@dataclass(frozen=True)
class Group:
    """The tensor-parallel ranks. `pg` moves activations (NCCL or gloo), `control` moves host integers (gloo)."""

    rank: int = 0
    size: int = 1
    pg: Any = field(default=None, compare=False, repr=False)
    control: Any = field(default=None, compare=False, repr=False)
    timeout: float = field(default=300.0, compare=False)  # seconds a rank waits for another
    ordered: bool = False  # sums are taken in rank order, whatever their size (batch-invariant mode)

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
        with _speaking_of_ranks(self.rank):
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
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _speaking_of_ranks(self.rank):
            dist.all_gather(parts, x.contiguous(), group=self.pg)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrites x, a host tensor of a shape all ranks know, with rank 0's."""
        if self.size > 1:
            with _speaking_of_ranks(self.rank):
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
            with _speaking_of_ranks(self.rank):
                dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self.control)
        return int(x[0])

    def barrier(self, timeout: float) -> None:
        """Waits for every rank, `timeout` seconds: a slow phase (loading weights) may take longer than a step."""
        if self.size > 1:
            wait = datetime.timedelta(seconds=timeout)
            with _speaking_of_ranks(self.rank):
                dist.monitored_barrier(group=self.control, timeout=wait)

    def roll_call(self) -> None:
        """Waits for every rank as `barrier` does, for two thirds of the timeout: what is left is for a call every
        third of it, so that a rank that is gone is missed within the timeout."""
        if self.size > 1:
            with _speaking_of_ranks(self.rank):
                work = dist.all_reduce(torch.zeros(1), group=self.control, async_op=True)
                if work is not None:  # None: this rank is not of the group
                    work.wait(datetime.timedelta(seconds=self.timeout * 2 / 3))

    def together(self, work: Callable[[], T], limit: float = LOADING_LIMIT) -> T:
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

    def _gather_text(self, text: str) -> list[str]:
        """Every rank's text (cut to ERROR_BYTES), as bytes in a tensor: nothing is pickled."""
        mine = torch.zeros(ERROR_BYTES, dtype=torch.uint8)
        raw = text.encode("utf-8", "replace")[:ERROR_BYTES]
        mine[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with _speaking_of_ranks(self.rank):
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

    `timeout` (seconds) is how long a rank waits for another before it gives the run up.
    """
    rank, size, _, _ = environment()
    if size == 1:
        return SOLO
    with _speaking_of_ranks(rank, "could not join the others"):
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=max(timeout, JOINING_LIMIT)))
        hosts = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
    return Group(rank, size, hosts, hosts, timeout)


def on(device: torch.device, group: Group) -> Group:
    """The same ranks with tensors on `device`: over NCCL where it is a GPU. Every rank calls it with its own."""
    if group.size == 1 or device.type != "cuda":
        return group
    wait = datetime.timedelta(seconds=group.timeout)
    with _speaking_of_ranks(group.rank):
        return replace(group, pg=dist.new_group(backend="nccl", timeout=wait, device_id=device))


def stop() -> None:
    """Leaves the process group; safe to call twice, or when none was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_threads(asked: int | None, local_size: int) -> int:
    """CPU threads of this rank: as asked, else the cores over the ranks of this host.

    torchrun sets OMP_NUM_THREADS=1 for several ranks a host, which would leave the other cores idle.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = asked or max(1, cores // local_size)
    torch.set_num_threads(threads)
    return threads


class _speaking_of_ranks:
    """Turns a collective's failure into one line that names this rank."""

    def __init__(self, rank: int, failure: str = "lost contact with another rank"):
        self.rank, self.failure = rank, failure

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, RankFailure):
            cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
            cause = re.sub(r"^\[\S+:\d+\] ", "", cause).partition(". This is typically")[0]  # gloo's own trimmings
            raise RankFailure(f"rank {self.rank} {self.failure}: {cause}") from error

"""Ranks as threads of one process, whose collectives are a barrier and a sum."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from parallel.group import SOLO, Group, tree_sum

T = TypeVar("T")

class Meeting:
    """Meeting place of `size` threads."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size
        self.reduced = [0] * size
        self.calls: list[list[tuple[str, int]]] = [[] for _ in range(size)]  # by rank: collectives of activations, bytes

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait(60)
        values = list(self.slots)
        self.barrier.wait(60)
        return values


@dataclass(frozen=True)
class ThreadGroup(Group):
    ranks: Meeting = field(default=None, compare=False)  # type: ignore[assignment]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.ranks.reduced[self.rank] += 1
        self.ranks.calls[self.rank].append(("all_reduce", x.nbytes))
        parts = self.ranks.exchange(self.rank, x.clone())
        return x.copy_(tree_sum(parts) if self.ordered else torch.stack(parts).sum(0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.ranks.calls[self.rank].append(("gather", x.nbytes))
        return torch.cat(self.ranks.exchange(self.rank, x.clone()), dim=-1)

    def gather(self, counts: Any, *parts: torch.Tensor) -> list[torch.Tensor]:
        given = [part[: counts[self.rank]].clone() for part in parts]
        self.ranks.calls[self.rank].append(("gather", sum(part.nbytes for part in given)))
        return [torch.cat(rows) for rows in zip(*self.ranks.exchange(self.rank, given), strict=True)]

    def scatter_sum(self, x: torch.Tensor, counts: Any, n: int) -> torch.Tensor:
        self.ranks.calls[self.rank].append(("scatter_sum", x.nbytes // self.size))  # to each rank, of as many rows
        mine = [part.split(list(counts))[self.rank] for part in self.ranks.exchange(self.rank, x.clone())]
        total = tree_sum(mine).to(x.dtype)
        return torch.cat((total, total.new_zeros(n - len(total), x.shape[1])))

    def send_receive(self, x: torch.Tensor | None, n: int, like: torch.Tensor) -> torch.Tensor | None:
        given = self.ranks.exchange(self.rank, None if x is None else x.clone())
        if self.rank == self.size - 1 or not n:
            return None
        got = given[self.rank + 1]
        assert isinstance(got, torch.Tensor) and got.shape == (n, like.shape[1]) and got.dtype == like.dtype
        return got

    def gather_ints(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.ranks.exchange(self.rank, x.clone()))

    def gather_bytes(self, data: bytes) -> list[bytes]:
        return self.ranks.exchange(self.rank, data)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self.ranks.exchange(self.rank, x.clone())[0])

    def broadcast_ints(self, values: list[int]) -> list[int]:
        return list(self.ranks.exchange(self.rank, list(values))[0])

    def heartbeat(self) -> None:
        self.ranks.exchange(self.rank, None)

    def run_on_all_ranks(self, work: Callable[[], T], limit: float = 0) -> T:
        """An error is raised on its own rank, which aborts the meeting for the others."""
        result = work()
        self.heartbeat()
        return result


def on_threads(size: int, work: Callable[[int], Any], meetings: list[Meeting]) -> list[Any]:
    """work(rank) on `size` threads; their results in rank order. The first exception is raised here."""
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as e:
            errors.append(e)
            for meeting in meetings:
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


def on_every_rank(size: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """work(group) on the ranks of one tensor-parallel group."""
    meeting = Meeting(size)
    return on_threads(size, lambda rank: work(ThreadGroup(rank, size, ranks=meeting)), [meeting])


def on_every_lane(
    lanes: int, size: int, work: Callable[[Group, Group, Group], Any], ordered: bool = False
) -> list[Any]:
    """work(tp, dp, world) on the ranks of `lanes` lanes of `size` tensor-parallel ranks each, in rank order."""
    n = lanes * size
    world, tps, dps = Meeting(n), [Meeting(size) for _ in range(lanes)], [Meeting(lanes) for _ in range(size)]

    def group(rank: int, size: int, meeting: Meeting, members: range) -> Group:
        if size == 1:
            return SOLO
        return ThreadGroup(rank, size, members=tuple(members), ordered=ordered, ranks=meeting)

    def one(rank: int) -> Any:
        lane, number = divmod(rank, size)
        tp = group(number, size, tps[lane], range(lane * size, (lane + 1) * size))
        return work(tp, group(lane, lanes, dps[number], range(number, n, size)), group(rank, n, world, range(n)))

    return on_threads(n, one, [world, *tps, *dps])


def on_every_stage(
    stages: int, size: int, work: Callable[[Group, Group, Group, int], Any], ordered: bool = False
) -> list[Any]:
    """work(tp, pp, world, stage) on the ranks of a pipeline of so many stages of `size` ranks each, in rank order: the
    last stage's first."""

    def one(tp: Group, pp: Group, world: Group) -> Any:
        return work(tp, pp, world, stages - 1 - pp.rank if stages > 1 else 0)

    return on_every_lane(stages, size, one, ordered)

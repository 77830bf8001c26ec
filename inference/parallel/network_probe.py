"""One link or collective tried and timed, within a limit: for network.py."""

import datetime
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from core import devices
from core.errors import describe
from parallel.failure import first_sentence

TIMED = 0.15  # seconds to repeat a collective
MOST_REPEATS = 30
LATENCY_BYTES = 4096  # below, the time says nothing about the bandwidth
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "reduce_scatter", "all_to_all")
Test = tuple[str, tuple[int, ...]]  # what is tried, "link" or the like or a group's collective, and the ranks in order


@dataclass
class Probe:
    """Runs one rank's part of tests, over NCCL on GPUs and gloo elsewhere."""

    rank: int
    store: Any
    device: torch.device
    sizes: Sequence[int]  # bytes, rising
    limit: float  # seconds for one wait
    open: list[Any] = field(default_factory=list)  # groups that others may still be using

    def run(self, name: str, test: Test) -> dict[str, Any]:
        """What this rank has measured, or {"error": one line}. Takes at most three times the limit."""
        result: dict[str, Any] = {}

        def work() -> None:
            devices.make_current(self.device)
            kind, ranks = test
            try:
                group = self.group(name, ranks)
                measure = self.link if "link" in kind else self.collective
                result.update(measure(name, group, ranks, kind.split()[-1]))
            except (RuntimeError, TimeoutError, ValueError) as e:
                result["error"] = first_sentence(e)
            except Exception as e:  # a mistake of ours
                result["error"] = describe(e)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(3 * self.limit)
        return {"error": f"nothing for {3 * self.limit:g} s"} if thread.is_alive() else dict(result)

    def group(self, name: str, ranks: Sequence[int]) -> Any:
        """Connections between these ranks alone. Raises RuntimeError where they cannot be made in time."""
        place, wait = ranks.index(self.rank), datetime.timedelta(seconds=self.limit)
        store = dist.PrefixStore(name, self.store)  # type: ignore[attr-defined]
        group: Any
        if self.device.type == "cpu":
            group = dist.ProcessGroupGloo(store, place, len(ranks), wait)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = wait
            group = dist.ProcessGroupNCCL(store, place, len(ranks), options)
        self.open.append(group)
        return group

    def close(self) -> None:
        """Leaves the groups that every rank has done with."""
        for group in self.open:
            if self.device.type != "cpu":
                group.abort()
        self.open.clear()

    def wait(self, work: Any) -> None:
        """Until a collective is done on the device. Raises RuntimeError or TimeoutError."""
        work.wait()
        if self.device.type == "cpu":
            return
        event = torch.Event(self.device)
        event.record()
        until = time.monotonic() + self.limit
        while not event.query():
            if time.monotonic() > until:
                raise TimeoutError(f"not done after {self.limit:g} s")

    def link(self, name: str, group: Any, ranks: Sequence[int], _: str) -> dict[str, Any]:
        """Between two ranks: {"seconds": a few bytes take one way, "bytes": [sizes], "sent": [seconds that each took
        from this rank to the other]}, and what arrived wrong as {"wrong": line}."""
        me = ranks.index(self.rank)
        small = torch.zeros(8, dtype=torch.uint8, device=self.device)

        def send(x: torch.Tensor) -> None:
            self.wait(group.send([x], 1 - me, 0))

        def receive(x: torch.Tensor) -> None:
            self.wait(group.recv([x], 1 - me, 0))

        def timed(x: torch.Tensor, sender: bool) -> float:
            """Seconds until the other has it and has said so."""
            begin = time.perf_counter()
            (send if sender else receive)(x)
            (receive if sender else send)(small)
            return time.perf_counter() - begin

        timed(small, me == 0)
        latency = min(timed(small, me == 0) for _ in range(10)) / 2
        result: dict[str, Any] = {"seconds": latency, "bytes": [], "sent": []}
        for n in self.sizes:
            x = torch.arange(251, dtype=torch.uint8).repeat(n // 251 + 1)[:n].to(self.device)
            mine = 0.0
            for sender in (0, 1):
                y = x if me == sender else torch.zeros_like(x)
                first = timed(y, me == sender)
                if not torch.equal(x, y):
                    result["wrong"] = f"{n} bytes from rank {ranks[sender]} to rank {ranks[1 - sender]} came changed"
                repeats = self.agree(f"{name} {n} {sender}", me == sender, repeats_in(first))
                best = min(first, *(timed(y, me == sender) for _ in range(repeats)))
                if me == sender:
                    mine = max(best - latency, best / 2)
            result["bytes"].append(n)
            result["sent"].append(mine)
            if not self.agree(f"{name} {n} go on", me == 0, int(self.next_fits(n, mine))):
                break
        return result

    def collective(self, name: str, group: Any, ranks: Sequence[int], what: str) -> dict[str, Any]:
        """{"bytes": [...], "seconds": [...]} of one collective, each size repeated; sums and places are checked."""
        place, n_ranks = ranks.index(self.rank), len(ranks)
        result: dict[str, Any] = {"bytes": [], "seconds": []}
        for size in (4 * n_ranks, *self.sizes):
            n = max(1, size // (4 * n_ranks))  # float32 of a rank's share
            mine, expected, run = prepare(group, what, n, place, n_ranks, self.device)
            begin = time.perf_counter()
            out = run(self.wait)
            first = time.perf_counter() - begin
            if not torch.equal(out.cpu(), expected):
                result["wrong"] = f"{what} of {mine.nbytes} bytes gave wrong numbers on rank {self.rank}"
            repeats = self.agree(f"{name} {size}", place == 0, repeats_in(first))
            run(self.wait)  # the ranks come back from agreeing one after the other
            begin = time.perf_counter()
            for _ in range(repeats):
                run(self.wait)
            seconds = (time.perf_counter() - begin) / repeats
            result["bytes"].append(4 * n * n_ranks)
            result["seconds"].append(seconds)
            if not self.agree(f"{name} {size} go on", place == 0, int(self.next_fits(size, seconds))):
                break
        return result

    def next_fits(self, size: int, seconds: float) -> bool:
        """Whether there is a next size, and it will take little of the limit."""
        larger = [n for n in self.sizes if n > size]
        return bool(larger) and (size < LATENCY_BYTES or seconds * larger[0] / size < self.limit / 10)

    def agree(self, key: str, decides: bool, value: int) -> int:
        """One rank's number on all ranks of a test."""
        if decides:
            self.store.set(key, str(value))
            return value
        self.store.wait([key], datetime.timedelta(seconds=self.limit))
        return int(self.store.get(key))


def repeats_in(seconds: float) -> int:
    """How often to repeat what takes so long."""
    return max(1, min(MOST_REPEATS, int(TIMED / max(seconds, 1e-6))))


Run = Callable[[Callable[[Any], None]], torch.Tensor]


def prepare(
    group: Any, what: str, n: int, place: int, n_ranks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Run]:
    """This rank's input, the output that is expected (float32, on the host), and a call that makes it. Sums are of
    whole numbers, so they are exact in any order."""

    def numbers(rank: int) -> torch.Tensor:
        return (torch.arange(n_ranks * n) % 11 + 13 * rank).float()

    inputs = [numbers(rank) for rank in range(n_ranks)]
    share = slice(place * n, (place + 1) * n)
    total = torch.stack(inputs).sum(0) if what in ("all_reduce", "reduce_scatter") else torch.empty(0)
    expected = {
        "all_reduce": lambda: total,
        "reduce_scatter": lambda: total[share],
        "broadcast": lambda: inputs[0],
        "all_gather": lambda: torch.cat([x[:n] for x in inputs]),
        "all_to_all": lambda: torch.cat([x[share] for x in inputs]),
    }[what]()
    mine = inputs[place].to(device)
    mine = mine[:n].clone() if what == "all_gather" else mine
    out = torch.empty_like(expected, device=device)

    def run(wait: Callable[[Any], None]) -> torch.Tensor:
        if what in ("all_reduce", "broadcast"):
            out.copy_(mine)
            wait(group.allreduce([out]) if what == "all_reduce" else group.broadcast([out]))
        elif what == "all_gather":
            wait(group._allgather_base(out, mine))
        elif what == "reduce_scatter":
            wait(group._reduce_scatter_base(out, mine, dist.ReduceScatterOptions()))
        else:
            wait(group.alltoall_base(out, mine, [], []))
        return out

    return mine, expected, run

"""The ranks of a run and their collectives, which do nothing where there is one rank.

A run has one group of all ranks. With data-parallel lanes (`--dp`) each rank is in two more: its lane, which is tensor
parallel (`tp`), and the ranks that have its place in the other lanes (`dp`). See startup.lanes.
"""

import contextlib
import datetime
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from core.devices import CPU
from core.errors import UserError
from parallel.failure import RankFailure, RankProcess

T = TypeVar("T")
LOADING_LIMIT = 6 * 3600.0  # seconds that the slowest rank may load longer than the fastest
MAX_PARTIAL_SUMS = 1024  # more than a step has
ERROR_BYTES = 2048  # of an error's text that other ranks get
ONE_SHOT_BYTES = 384 << 10  # up to which one-shot sums are the fastest on eight GPUs
MULTICAST_BYTES = 16 << 20  # up to which sums in the switch, with a copy before and after, beat NCCL's ring


@dataclass(frozen=True)
class Group:
    """Ranks that work on one model together. `pg` moves activations (NCCL, gloo or what else the device has),
    `control` moves integers of the host (gloo). Every rank of the group must call the same collectives in the same
    order; all of them raise RankFailure where another rank is lost."""

    rank: int = 0
    size: int = 1
    pg: Any = field(default=None, compare=False, repr=False)
    control: Any = field(default=None, compare=False, repr=False)
    timeout: float = field(default=300.0, compare=False)  # seconds a rank waits for another
    members: tuple[int, ...] = ()  # their numbers among all ranks of the run; empty: these are all
    ordered: bool = False  # sums are taken in one order, whatever their size (batch-invariant mode): see tree_sum
    through_host: bool = field(default=False, compare=False)  # activations go through the host's memory and `control`
    one_shot: Any = field(default=None, compare=False, repr=False)  # a OneShot, where the GPUs see each other's memory
    process: RankProcess = field(default_factory=RankProcess, compare=False, repr=False)
    # sums (float32) of what this rank put into the latest collectives of activations: see nonfinite_ranks
    partial_sums: Any = field(default_factory=lambda: deque(maxlen=MAX_PARTIAL_SUMS), compare=False, repr=False)

    def split(self, n: int, what: str) -> int:
        """n / size. Raises UserError where that is no integer; `what` names n in its text."""
        if n % self.size:
            fits = [s for s in (1, 2, 4, 8, 16, 32) if n % s == 0]
            raise UserError(f"{what} {n} does not divide by {self.size} ranks (it does by {', '.join(map(str, fits))})")
        return n // self.size

    # ----------------------------------------------------------------------------------------------------------------
    # Activations
    # ----------------------------------------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x summed over the ranks, in its own dtype: x itself, or another tensor.

        A library's all-reduce adds the ranks in an order that depends on an element's place in the buffer, so with
        `ordered` the parts are gathered and added here, in float32; two ranks' sum is the same either way.
        """
        if self.size == 1:
            return x
        self._record_partial_sum(x)
        if self.through_host:
            return x.copy_(replace(self, through_host=False).all_reduce(x.cpu()))
        with self.process.translate_collective_errors():
            if self.one_shot is not None and not self.ordered and self.one_shot.accepts(x):
                return self.one_shot(x)
            if not self.ordered or self.size == 2:
                dist.all_reduce(x, group=self.pg)
                return x
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x.contiguous(), group=self.pg)
        return x.copy_(tree_sum(parts))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n) on every rank to (..., n * size), in rank order."""
        if self.size == 1:
            return x
        self._record_partial_sum(x)
        if self.through_host:
            return replace(self, through_host=False).all_gather(x.cpu()).to(x.device)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self.process.translate_collective_errors():
            dist.all_gather(parts, x.contiguous(), group=self.pg)
        return torch.cat(parts, dim=-1)

    def gather(self, counts: Sequence[int], *parts: torch.Tensor) -> list[torch.Tensor]:
        """For each part (n, ...) the rows of all ranks, (sum of counts, ...), in rank order. Rank i gives its first
        counts[i] rows; `counts` is the same on all ranks. One message of bytes, whatever the parts' dtypes."""
        if self.size == 1:
            return list(parts)
        mine, most = counts[self.rank], max(counts)
        widths = [math.prod(part.shape[1:]) * part.itemsize for part in parts]
        message = parts[0].new_zeros(most, sum(widths), dtype=torch.uint8)
        for part, columns in zip(parts, message.split(widths, dim=1), strict=True):
            columns[:mine] = part[:mine].contiguous().view(torch.uint8).view(mine, columns.shape[1])
        rows = [message.new_empty(most, sum(widths), device=CPU if self.through_host else message.device)
                for _ in range(self.size)]  # fmt: skip
        with self.process.translate_collective_errors():
            dist.all_gather(rows, message.to(rows[0].device), group=self.control if self.through_host else self.pg)
        whole = torch.cat([row[:n] for row, n in zip(rows, counts, strict=True)]).to(message.device)
        return [
            columns.clone(memory_format=torch.contiguous_format).view(part.dtype).view(-1, *part.shape[1:])
            for columns, part in zip(whole.split(widths, dim=1), parts, strict=True)
        ]

    def scatter_sum(self, x: torch.Tensor, counts: Sequence[int], n: int) -> torch.Tensor:
        """The opposite: x (sum of counts, H), a part of every rank's rows, to the sum of all parts of this rank's own,
        (n, H) in x's dtype. Added in float32; rows from counts[rank] on are zeros."""
        if self.size == 1:
            return x
        mine = counts[self.rank]
        parts = x.new_empty(self.size * mine, *x.shape[1:], device=CPU if self.through_host else x.device)
        with self.process.translate_collective_errors():
            dist.all_to_all_single(
                parts, x.contiguous().to(parts.device), [mine] * self.size, list(counts),
                group=self.control if self.through_host else self.pg,
            )  # fmt: skip
        total = tree_sum(parts.to(x.device).view(self.size, mine, *x.shape[1:])).to(x.dtype)
        return total if mine == n else torch.cat((total, total.new_zeros(n - mine, *x.shape[1:])))

    def send_receive(self, x: torch.Tensor | None, n: int, like: torch.Tensor) -> torch.Tensor | None:
        """Between the stages of a pipeline, whose last is rank 0: gives x (T, H) to the next stage and returns the n
        rows that the one before gives, in the dtype, width and device of `like`; None for no rows."""
        if self.size == 1:
            return None
        others = self.members or range(self.size)
        device = torch.device("cpu") if self.through_host else like.device
        pg = self.control if self.through_host else self.pg
        with self.process.translate_collective_errors():
            transfers = []
            if x is not None and len(x) and self.rank > 0:
                transfers.append(dist.P2POp(dist.isend, x.contiguous().to(device), others[self.rank - 1], pg))
            got = None
            if n and self.rank < self.size - 1:
                got = torch.empty(n, like.shape[1], dtype=like.dtype, device=device)
                transfers.append(dist.P2POp(dist.irecv, got, others[self.rank + 1], pg))
            for work in dist.batch_isend_irecv(transfers) if transfers else ():
                work.wait()
        return None if got is None else got.to(like.device)

    def _record_partial_sum(self, x: torch.Tensor) -> None:
        if x.is_cpu:  # elsewhere a kernel more for each collective would slow decoding down
            self.partial_sums.append(x.sum(dtype=torch.float32))

    def nonfinite_ranks(self) -> list[int]:
        """The ranks that put NaN or infinity into the first of the recorded collectives that had any, after which
        every rank has them. Empty if all ranks did, on GPUs and their like, and in one of several lanes: what a rank
        puts in there may have come from another. Clears the record."""
        if self.size < self.process.size:
            self.partial_sums.clear()
            return []
        first = next((i for i, part in enumerate(self.partial_sums) if not part.isfinite()), MAX_PARTIAL_SUMS)
        self.partial_sums.clear()
        firsts = self.gather_ints(torch.tensor(first)).tolist()
        ranks = [rank for rank, i in enumerate(firsts) if i == min(firsts) < MAX_PARTIAL_SUMS]
        return ranks if len(ranks) < self.size else []

    # ----------------------------------------------------------------------------------------------------------------
    # Integers of the host
    # ----------------------------------------------------------------------------------------------------------------

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrites x, a host tensor of the same shape and dtype on all ranks, with rank 0's, and returns it."""
        if self.size > 1:
            with self.process.translate_collective_errors():
                dist.broadcast(x, group=self.control, group_src=0)
        return x

    def broadcast_ints(self, values: list[int]) -> list[int]:
        """Rank 0's integers on every rank: their number first, then they themselves; nothing is pickled."""
        if self.size == 1:
            return values
        n = int(self.broadcast(torch.tensor([len(values)]))[0])
        out = torch.tensor(values, dtype=torch.int64) if self.rank == 0 else torch.empty(n, dtype=torch.int64)
        return self.broadcast(out).tolist() if n else []

    def gather_ints(self, x: torch.Tensor) -> torch.Tensor:
        """(...) on the host of every rank to (size, ...), in rank order."""
        if self.size == 1:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self.process.translate_collective_errors():
            dist.all_gather(parts, x, group=self.control)
        return torch.stack(parts)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's bytes on every rank, in rank order: their lengths first, then they themselves."""
        if self.size == 1:
            return [data]
        lengths = self.gather_ints(torch.tensor(len(data))).tolist()
        if not any(lengths):
            return [b""] * self.size
        padded = self.gather_ints(torch.frombuffer(bytearray(data.ljust(max(lengths), b"\0")), dtype=torch.uint8))
        return [row.numpy().tobytes()[:n] for row, n in zip(padded, lengths, strict=True)]

    def min_int(self, value: int) -> int:
        """The smallest of the ranks' values."""
        return int(self.gather_ints(torch.tensor(value)).min())

    def barrier(self, timeout: float) -> None:
        """Waits for every rank, `timeout` seconds: a slow phase (loading weights) may take longer than a step."""
        if self.size > 1:
            with self.process.translate_collective_errors():
                dist.monitored_barrier(group=self.control, timeout=datetime.timedelta(seconds=timeout))

    def heartbeat(self) -> None:
        """Waits for every rank, two thirds of the timeout. Called every third of it, which is all that is left then, it
        finds a lost rank within the timeout."""
        if self.size > 1:
            with self.process.translate_collective_errors():
                work = dist.all_reduce(torch.zeros(1), group=self.control, async_op=True)
                if work is not None:  # None: this rank is not of the group
                    work.wait(datetime.timedelta(seconds=self.timeout * 2 / 3))

    def run_on_all_ranks(self, work: Callable[[], T], limit: float = LOADING_LIMIT) -> T:
        """Runs `work`, which holds no collectives, on every rank; a UserError on one of them is raised on all.

        The text is rank 0's, or the lowest rank's that has one, with its number; it is the same on all ranks, so that
        rank 0 can print it for all. A rank that is done waits `limit` seconds for the others.
        """
        if self.size == 1:
            return work()
        error = b""
        try:
            result = work()
        except UserError as e:
            error = str(e).encode("utf-8", "replace")[:ERROR_BYTES]
        self.barrier(limit)
        padded = self.gather_ints(torch.tensor(list(error.ljust(ERROR_BYTES, b"\0")), dtype=torch.uint8))
        texts = [bytes(row).rstrip(b"\0").decode("utf-8", "ignore") for row in padded.tolist()]
        failed = [rank for rank, text in enumerate(texts) if text]
        if failed:
            raise UserError(texts[0] or f"rank {failed[0]}: {texts[failed[0]]}")
        return result

    def shutdown(self) -> None:
        """Leaves the other ranks when all have got here, or after 10 s. torchrun sends SIGTERM to all as soon as one
        has ended with another status than 0; from here on this rank prints nothing about that."""
        acquired = self.process.exit_lock.acquire(blocking=False)
        try:
            with contextlib.suppress(RankFailure):
                self.barrier(10)
            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException:  # an interrupt, for example, which is printed
            if acquired:
                self.process.exit_lock.release()
            raise


SOLO = Group()


def mlp_shard(tp: Group, dp: Group) -> Group:
    """This rank's place among the ranks of all lanes that share the MLPs and experts, for `rank` and `size` alone: it
    has no collectives. The ranks of one `dp` group hold neighbouring shards, so that dp.scatter_sum and then
    tp.all_reduce add all shards as one tree (tree_sum)."""
    return Group(tp.rank * dp.size + dp.rank, tp.size * dp.size)


def tree_sum(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors of one shape, in float32, as a binary tree over their order: ((0 + 1) + (2 + 3)) + …

    With parts in runs of a power of two, sums of the runs and then their sum are the same bits: it does not matter how
    many of them a rank adds before the ranks' sums are added. Of n parts at most 1 + log2(n) sums exist at a time."""
    runs: list[tuple[int, torch.Tensor]] = []  # sums of the latest parts, of how many: ever fewer, powers of two
    for part in parts:
        n, total = 1, part.float()
        while runs and runs[-1][0] == n:
            n, total = 2 * n, runs.pop()[1] + total
        runs.append((n, total))
    _, total = runs.pop()
    while runs:
        total = runs.pop()[1] + total
    return total


class OneShot:
    """Sums over the GPUs of one host through each other's memory (torch's symmetric memory). Small tensors take one
    kernel and no rounds: each rank reads all parts from its peers at once. Larger ones are summed by NVLink's switches,
    where they multicast."""

    def __init__(self, group: Group, device: torch.device):
        """Raises RuntimeError, AttributeError or ImportError where torch or this GPU cannot do that. Asks no other
        rank: `meet` does."""
        from torch.distributed import _symmetric_memory as symmetric

        ops = torch.ops.symm_mem
        self._sum, self._multicast = ops.one_shot_all_reduce_copy_out, ops.multimem_all_reduce_
        self._rendezvous, self.name = symmetric.rendezvous, group.pg.group_name
        self.buffer = symmetric.empty(MULTICAST_BYTES, dtype=torch.uint8, device=device)
        self.most = ONE_SHOT_BYTES

    def meet(self) -> bool:
        """Exchanges the buffers' addresses with the other ranks, which all call it; returns whether they multicast."""
        return bool(getattr(self._rendezvous(self.buffer, group=self.name), "multicast_ptr", 0))

    @classmethod
    def create(cls, group: Group, device: torch.device) -> "OneShot | None":
        """One that has summed samples correctly on every rank, or None on every rank. Every rank calls it.

        The ranks agree before each step that needs all of them: where one had given up, the others would wait for it.
        """

        def attempt(work: Callable[[], T]) -> T | None:
            try:
                result = work()
            except (RuntimeError, AttributeError, ImportError, TypeError, ValueError):
                result = None
            return result if group.min_int(int(result is not None)) else None

        one_shot = attempt(lambda: cls(group, device))
        multicasts = None if one_shot is None else attempt(one_shot.meet)
        if one_shot is None or multicasts is None or not attempt(lambda: one_shot.check(group, 8) or None):
            return None
        if group.min_int(int(multicasts)):
            one_shot.most = MULTICAST_BYTES
            if not attempt(lambda: one_shot.check(group, ONE_SHOT_BYTES) or None):
                one_shot.most = ONE_SHOT_BYTES
        return one_shot

    def check(self, group: Group, n: int) -> bool:
        """Whether n numbers are summed correctly."""
        sample = torch.arange(n, device=self.buffer.device) % 8  # whole numbers small enough to be exact, as sums too
        expected = sample * group.size + group.size // 2
        return torch.equal(self((sample + group.rank % 2).bfloat16()), expected.bfloat16())

    def accepts(self, x: torch.Tensor) -> bool:
        """Whether x is small enough, and of whole 16-byte pieces."""
        return x.nbytes <= self.most and x.nbytes % 16 == 0 and x.is_contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x summed over the ranks; x itself may be overwritten."""
        part = self.buffer[: x.nbytes].view(x.dtype).view(x.shape)
        if x.nbytes <= ONE_SHOT_BYTES:
            return self._sum(part, x, "sum", self.name, torch.empty_like(x))
        return x.copy_(self._multicast(part.copy_(x), "sum", self.name))

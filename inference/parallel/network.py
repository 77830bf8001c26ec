"""All links and collectives between ranks, tried one after another without waiting for ever: for check_network.py.

Ranks take part in rounds. In one, links or groups that share no host are tried, each over connections of its own, so
that one that fails leaves the others as they were. What came of it goes to rank 0 through the store where the ranks
met, and nobody waits longer than a round may take.
"""

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, zip_longest
from typing import Any

import torch
import torch.distributed as dist

from core.devices import CPU
from parallel import network_facts, startup
from parallel.failure import RankProcess, first_sentence
from parallel.launcher import Launch
from parallel.network_probe import COLLECTIVES, Probe, Test

JOINING = 3  # times the limit of a test that ranks wait for each other at the start
CONTROL_COLLECTIVES = ("all_reduce", "broadcast")
SLACK = 5.0  # seconds that a rank may take to do nothing


class LostContact(Exception):
    """This rank cannot reach rank 0, or no longer."""


# --------------------------------------------------------------------------------------------------------------------
# What is tried, in which order
# --------------------------------------------------------------------------------------------------------------------


def link_rounds(hosts: Sequence[Sequence[int]]) -> Iterator[list[Test]]:
    """Each pair of ranks of one host, then for each pair of hosts the ranks with the same place on both. A host has one
    pair at a time."""
    for pairs in zip_longest(*(combinations(ranks, 2) for ranks in hosts)):
        yield [("node link", pair) for pair in pairs if pair is not None]
    for matches in tournament(len(hosts)):
        rails = [list(zip(hosts[a], hosts[b], strict=False)) for a, b in matches]
        for pairs in zip_longest(*rails):
            yield [("link", pair) for pair in pairs if pair is not None]


def tournament(n: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds in which each of n meets each other once (the circle method)."""
    players = [*range(n), *([-1] * (n % 2))]
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if min(a, b) >= 0]
        players.insert(1, players.pop())


def group_rounds(hosts: Sequence[Sequence[int]]) -> Iterator[list[Test]]:
    """Each collective within all hosts at once, along each rail (ranks with the same place on their hosts), and over
    all ranks."""
    world = tuple(sorted(rank for ranks in hosts for rank in ranks))
    rails = [tuple(ranks[i] for ranks in hosts if i < len(ranks)) for i in range(max(map(len, hosts)))]
    groups: list[tuple[str, list[tuple[int, ...]]]] = [("node", [tuple(ranks) for ranks in hosts])]
    groups += [("rail", [rail]) for rail in rails]
    for kind, members in groups:
        tests = [ranks for ranks in members if 1 < len(ranks) < len(world)]
        yield from ([(f"{kind} {name}", ranks) for ranks in tests] for name in COLLECTIVES if tests)
    yield from ([(f"world {name}", world)] for name in COLLECTIVES if len(world) > 1)


# --------------------------------------------------------------------------------------------------------------------
# All tests, on all ranks
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Rendezvous:
    """The store where the ranks met: each sends its results to rank 0 through it, which broadcasts what comes next."""

    launch: Launch
    store: Any
    limit: float
    process: RankProcess = field(default_factory=RankProcess)

    def send(self, stage: str, value: object) -> None:
        with self.deadline(SLACK, stage):
            self.store.set(f"{stage}/{self.launch.rank}", json.dumps(value))

    def gather(self, stage: str, seconds: float) -> dict[int, Any]:
        """On rank 0: what each rank sent, by rank, of those that did so in time."""
        until, found = time.monotonic() + seconds, {}
        for rank in range(self.launch.size):
            key = f"{stage}/{rank}"
            while not self.has(key, min(until - time.monotonic(), 1.0)) and time.monotonic() < until:
                if rank in dict(self.process.dead_ranks()):
                    break
            if self.has(key, 0):
                found[rank] = json.loads(self.store.get(key))
        return found

    def has(self, key: str, seconds: float) -> bool:
        """Waits for a key."""
        with contextlib.suppress(RuntimeError):
            self.store.wait([key], datetime.timedelta(seconds=max(seconds, 0.01)))
            return True
        return False

    def broadcast(self, stage: str, value: object) -> None:
        self.store.set(f"{stage}/next", json.dumps(value))

    def receive(self, stage: str, seconds: float) -> Any:
        """On the other ranks: what rank 0 broadcasts. Raises LostContact."""
        try:
            with self.deadline(seconds, stage):
                self.store.wait([f"{stage}/next"], datetime.timedelta(seconds=seconds))
                return json.loads(self.store.get(f"{stage}/next"))
        except RuntimeError:
            raise LostContact(self.describe_loss(stage)) from None

    def describe_loss(self, stage: str) -> str:
        where = f"{self.launch.address}:{self.launch.port}"
        return f"rank {self.launch.rank} on {os.uname().nodename} lost contact with rank 0 (at {where}) during {stage}"

    @contextlib.contextmanager
    def deadline(self, seconds: float, stage: str) -> Iterator[None]:
        """Ends this process where the store, whose host may be gone, does not answer a call."""

        def give_up() -> None:
            print(f"error: {self.describe_loss(stage)}", file=sys.stderr, flush=True)
            os._exit(1)

        timer = threading.Timer(seconds + SLACK, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@dataclass
class Findings:
    """What rank 0 knows at the end; on other ranks it is not used."""

    facts: list[dict[str, Any]] = field(default_factory=list)
    results: list[tuple[Test, dict[int, dict[str, Any]]]] = field(default_factory=list)  # with each rank's, by rank
    skipped: list[Test] = field(default_factory=list)  # groups with a dead link
    lost: dict[int, str] = field(default_factory=dict)  # during which stage


def join(launch: Launch, limit: float) -> Rendezvous:
    """Connects to the store. Raises LostContact where it cannot be reached, UserError without a usable address."""
    wait = datetime.timedelta(seconds=JOINING * limit)
    startup.keep_to_loopback(launch)
    try:
        store = startup.open_store(launch, wait)
    except RuntimeError as e:
        here, there = f"rank {launch.rank} on {os.uname().nodename}", f"MASTER_ADDR {launch.address}:{launch.port}"
        raise LostContact(f"{here} cannot reach rank 0 at {there} in {wait.seconds} s: {first_sentence(e)}") from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives torchrun's restarts
    store = dist.PrefixStore(f"network {attempt}", store)  # type: ignore[attr-defined]
    return Rendezvous(launch, store, limit)


def run_tests(
    rendezvous: Rendezvous,
    facts: dict[str, Any],
    device: torch.device,
    sizes: Sequence[int],
    find_slow: Callable[[Findings], list[Test]],
) -> Findings:
    """Tries everything; on rank 0 returns all that was found, on the others nothing of use. `find_slow` names links
    that are to be tried again. Every rank calls it. Raises LostContact on ranks that no longer reach rank 0."""
    launch, limit, found = rendezvous.launch, rendezvous.limit, Findings()
    rendezvous.send("start", facts)
    if launch.rank == 0:
        told = rendezvous.gather("start", JOINING * limit)
        found.lost = {rank: "the start" for rank in range(launch.size) if rank not in told}
        found.facts = [told[rank] for rank in sorted(told)]
        processes = [[fact["rank"], fact["pid"]] for fact in found.facts]
        rendezvous.broadcast("start", [network_facts.group_by_host(found.facts), processes, bool(found.lost)])
    hosts, processes, stop = rendezvous.receive("start", JOINING * limit + 2 * SLACK)
    here: list[int] = next((ranks for ranks in hosts if launch.rank in ranks), [])
    neighbours = tuple((rank, pid) for rank, pid in processes if rank in here)
    rendezvous.process = RankProcess(launch.rank, launch.size, neighbours, rendezvous.store)
    rendezvous.process.install_sigterm_handler()
    probe = Probe(launch.rank, rendezvous.store, device, sizes, limit)
    stop = stop or not run_rounds(rendezvous, found, "links", link_rounds(hosts), probe)
    if stop:
        return found
    again, groups = [], []
    if launch.rank == 0:
        dead = [set(ranks) for (_, ranks), results in found.results if any("error" in r for r in results.values())]
        for tests in group_rounds(hosts):
            alive = [test for test in tests if not any(pair <= set(test[1]) for pair in dead)]
            found.skipped += [test for test in tests if test not in alive]
            groups += [alive] if alive else []
        again = [[test] for test in find_slow(found)]
        rendezvous.broadcast("plan", [again, groups])
    again, groups = ([as_tests(tests) for tests in rounds] for rounds in rendezvous.receive("plan", SLACK))
    stop = not run_rounds(rendezvous, found, "links again", again, probe)
    stop = stop or not run_rounds(rendezvous, found, "collectives", groups, probe)
    if not stop and device.type != "cpu":  # the engine's ranks agree over gloo whatever their device
        on_host = replace(probe, device=CPU, sizes=sizes[:1], open=[])
        world = tuple(range(launch.size))
        control: list[list[Test]] = [[(f"gloo {name}", world)] for name in CONTROL_COLLECTIVES]
        run_rounds(rendezvous, found, "gloo", control, on_host)
    return found


def run_rounds(rendezvous: Rendezvous, found: Findings, stage: str, rounds: Iterable[list[Test]], probe: Probe) -> bool:
    """Runs the tests of each round at the same time and adds to rank 0's findings; False once a rank is lost, on all
    ranks alike. Raises LostContact."""
    launch, limit = rendezvous.launch, rendezvous.limit
    for n, tests in enumerate(rounds):
        name, started = f"{stage} {n}", time.monotonic()
        mine = [i for i, (_, ranks) in enumerate(tests) if launch.rank in ranks]
        rendezvous.send(name, {i: probe.run(f"{name} {i}", tests[i]) for i in mine})
        if launch.rank == 0:
            told = rendezvous.gather(name, max(started + 3 * limit - time.monotonic(), 0) + SLACK)
            lost = [rank for rank in range(launch.size) if rank not in told]
            found.lost.update(dict.fromkeys(lost, describe_tests(tests)))
            for i, test in enumerate(tests):
                found.results.append((test, {rank: told[rank][str(i)] for rank in test[1] if rank in told}))
            rendezvous.broadcast(name, bool(lost))
        over = rendezvous.receive(name, 3 * limit + 2 * SLACK)
        probe.close()
        if over:
            return False
    return True


def finish(rendezvous: Rendezvous, status: int) -> int:
    """Ends every rank with rank 0's exit status, and returns it. From here on a rank prints nothing when torchrun ends
    it because another one has left. Raises LostContact."""
    rendezvous.process.exit_lock.acquire(blocking=False)
    if rendezvous.launch.rank == 0:
        rendezvous.broadcast("end", status)
    status = rendezvous.receive("end", rendezvous.limit + SLACK)
    rendezvous.send("end", status)
    if rendezvous.launch.rank == 0:
        rendezvous.gather("end", SLACK)  # the others receive it as long as the store is there
    return status


def as_tests(tests: list[list[Any]]) -> list[Test]:
    """From JSON, which has no tuples."""
    return [(kind, tuple(ranks)) for kind, ranks in tests]


def describe_tests(tests: Sequence[Test]) -> str:
    kind, ranks = tests[0]
    more = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
    return f"{kind} of ranks {network_facts.spans(ranks)}{more}"

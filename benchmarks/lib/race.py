"""The race between contestants on one GPU, and the tables that come of it.

A contestant is checked against float64 before it is timed, and what is wrong is not timed. One that raises is refused,
with its reason, and the others go on. Contestants take turns. The limit is the larger of two times: the bytes (each
once) at the speed of a copy measured in the same run, and the operations at the tensor cores' peak.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lib.peers import Peer
from lib.timing import Clock, DeviceLost, Refused, Run, lost, reason, relative_error

ROUNDS = 15  # at most, of each contestant
SECONDS = 1.0  # after which no further round of a contestant begins
CALLS = 24  # in one graph, at least, of a short kernel


class Contestant(NamedTuple):
    """One way to compute a case."""

    name: str
    build: "Callable[[], Run] | dict[str, Any]"  # makes the call, or raises; a request: another process makes it
    meant: torch.Tensor  # float64, what set 0 gives
    nbytes: float  # that a call must move
    flops: float
    peak: str = "bf16"  # the type its tensor cores multiply
    tolerance: float = 5e-3  # of the norm of the error over the norm of the result
    gpu: bool = False  # it needs one
    pick: Callable[[Any], torch.Tensor] = lambda y: y  # the part of a result that is compared, as meant is


@dataclass
class Case:
    """One shape: `keys` name it in the table, the first contestant is ours."""

    keys: dict[str, Any]
    sets: int
    contestants: list[Contestant]
    calls: int = CALLS


class _Local:
    def __init__(self, contestant: Contestant, case: Case, clock: Clock):
        assert callable(contestant.build)
        self.case, self.clock = case, clock
        self.run = contestant.build()
        self.error = relative_error(contestant.pick(self.run(0)), contestant.meant)

    def ready(self) -> bool:
        self.seconds, graphed = self.clock.prepare(self.run, self.case.sets, max(self.case.calls, self.case.sets))
        return graphed


class _Remote:
    def __init__(self, contestant: Contestant, case: Case, clock: Clock, peer: Peer):
        assert isinstance(contestant.build, dict)
        self.peer = peer
        self.calls = max(case.calls, case.sets)
        self.error = float(peer.ask(do="build", sets=case.sets, **contestant.build)["error"])

    def ready(self) -> bool:
        return bool(self.peer.ask(do="ready", calls=self.calls)["graph"])

    def seconds(self) -> float:
        return float(self.peer.ask(do="time")["seconds"])


def race(case: Case, clock: Clock, peer: Peer | None = None, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row per contestant: its error against float64, then how fast it is, or why it did not run.

    A peer that is not installed has no row; nor, with `only`, has anybody who is not named there. Raises DeviceLost.
    """

    def refuse(row: dict[str, Any], error: Exception) -> None:
        row["refused"] = reason(error)
        if lost(clock.device):
            raise DeviceLost(f"{row['contestant']}: {row['refused']}", rows)

    rows: list[dict[str, Any]] = []
    running: list[tuple[dict[str, Any], Contestant, _Local | _Remote]] = []
    for contestant in case.contestants:
        remote = isinstance(contestant.build, dict)
        if (remote and peer is None) or (only and contestant.name not in only):
            continue
        row: dict[str, Any] = {**case.keys, "contestant": contestant.name}
        rows.append(row)
        try:
            if contestant.gpu and clock.device.type == "cpu":
                raise Refused("needs a GPU")
            side = _Remote(contestant, case, clock, peer) if remote and peer else _Local(contestant, case, clock)
            row["error"], row["wrong"] = side.error, not side.error < contestant.tolerance
            if not row["wrong"]:
                row["graph"] = side.ready()
                running.append((row, contestant, side))
        except Exception as e:  # whatever it is, the others go on
            refuse(row, e)
    times: dict[str, list[float]] = {contestant.name: [] for _, contestant, _ in running}
    for turn in range(ROUNDS + 1):
        for row, contestant, side in running:
            taken = times[contestant.name]
            if "refused" in row or (len(taken) >= 3 and sum(taken) * max(case.calls, case.sets) > SECONDS):
                continue
            try:
                took = side.seconds()
            except Exception as e:
                refuse(row, e)
                continue
            if turn > 0:  # the first replay also brings the graph to the device
                taken.append(took)
            if not clock.timing and turn > 0:
                row["no_timing"] = True
    for row, contestant, _ in running:
        if "refused" not in row:
            row |= figures(times[contestant.name], contestant, clock)
    return rows


def figures(times: list[float], contestant: Contestant, clock: Clock) -> dict[str, float]:
    took = statistics.median(times)
    limit = max(contestant.nbytes / clock.copy, contestant.flops / clock.peaks[contestant.peak])
    return {
        "us": took * 1e6,
        "best_us": min(times) * 1e6,
        "rounds": len(times),
        "tflops": contestant.flops / took / 1e12,
        "gb_per_s": contestant.nbytes / took / 1e9,
        "limit_us": limit * 1e6,
        "of_limit": limit / took,
    }


def header(keys: Iterable[str], names: Sequence[str]) -> list[str]:
    """A table's columns: the shape; ours in full; of each other the time, and how many times as long as ours it is."""
    others = [column for name in names[1:] for column in (f"{name} µs", "× ours")]
    return [*keys, f"{names[0]} µs", "TFLOPS", "GB/s", "% of limit", *others]


def shown(rows: list[dict[str, Any]], keys: Iterable[str], names: Sequence[str]) -> list[str]:
    """One case's line under `header`."""
    by_name = {row["contestant"]: row for row in rows}
    ours = by_name.get(names[0], {})
    line = [str(rows[0][key]) for key in keys]
    line += [_time(ours), *(_figure(ours, name) for name in ("tflops", "gb_per_s", "of_limit"))]
    for name in names[1:]:
        row = by_name.get(name, {})
        ratio = f"{row['us'] / ours['us']:.2f}" if "us" in row and "us" in ours else "–"
        line += [_time(row), "(none)" if row.get("no_timing") else ratio]
    return line


def _time(row: dict[str, Any]) -> str:
    if "us" in row:
        if row.get("no_timing"):
            return "(none)"
        return f"{row['us']:.1f}" if row.get("graph", True) else f"{row['us']:.1f} eager"
    return "refused" if "refused" in row else "WRONG" if row else "–"


def _figure(row: dict[str, Any], name: str) -> str:
    if "us" not in row:
        return "–"
    return "(none)" if row.get("no_timing") else f"{row[name] * (100 if name == 'of_limit' else 1):.0f}"

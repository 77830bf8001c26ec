"""What the GPU benchmarks share: clocks, the race between contestants, peers in processes of their own, random weights.

A contestant is checked against float64 before it is timed, and what is wrong is not timed. One that raises is refused,
with its reason, and the others go on. A time is the median over replays of a CUDA graph, the contestants taking turns;
in a graph each call meets another set of inputs, so that the L2 cache is cold. The limit is the larger of two times:
the bytes (each once) at the speed of a copy measured in the same run, and the operations at the tensor cores' peak.
"""

import json
import math
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

HERE = Path(__file__).parent
PEERS = HERE.parent / ".peers"
V3 = PEERS / "DeepSeek-V3" / "inference"
NO_TIMING = "NO TIMING: a smoke run on the CPU; every figure in it is made up"
ROUNDS = 15  # at most, of each contestant
SECONDS = 1.0  # after which no further round of a contestant begins
CALLS = 24  # in one graph, at least, of a short kernel
Run = Callable[[int], Any]  # one call on set i of the inputs


class Refused(Exception):
    """A contestant cannot run here; the text says why."""


class DeviceLost(Exception):
    """A contestant left the GPU in a state in which nothing runs any more; `rows` are those of its race."""

    def __init__(self, text: str, rows: list[dict[str, Any]]):
        super().__init__(text)
        self.rows = rows


class Clock(Protocol):
    """Where and how things are timed."""

    device: torch.device
    name: str
    l2: int  # bytes
    copy: float  # bytes a second, read and written
    peaks: dict[str, float]  # operations a second of the tensor cores, by the type they multiply
    timing: bool  # False: the seconds mean nothing

    def prepare(self, run: Run, sets: int, calls: int) -> tuple[Callable[[], float], bool]:
        """Something that returns the seconds of one of `calls` calls, and whether it replays a CUDA graph."""
        ...


class GpuClock:
    timing = True

    def __init__(self, peak_tflops: float, device: torch.device | None = None):
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self.l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.peaks = {"fp8": peak_tflops * 1e12, "bf16": peak_tflops * 0.5e12}
        self.copy = copy_bandwidth(self.device)

    def prepare(self, run: Run, sets: int, calls: int) -> tuple[Callable[[], float], bool]:
        def eagerly() -> None:
            for i in range(calls):
                run(i % sets)

        if asks_the_device(lambda: run(0)):
            return lambda: between_events(eagerly) / calls, False
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eagerly()

        def seconds() -> float:
            graph.replay()  # so that the one that counts is on the device before its turn comes
            return between_events(graph.replay) / calls

        return seconds, True


class NoClock:
    """For smoke runs: every call is made once, and every time is one second."""

    timing = False

    def __init__(self) -> None:
        self.device, self.name, self.l2, self.copy = torch.device("cpu"), "no GPU", 0, 1e9
        self.peaks = {"fp8": 2e9, "bf16": 1e9}

    def prepare(self, run: Run, sets: int, calls: int) -> tuple[Callable[[], float], bool]:
        for i in range(sets):
            run(i)
        return lambda: 1.0, False


def clock_for(smoke: bool, peak_tflops: float) -> Clock | None:
    """The clock of this run; None, and a line on stderr, where a real one needs the GPU that is not there."""
    if smoke:
        return NoClock()
    if not torch.cuda.is_available():
        print("error: this benchmark needs a GPU, and torch sees none (--smoke runs without)", file=sys.stderr)
        return None
    return GpuClock(peak_tflops)


def asks_the_device(run: Callable[[], Any]) -> bool:
    """Whether a call waits for a result on the host, and so cannot be in a CUDA graph. Found out beforehand: a capture
    that fails leaves torch's own random numbers unusable."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as e:
        if "synchroniz" not in str(e):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def between_events(run: Callable[[], Any]) -> float:
    """Seconds on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        target.copy_(source)
    found = 2 * source.nbytes / statistics.median(between_events(graph.replay) for _ in range(10))
    del source, target, graph
    torch.cuda.empty_cache()  # a peer needs room too
    return found


def cold_sets(nbytes: float, clock: Clock, at_most: int = 512) -> int:
    """How many sets of inputs of that size make four L2 caches; two without one, so that a smoke run changes sets."""
    return min(at_most, math.ceil(4 * clock.l2 / max(nbytes, 1))) if clock.l2 else 2


# --------------------------------------------------------------------------------------------------------------------
# Contestants
# --------------------------------------------------------------------------------------------------------------------


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


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the error over the norm of the result; NaN when anything is NaN."""
    return ((y.double() - exact).norm() / exact.norm()).item()


def reason(error: BaseException) -> str:
    """An error's first line that says something, cut to a table's width."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


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
    def __init__(self, contestant: Contestant, case: Case, clock: Clock, peer: "Peer"):
        assert isinstance(contestant.build, dict)
        self.peer = peer
        self.calls = max(case.calls, case.sets)
        self.error = float(peer.ask(do="build", sets=case.sets, **contestant.build)["error"])

    def ready(self) -> bool:
        return bool(self.peer.ask(do="ready", calls=self.calls)["graph"])

    def seconds(self) -> float:
        return float(self.peer.ask(do="time")["seconds"])


def lost(device: torch.device) -> bool:
    """Whether a kernel's failure has taken the device's context with it: then each later call fails too."""
    if device.type == "cpu":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def race(case: Case, clock: Clock, peer: "Peer | None" = None, only: Sequence[str] = ()) -> list[dict[str, Any]]:
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


# --------------------------------------------------------------------------------------------------------------------
# Peers
# --------------------------------------------------------------------------------------------------------------------


class Peer:
    """The V3 repository's code in a process of its own: its modules have the names of ours.

    Each request is a line of JSON, and so is each answer. A process that died is started again with the next request.
    """

    def __init__(self, root: Path, device: torch.device, limit: float = 580.0):
        self.command = [sys.executable, str(HERE / "peer_v3.py"), str(root), str(device)]
        self.limit = limit
        self.process: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises Refused with the peer's own reason, or when it takes more than `limit` seconds or dies."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise Refused("its process ended") from None
        ready, _, _ = select.select([self.process.stdout], [], [], self.limit)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.close()
            raise Refused("its process ended" if ready else f"no answer in {self.limit:.0f} s")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with suppress(BrokenPipeError):  # a request that it did not live to read
                self.process.communicate()
            self.process = None


def find_v3(path: str | None, device: torch.device) -> Peer | None:
    """The V3 repository's `inference` folder as a peer; None, and a line that says so, where it is not."""
    root = Path(path) if path else V3
    if not (root / "kernel.py").exists():
        print(f"The V3 repository is not at {root}: its column is left out (see the top of bench_kernel.py).")
        return None
    return Peer(root, device)


# --------------------------------------------------------------------------------------------------------------------
# Whole models
# --------------------------------------------------------------------------------------------------------------------

CHUNK = 1 << 26  # numbers drawn at one time


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights, drawn on the device into the parameters: activations keep their size, experts are chosen evenly.

    By name and type: norms around 1, the router's bias near 0, FP8 values of spread 1 under scales that undo it.
    """
    for name, p in model.named_parameters():
        if name.endswith("scale"):
            p.uniform_(0.9, 1.1).mul_((128 * p.shape[-1]) ** -0.5)
        elif p.dim() == 1:
            p.normal_(0, 0.2).add_(1) if "norm" in name else p.normal_(0, 1e-3)
        else:
            spread = 1.0 if p.element_size() == 1 else p.shape[-1] ** -0.5
            for part in p.data.view(-1).split(CHUNK):
                part.copy_(torch.randn(part.numel(), device=p.device).mul_(spread).to(p.dtype))


@dataclass
class Timed:
    """Wall-clock times of a model's step, the device being done before and after each; the first does not count."""

    clock: Clock
    rounds: int = 10
    times: list[float] = field(default_factory=list)

    def of(self, step: Callable[[], Any], budget: float = 3.0) -> dict[str, Any]:
        """{"ms" (the median), "best_ms", "rounds"}; no further round begins after `budget` seconds."""
        step()
        for _ in range(self.rounds):
            self._wait()
            began = time.perf_counter()
            step()
            self._wait()
            self.times.append(time.perf_counter() - began if self.clock.timing else 1.0)
            if len(self.times) >= 3 and sum(self.times) > budget:
                break
        found: dict[str, Any] = {"ms": 1e3 * statistics.median(self.times), "best_ms": 1e3 * min(self.times)}
        return found | {"rounds": len(self.times)} | ({} if self.clock.timing else {"no_timing": True})

    def _wait(self) -> None:
        if self.clock.device.type == "cuda":
            torch.cuda.synchronize(self.clock.device)

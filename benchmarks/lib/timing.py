"""What the benchmarks share of timing: clocks, taking turns, percentiles.

Clocks are the GPU's. A time is the median over replays of a CUDA graph; in a graph each call meets another set of
inputs, so that the L2 cache is cold. A CPU's times are by wall clock, the sides taking turns.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

NO_TIMING = "NO TIMING: a smoke run on the CPU; every figure in it is made up"
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


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the error over the norm of the result; NaN when anything is NaN."""
    return ((y.double() - exact).norm() / exact.norm()).item()


def reason(error: BaseException) -> str:
    """An error's first line that says something, cut to a table's width."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


def lost(device: torch.device) -> bool:
    """Whether a kernel's failure has taken the device's context with it: then each later call fails too."""
    if device.type == "cpu":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


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


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """run, returning how many seconds it took."""

    def clocked() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return clocked


def take_turns(
    sides: dict[str, Callable[[], float]], turns: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """What each side returns (seconds), turn by turn, the order reversed every other turn; and for every side but the
    first, theirs over the first's of the same turn."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(turns):
        for side in sides if turn % 2 == 0 else reversed(sides):
            seconds[side].append(sides[side]())
    ours, *others = sides
    ratios = {side: [b / a for a, b in zip(seconds[ours], seconds[side], strict=True)] for side in others}
    return seconds, ratios


def percentile(values: list[float], p: int) -> float:
    """By nearest rank; 0 of no values."""
    return sorted(values)[max(0, math.ceil(len(values) * p / 100) - 1)] if values else 0.0

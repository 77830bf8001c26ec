"""The engine on several forms of one model's weights, beside llama.cpp and ik_llama.cpp at equal bits.

The forms of as many bits, and what the peers have of them, run together: every turn each side takes each case once, in
an order that turns round. A case is a prefill and the decoding after it. The memory's read speed is measured before
each, and with what the engine counts that a step reads gives the limit of decoding.
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.child import Child
from lib.llama_side import FLAGS, Case, Llama
from lib.machine import memory_read

BITS = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4}
THEIRS = {  # at equal bits: FP8's head is bf16 here, and of INT8 and INT4 all but the routed experts
    16: ["bf16"], 8: ["Q8_0", "Q8_0-bf16-head", "Q8_0-experts"], 4: ["Q4_0", "Q4_0-experts"],
}  # fmt: skip
ENGINE = Path(__file__).parent / "engine_side.py"
ENVIRONMENT = ("CC", "GLIBC_TUNABLES", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


CASES = [Case(1, 512, 32), Case(8, 64, 16), Case(1, 4096, 16)]


class Engine:
    """One form of ours."""

    def __init__(self, path: Path):
        self.child = Child([sys.executable, str(ENGINE), str(path)])
        self.loaded: dict[str, Any] = {}

    def start(self, room: int, threads: int) -> None:
        began = time.perf_counter()
        self.loaded = self.child.ask(do="load", room=room, threads=threads)
        self.loaded["start_s"] = time.perf_counter() - began

    def run(self, case: Case) -> dict[str, float]:
        return self.child.ask(do="run", **case._asdict())

    @property
    def about(self) -> dict[str, Any]:
        return self.loaded | self.child.ask(do="memory")

    def reads(self, case: Case) -> int:
        """Bytes of an average step."""
        read = self.child.ask(do="reads", sequences=case.sequences, context=case.prompt + case.new // 2)
        return int(read["weights"] + read["latents"])


@dataclass
class Taken:
    """Seconds of each side, turn by turn, for one case."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by what, then by side

    def add(self, side: str, took: dict[str, float]) -> None:
        for what in ("prefill", "decode"):
            self.seconds.setdefault(what, {}).setdefault(side, []).append(took[what])


def rows(case: Case, taken: Taken, ours: dict[str, int], read_gb_s: float) -> list[dict[str, Any]]:
    """Tokens per second, best and median, and for each of `ours` (by name, the bytes that a step reads) the ratio to
    each peer, with decoding's limit and the share of it reached by the best turn."""
    found = []
    for what, name in case.names.items():
        seconds = taken.seconds[what]
        tokens = case.sequences * (case.prompt if what == "prefill" else case.new)
        ratios = {side: {peer: [b / a for a, b in zip(seconds[side], theirs, strict=True)]
                         for peer, theirs in seconds.items() if peer not in ours} for side in ours}  # fmt: skip
        row: dict[str, Any] = {
            "name": name, "tokens": tokens, "turns": len(next(iter(seconds.values()))),
            "tok_s": {side: {"best": tokens / min(s), "median": tokens / statistics.median(s)}
                      for side, s in seconds.items()},
            "ratio": {side: {peer: statistics.median(r) for peer, r in by.items()} for side, by in ratios.items()},
            "ratios": ratios,
        }  # fmt: skip
        if what == "decode":
            row["limit"] = {}
            for side, nbytes in ours.items():
                limit = case.sequences * read_gb_s * 1e9 / nbytes
                share = row["tok_s"][side]["best"] / limit
                row["limit"][side] = {"step_bytes": nbytes, "tok_s": limit, "share": share}
        found.append(row)
    return found


def find_peers(folder: Path, bits: int, threads: int) -> dict[str, Llama]:
    """Those of FLAGS and THEIRS that `folder` has: NAME/llama-batched-bench with NAME-FORM.gguf. Says which are left
    out."""
    found = {}
    for name, form in itertools.product(FLAGS, THEIRS[bits]):
        binary, gguf = folder / name / "llama-batched-bench", folder / f"{name}-{form}.gguf"
        missing = [str(path) for path in (binary, gguf) if not path.exists()]
        if missing:
            print(f"{name} {form} is left out: there is no {' and no '.join(missing)}", flush=True)
        else:
            found[f"{name} {form}"] = Llama(name, binary, gguf, threads)
    return found


def measure(
    forms: dict[str, Path],
    peers: Path | None,
    turns: int,
    threads: int,
    cases: list[Case] = CASES,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """`forms` by name, each a checkpoint; `save` is given what there is after each turn. Raises lib.timing.Refused when
    the engine cannot run one."""
    results: dict[str, Any] = {
        "threads": threads,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "groups": [],
    }
    for bits in sorted({BITS[form] for form in forms}, reverse=True):
        ours = {form: Engine(path) for form, path in forms.items() if BITS[form] == bits}
        theirs = find_peers(peers, bits, threads) if peers else {}
        try:
            for engine in ours.values():
                engine.start(max(case.room for case in cases), threads)
                engine.run(Case(1, 64, 2))  # the first forward is slower
            groups = results["groups"]
            for group in turn_by_turn(ours, theirs, turns, cases):
                results["groups"] = [*groups, {"bits": bits, **group}]
                save(results)
        finally:
            for engine in ours.values():
                engine.child.close()
    return results


def turn_by_turn(
    ours: dict[str, Engine], theirs: dict[str, Llama], turns: int, cases: list[Case]
) -> Iterator[dict[str, Any]]:
    """What is known of a group of sides after each turn."""
    sides: dict[str, Engine | Llama] = {**ours, **theirs}
    taken = {case: Taken() for case in cases}
    reads: list[float] = []
    for turn in range(turns):
        for case in cases:
            reads.append(memory_read())
            for name in sides if turn % 2 == 0 else reversed(sides):
                took = sides[name].run(case)
                taken[case].add(name, took)
                counts = {"prefill": case.sequences * case.prompt, "decode": case.sequences * case.new}
                speeds = (f"{case.names[what]} {n / took[what]:.1f}" for what, n in counts.items())
                print(f"turn {turn + 1}, {name:20} {', '.join(speeds)} tok/s", flush=True)
        yield {
            "read_gb_s": reads,
            "sides": {name: side.about for name, side in sides.items()},
            "rows": [row for case in cases
                     for row in rows(case, taken[case], {n: side.reads(case) for n, side in ours.items()}, max(reads))],
        }  # fmt: skip

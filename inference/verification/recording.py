"""What is recorded of a run, and one request's values as forwards bring them."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from core.errors import UserError
from verification.points import split_name
from verification.trace import RequestTrace, Step


@dataclass(frozen=True)
class Selection:
    """What is recorded. points: patterns of full names, as fnmatch has them. positions: "all", "last" (the prompt's),
    or numbers and ranges such as "0-7,12,-1", of which negative ones count from the prompt's end. mib: how many MiB the
    requests in flight may take; one that would take more is cut short, and its trace says so.

    Raises UserError for a pattern that no point's name can match, and for positions that are none of these.
    """

    points: tuple[str, ...] = ("*",)
    positions: str = "all"
    mib: float = 1024

    def __post_init__(self) -> None:
        if not self.mib > 0:
            raise UserError(f"a trace of {self.mib} MiB: expected a positive number")
        for part in self._parts():
            if not re.fullmatch(r"-?\d+(-\d+)?", part) or (part.startswith("-") and part.count("-") > 1):
                raise UserError(f"positions of a trace: {self.positions!r} is not all, last or like 0-7,12,-1")

    def _parts(self) -> list[str]:
        return [] if self.positions in ("all", "last") else self.positions.replace(" ", "").split(",")

    def names(self, known: Iterable[str]) -> frozenset[str]:
        """Those of the known names that are chosen. Raises UserError where a pattern matches none."""
        known = list(known)
        for pattern in self.points:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UserError(f"{pattern!r} is the name of no point of this model, such as layers.0.attn.c_kv")
        return frozenset(name for name in known if any(fnmatchcase(name, p) for p in self.points))

    def chooses(self, n_prompt: int) -> Callable[[int], bool]:
        """Whether a position is chosen, of a request whose prompt has n_prompt tokens."""
        if self.positions == "all":
            return lambda position: True
        if self.positions == "last":
            return lambda position: position == n_prompt - 1
        spans = []
        for part in self._parts():
            first, _, last = part[1:].partition("-") if part.startswith("-") else part.partition("-")
            lo = n_prompt - int(first) if part.startswith("-") else int(first)
            spans.append((lo, int(last) if last else lo))
        return lambda position: any(lo <= position <= hi for lo, hi in spans)


@dataclass(eq=False)
class Recording:
    """One request while it is recorded: rows of each point as forwards bring them; of a position that runs again, as a
    draft's does, the last row counts."""

    name: str
    n_prompt: int
    chosen: Callable[[int], bool]
    order: tuple[str, ...]  # of points in the trace
    parts: dict[str, list[tuple[list[int], torch.Tensor]]] = field(default_factory=dict)
    tries: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # positions before drafts, and the drafts
    truncated: str = ""
    nbytes: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, point: str, positions: list[int], rows: torch.Tensor) -> None:
        self.parts.setdefault(point, []).append((positions, rows))

    def finish(self, tokens: Sequence[int], n_cached: int | None = None) -> RequestTrace:
        """The trace of a request with these tokens, of which the first n_cached were run (None: all)."""
        end = len(tokens) if n_cached is None else n_cached
        points: dict[str, torch.Tensor] = {}
        at: dict[str, tuple[int, ...]] = {}
        for point in (name for name in self.order if name in self.parts):
            parts = self.parts[point]
            latest = {p: (i, j) for i, (positions, _) in enumerate(parts) for j, p in enumerate(positions) if p < end}
            at[point] = tuple(sorted(latest))
            if at[point]:
                points[point] = torch.stack([parts[i][1][j] for i, j in (latest[p] for p in at[point])])
        rows: dict[str, torch.Tensor] = {}
        usual = max(at.values(), key=len, default=())
        if usual != tuple(range(len(tokens))):
            rows[""] = torch.tensor(usual, dtype=torch.int64)
        unusual = {point for point in points if at[point] != usual}
        for layer in dict.fromkeys(split_name(point)[0] for point in points):  # a module's last position has none after
            alike = [point for point in points if split_name(point)[0] == layer]
            if layer and unusual.issuperset(alike) and len({at[point] for point in alike}) == 1:
                rows[layer] = torch.tensor(at[alike[0]], dtype=torch.int64)
                unusual -= set(alike)
        rows |= {point: torch.tensor(at[point], dtype=torch.int64) for point in points if point in unusual}
        steps = []
        for position, drafts in self.tries:
            kept = 0
            while kept < len(drafts) and list(tokens[position + 1 + kept : position + 2 + kept]) == [drafts[kept]]:
                kept += 1
            steps.append(Step(position, drafts, kept))
        ids = torch.tensor(list(tokens), dtype=torch.int64)
        return RequestTrace(self.name, ids, points, rows, self.n_prompt, tuple(steps), self.truncated, self.about)

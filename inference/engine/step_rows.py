"""The rows of a step where its forwards left them on the device: in a recorded forward's buffers, or in tensors."""

from collections.abc import Callable, Sequence

import torch

from core.devices import select
from engine.graphs import Replayed
from engine.row_sampler import Part
from engine.sampling import Scores


class StepRows:
    """Hidden states of a step's tokens, in order, from one forward or from several. Nothing is copied before it is
    asked for, and rows of several forwards not before they are needed together."""

    def __init__(self, parts: list[Replayed]):
        self.parts = parts

    @classmethod
    def of(cls, hidden: torch.Tensor) -> "StepRows":
        """hidden (T, H), of a forward that was not recorded."""
        return cls([Replayed(hidden, None, None, list(range(len(hidden))))])

    def hidden(self, rows: Sequence[int] | None = None) -> torch.Tensor:
        """(n, H) of the step's rows with these numbers, or of all of them."""
        found = [select(part.hidden, at) for part, at in self._by_part(rows)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def scores(self, rows: Sequence[int], head: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
        """What the step's rows with these numbers are sampled from. `head`, hidden states (n, H) to logits (n, V), runs
        for rows of forwards that did not record it."""
        parts: list[Part] = []
        for part, at in self._by_part(rows):
            if part.logits is None or part.choice is None:
                parts += Scores.of(head(select(part.hidden, at))).parts
            else:
                parts.append((part.logits, part.choice, at))
        return Scores(parts)

    def _by_part(self, rows: Sequence[int] | None) -> list[tuple[Replayed, list[int]]]:
        """Each part with some of the rows, in ascending order, and their numbers there; the first where none has."""
        if len(self.parts) == 1:
            part = self.parts[0]
            return [(part, part.rows if rows is None else [part.rows[row] for row in rows])]
        found: list[tuple[Replayed, list[int]]] = []
        first = 0
        for part in self.parts:
            stop = first + len(part.rows)
            wanted = range(first, stop) if rows is None else rows
            mine = [part.rows[row - first] for row in wanted if first <= row < stop]
            if mine:
                found.append((part, mine))
            first = stop
        return found or [(self.parts[0], [])]

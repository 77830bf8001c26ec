"""Samples rows of logits by a backend. Parameters and random numbers of the rows are kept from step to step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.noise import ACCEPT, Noise
from engine.sampling_state import SamplingState
from ops.backend import ReferenceBackend
from ops.distributions import Field, SamplingMetadata, fields_of

# Logits (n, V), what `greedy` said of them (2, n), and the numbers of the rows that count.
Part = tuple[torch.Tensor, torch.Tensor, Sequence[int]]


class SampledRows:
    """Rows that are sampled together: `counts[i]` of state i, the first of them after `first[i]` drafts."""

    def __init__(self, states: Sequence[SamplingState], counts: list[int], first: list[int]):
        self.states, self.counts, self.first = list(states), counts, first
        pairs = zip(states, first, counts, strict=True)
        self.rows = [(state, i) for state, at, n in pairs for i in range(at, at + n)]
        self.params = [state.params for state, _ in self.rows]
        self.sampled = any(params.temperature for params in self.params)
        self.changes_logits = any(state.changes_logits for state in states)
        self._state = np.repeat(np.arange(len(states)), counts)  # of each row
        self._after = np.array([i for _, i in self.rows], dtype=np.int64)
        self._begin = np.array(first, dtype=np.int64)
        self._table: np.ndarray | None = None
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by use: positions, and numbers from there on

    def table(self, vocab: int) -> np.ndarray:
        """(9, rows), by Field; the same at each step."""
        if self._table is None:
            self._table = np.zeros((len(Field), len(self.rows)))
            self._table[Field.TEMPERATURE : Field.UNIFORM] = np.array([fields_of(p, vocab) for p in self.params]).T
            self._table[Field.DRAFT] = -1
        return self._table

    def uniforms(self, noise: Noise, use: int) -> np.ndarray:
        """For each row its random number in [0, 1), that of the token it is sampled for."""
        lengths = np.array([len(state.tokens) for state in self.states])
        if use in self._known:
            first, known = self._known[use]
            at = (lengths - first)[self._state] + self._after
            if at.min() >= 0 and at.max() < noise.AHEAD:
                return known[self._state, at]
        begin = (lengths + self._begin).tolist()
        wanted = [(s.params.seed, s.rng_key, position) for s, position in zip(self.states, begin, strict=True)]
        first, known = self._known[use] = noise.ahead(wanted, self.counts, use)
        return known[self._state, (lengths - first)[self._state] + self._after]


class RowSampler:
    """Samples rows of logits by a backend's op `sample`."""

    KEPT = 32

    def __init__(self, ops: ReferenceBackend):
        self.ops, self.noise = ops, Noise()
        self._batches: dict[tuple[int, int, int], SampledRows] = {}

    def batch(self, states: Sequence[SamplingState], counts: list[int], first: list[int], use: int) -> SampledRows:
        """The rows of these states; those of the step before, if nothing but their tokens has changed."""
        key = (use, first[0], states[0].rng_key) if states else (use, 0, 0)
        found = self._batches.get(key)
        if found is None or found.states != states or found.counts != counts or found.first != first:
            if len(self._batches) > self.KEPT:
                self._batches.clear()
            found = self._batches[key] = SampledRows(states, counts, first)
        return found

    def sample(
        self, scores: Part, batch: SampledRows, use: int, drafts: Sequence[int] = (), keep: bool = False
    ) -> tuple[list[list[int]], Sequence[Any]]:
        """Of each row whether it is finite, whether its draft is accepted, and its token; and what is kept of them: see
        distributions.sample. `drafts`: of each row the one that is verified, -1 for none. Waits for the device once."""
        logits, choice, numbers = scores
        table, drawn_from = batch.table(logits.shape[-1]), []
        table[Field.ROW], table[Field.UNIFORM] = numbers, batch.uniforms(self.noise, use)
        if drafts:
            table[Field.DRAFT], table[Field.ACCEPT] = drafts, batch.uniforms(self.noise, ACCEPT)
            drawn_from = [s.draft.q[i] if x >= 0 else None for x, (s, i) in zip(drafts, batch.rows, strict=True)]
        found, kept = self.ops.sample(logits, choice, SamplingMetadata(table, batch.params, drawn_from), keep)
        return found.tolist(), kept

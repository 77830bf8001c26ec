"""Sampling: from logits to tokens, with drafts verified by speculative sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from core.devices import select, upload
from engine.noise import DRAFT, SAMPLE
from engine.row_sampler import Part, RowSampler
from engine.sampling_state import SamplingState
from ops.backend import ReferenceBackend


class Scores:
    """The rows of logits (rows, V), float32, that some tokens are sampled from, and the greedy choice among each.

    They lie in parts, of which only some rows may count. Where all are greedy nobody looks at logits, and the choices
    are all that is copied.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts

    @classmethod
    def of(cls, logits: torch.Tensor) -> "Scores":
        return cls(((logits, greedy(logits), range(len(logits))),))

    @cached_property
    def logits(self) -> torch.Tensor:
        """(rows, V)"""
        found = [select(logits, rows) for logits, _, rows in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    @cached_property
    def joined(self) -> Part:
        """The parts as one."""
        if len(self.parts) == 1:
            return self.parts[0]
        choices = [select(choice.T, rows).T for _, choice, rows in self.parts]
        return self.logits, torch.cat(choices, dim=1), range(len(self))

    def read(self) -> tuple[list[int], list[int]]:
        """For each row whether it is finite, and its likeliest token. Waits for the device once."""
        choices = [choice.flatten() for _, choice, _ in self.parts]
        found = (torch.cat(choices) if len(choices) != 1 else choices[0]).tolist()
        finite: list[int] = []
        tokens: list[int] = []
        at = 0
        for _, choice, rows in self.parts:
            n = choice.shape[1]
            finite += [found[at + row] for row in rows]
            tokens += [found[at + n + row] for row in rows]
            at += 2 * n
        return finite, tokens

    def __len__(self) -> int:
        return sum(len(rows) for _, _, rows in self.parts)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """(2, rows) int64 of logits (rows, V): whether a row is finite, and its likeliest token, the first of equals."""
    return torch.stack((is_finite(logits).long(), logits.argmax(dim=-1)))


def adjusted(logits: torch.Tensor, rows: Sequence[tuple[SamplingState, int]]) -> torch.Tensor:
    """Logits (rows, V), each row after so many of its request's drafts, as they are sampled from: with penalties and
    biases, and -inf for what a request's format does not allow."""
    if any(state.params.changes_logits for state, _ in rows):
        logits = torch.stack([state.penalised(row, i) for row, (state, i) in zip(logits, rows, strict=True)])
    masks = {n: mask for n, (state, i) in enumerate(rows) if (mask := state.mask(i)) is not None}
    if masks:
        packed = upload(np.stack(list(masks.values())), torch.uint8, logits.device)
        held = select(logits, list(masks))
        left_out = ~unpack_bits(packed, logits.shape[1]) & is_finite(held).unsqueeze(-1)  # a mask hides no NaN
        held = held.masked_fill(left_out, -torch.inf)
        whole = len(masks) == len(rows)
        logits = held if whole else logits.index_copy(0, upload(list(masks), torch.int64, logits.device), held)
    return logits


def unpack_bits(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The first n bits of each row of packed (rows, ceil(n / 8) or more), uint8, the lowest of a byte first: (rows, n),
    bool."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> bits) & 1).bool().flatten(1)[:, :n]


def is_finite(logits: torch.Tensor) -> torch.Tensor:
    """For each row of logits (rows, V) whether it can be sampled from: no NaN, no +inf, not -inf everywhere."""
    return logits.amax(dim=-1).isfinite()  # a NaN in the row makes it NaN


def verify(
    logits: torch.Tensor | Scores, states: Sequence[SamplingState], row_sampler: RowSampler | None = None
) -> list[list[int] | None]:
    """The tokens that follow each request's: its drafts accepted, in order, and one more. None where a row of the
    request's logits is not finite. `row_sampler` samples; None: as the reference does.

    logits (sum of 1 + drafts, V), requests in order: row i of a request is the main model's, after its tokens and i
    drafts. At the first draft that is rejected the token comes from what the target has and the proposal lacks; if none
    is, the last row gives one token more. The result is distributed as if there had been no drafts, penalties and cuts
    included; at temperature 0 it is equal. All rows are decided at once; what comes after a rejection is dropped.
    """
    scores = logits if isinstance(logits, Scores) else Scores.of(logits)
    row_sampler = row_sampler or RowSampler(ReferenceBackend())
    counts = [len(state.draft.tokens) + 1 for state in states]
    batch = row_sampler.batch(states, counts, [0] * len(states), SAMPLE)
    if batch.changes_logits:
        scores = Scores.of(adjusted(scores.logits, batch.rows))
    n_rows = len(batch.rows)
    if batch.sampled:
        following = [x for state in states for x in (*state.draft.tokens, -1)] if n_rows > len(states) else []
        (finite, accepted, token_ids), _ = row_sampler.sample(scores.joined, batch, SAMPLE, following)
    else:
        finite, token_ids = scores.read()
    if n_rows == len(states):  # nothing to verify
        return [[token] if row_finite else None for token, row_finite in zip(token_ids, finite, strict=True)]
    answers: list[list[int] | None] = []
    at = 0
    for state in states:
        drafts, row = state.draft.tokens, at
        for draft in drafts:
            if not (accepted[row] if batch.sampled else token_ids[row] == draft):
                break
            row += 1
        stop = at + len(drafts) + 1
        answers.append([*drafts[: row - at], token_ids[row]] if all(finite[at:stop]) else None)
        at = stop
    return answers


def propose(
    logits: torch.Tensor | Scores, states: Sequence[SamplingState], row_sampler: RowSampler | None = None
) -> None:
    """Appends to each request's draft the next token the MTP module's logits (requests, V) propose after its tokens and
    the drafts so far. `row_sampler` samples; None: as the reference does.

    It is drawn as the main model's token would be, because a proposal like the target is accepted most often.
    """
    scores = logits if isinstance(logits, Scores) else Scores.of(logits)
    row_sampler = row_sampler or RowSampler(ReferenceBackend())
    batch = row_sampler.batch(states, [1] * len(states), [len(state.draft.tokens) for state in states], DRAFT)
    if batch.changes_logits:
        x = scores.logits
        x = x.masked_fill(~is_finite(x).unsqueeze(-1), 0.0)  # a bad draft costs time, never correctness
        scores = Scores.of(adjusted(x, batch.rows))
    kept: Sequence[Any] = [None] * len(states)
    if batch.sampled:
        (_, _, tokens), kept = row_sampler.sample(scores.joined, batch, DRAFT, keep=True)
    else:
        finite, tokens = scores.read()
        tokens = [token if row_finite else 0 for row_finite, token in zip(finite, tokens, strict=True)]
    for state, token, q in zip(states, tokens, kept, strict=True):
        state.draft.tokens.append(token)
        state.draft.q.append(q)


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability under the model itself (temperature 1, nothing cut), with the likeliest tokens."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def logprob(logits: torch.Tensor, token: int, top: int) -> Logprob:
    """From one row of logits (V,)."""
    log_p = logits.double().log_softmax(dim=-1)
    values, ids = log_p.topk(min(top, len(log_p)))
    return Logprob(token, float(log_p[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

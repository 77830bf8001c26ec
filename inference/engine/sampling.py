"""Sampling: from logits to tokens, with drafts verified by speculative sampling."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from core.devices import select, upload
from core.sampling_params import SamplingParams
from engine.constraint import Constraint, Mask
from engine.distributions import Columns, draw, penalised, probabilities
from engine.noise import ACCEPT, DRAFT, SAMPLE, Noise, uniform


class Scores:
    """The rows of logits (rows, V), float32, that some tokens are sampled from, and the greedy choice among each.

    They lie in parts, of which only some rows may count. Where all are greedy nobody looks at logits, and the choices
    are all that is copied.
    """

    Part = tuple[torch.Tensor, torch.Tensor, Sequence[int]]

    def __init__(self, parts: Sequence[Part]):
        """Each part: logits (n, V), what `greedy` said of them (2, n), and the numbers of the rows that count."""
        self.parts = parts

    @classmethod
    def of(cls, logits: torch.Tensor) -> "Scores":
        return cls(((logits, greedy(logits), range(len(logits))),))

    @cached_property
    def logits(self) -> torch.Tensor:
        """(rows, V)"""
        found = [select(logits, rows) for logits, _, rows in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def read(self, *more: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
        """For each row whether it is finite, and its likeliest token; and the numbers of `more` tensors, one after
        another. Waits for the device once."""
        choices = [choice.flatten() for _, choice, _ in self.parts]
        found = torch.cat([*choices, *(t.flatten().long() for t in more)]).tolist()
        finite: list[int] = []
        tokens: list[int] = []
        at = 0
        for _, choice, rows in self.parts:
            n = choice.shape[1]
            finite += [found[at + row] for row in rows]
            tokens += [found[at + n + row] for row in rows]
            at += 2 * n
        return finite, tokens, found[at:]

    def __len__(self) -> int:
        return sum(len(rows) for _, _, rows in self.parts)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """(2, rows) int64 of logits (rows, V): whether a row is finite, and its likeliest token, the first of equals."""
    return torch.stack((is_finite(logits).long(), logits.argmax(dim=-1)))


@dataclass
class Draft:
    """Tokens the MTP module proposes for one request, and the distribution each was drawn from (None: all on it)."""

    tokens: list[int] = field(default_factory=list)
    q: list[torch.Tensor | None] = field(default_factory=list)

    def clear(self) -> None:
        self.tokens.clear()
        self.q.clear()


@dataclass
class SamplingState:
    """What sampling a request's next tokens depends on, beside the logits."""

    params: SamplingParams
    rng_key: int  # tells its random numbers from other requests' under one seed
    tokens: Sequence[int]  # prompt and answer so far
    n_prompt: int
    draft: Draft = field(default_factory=Draft)  # of what follows
    noise: Noise | None = field(default=None, repr=False)  # where numbers made ahead are kept; None: they are not
    constraint: Constraint | None = None  # of an answer that is held to a format
    changes_logits: bool = field(init=False)  # it is not the model's logits that are sampled from

    def __post_init__(self) -> None:
        self.changes_logits = self.params.changes_logits or self.constraint is not None

    def mask(self, n_drafts: int) -> Mask | None:
        """What may come after `n_drafts` drafts; None for anything."""
        if self.constraint is None:
            return None
        return self.constraint.mask(self.tokens, self.n_prompt, self.draft.tokens[:n_drafts])

    def penalised(self, logits: torch.Tensor, n_drafts: int) -> torch.Tensor:
        """One row of logits (V,), after `n_drafts` drafts, with penalties and biases."""
        if not self.params.changes_logits:
            return logits
        return penalised(logits, self.params, [*self.tokens, *self.draft.tokens[:n_drafts]], self.n_prompt)


def uniforms(rows: Sequence[tuple[SamplingState, int]], use: int) -> list[float]:
    """For each state the random number in [0, 1) for the token after so many drafts."""
    wanted = [(state.params.seed, state.rng_key, len(state.tokens) + n_drafts) for state, n_drafts in rows]
    noise = rows[0][0].noise if rows else None
    return noise.of(wanted, use) if noise is not None else [uniform(*one, use) for one in wanted]


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


_ROWS = 32  # distributions that exist at one time: of 129,280 tokens, 33 MB for each array of them


def verify(logits: torch.Tensor | Scores, states: Sequence[SamplingState]) -> list[list[int] | None]:
    """The tokens that follow each request's: its drafts accepted, in order, and one more. None where a row of the
    request's logits is not finite.

    logits (sum of 1 + drafts, V), requests in order: row i of a request is the main model's, after its tokens and i
    drafts. Speculative sampling (arXiv 2302.01318, algorithm 2): draft x, drawn from q, is accepted with probability
    min(1, p(x) / q(x)); at the first rejection the token comes from max(p - q, 0) instead; if none is rejected the last
    row gives one token more. The result is distributed as if there had been no drafts, penalties and cuts included;
    at temperature 0 it is equal. All rows are decided at once; what comes after a rejection is dropped.
    """
    scores = logits if isinstance(logits, Scores) else Scores.of(logits)
    rows: list[tuple[SamplingState, int]] = []
    if any([state.params.temperature or state.changes_logits for state in states]):
        rows = [(state, i) for state in states for i in range(len(state.draft.tokens) + 1)]
    if any([state.changes_logits for state in states]):
        scores = Scores.of(adjusted(scores.logits, rows))
    sampled = [n for n, (state, _) in enumerate(rows) if state.params.temperature]
    parts = [sampled[at : at + _ROWS] for at in range(0, len(sampled), _ROWS)]
    drawn = [accept_or_resample(select(scores.logits, part), [rows[n] for n in part]) for part in parts]
    finite, token_ids, found = scores.read(*(t for pair in drawn for t in pair))  # waits for the device once
    if len(token_ids) == len(states) and not parts:  # nothing to verify
        return [[token] if row_finite else None for token, row_finite in zip(token_ids, finite, strict=True)]
    accepted = [0] * len(token_ids)
    for part in parts:
        n = len(part)
        for row, row_accepted, token in zip(part, found[:n], found[n : 2 * n], strict=True):
            accepted[row], token_ids[row] = row_accepted, token
        del found[: 2 * n]
    answers: list[list[int] | None] = []
    at = 0
    for state in states:
        drafts, row = state.draft.tokens, at
        for draft in drafts:
            if not (accepted[row] if state.params.temperature else token_ids[row] == draft):
                break
            row += 1
        stop = at + len(drafts) + 1
        answers.append([*drafts[: row - at], token_ids[row]] if all(finite[at:stop]) else None)
        at = stop
    return answers


def accept_or_resample(
    logits: torch.Tensor, rows: Sequence[tuple[SamplingState, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """For logits (rows, V) of sampled requests, each row after i of its request's drafts: whether the next draft is
    accepted (rows,), bool; and the token to take if it is not or there is none (rows,), int64."""
    params, device = [state.params for state, _ in rows], logits.device
    drafts = [state.draft.tokens[i] if i < len(state.draft.tokens) else -1 for state, i in rows]
    drawn_from = [state.draft.q[i] if x >= 0 else None for x, (state, i) in zip(drafts, rows, strict=True)]
    noise = [uniforms(rows, SAMPLE), uniforms(rows, ACCEPT) if max(drafts) >= 0 else [0.0] * len(rows)]
    columns = Columns.of(params, logits.shape[-1], device, drafts, *noise)
    x, to_sample, to_accept = columns.more
    p = rest = probabilities(logits, params, columns)
    accepted = torch.zeros(len(rows), dtype=torch.bool, device=device)
    if max(drafts) >= 0:
        drafted, x = x >= 0, x.long().clamp(min=0)
        certain = torch.zeros_like(p).scatter_(-1, x, 1.0)  # what a draft that was not drawn is drawn from
        q = [certain[n] if row is None else row for n, row in enumerate(drawn_from)]
        of_drafts = torch.where(drafted, torch.stack(q), 0)
        accepted = (drafted & (to_accept * of_drafts.gather(-1, x) < p.gather(-1, x))).squeeze(-1)
        rest = (p - of_drafts).clamp(min=0)
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)  # p = q up to rounding: any draw from p will do
    return accepted, draw(rest, to_sample)


def propose(logits: torch.Tensor | Scores, states: Sequence[SamplingState]) -> None:
    """Appends to each request's draft the next token the MTP module's logits (requests, V) propose after its tokens and
    the drafts so far.

    It is drawn as the main model's token would be, because a proposal like the target is accepted most often.
    """
    scores = logits if isinstance(logits, Scores) else Scores.of(logits)
    sampled = [n for n, state in enumerate(states) if state.params.temperature]
    if sampled or any(state.changes_logits for state in states):
        rows = scores.logits
        rows = rows.masked_fill(~is_finite(rows).unsqueeze(-1), 0.0)  # a bad draft costs time, never correctness
        scores = Scores.of(adjusted(rows, [(state, len(state.draft.tokens)) for state in states]))
    drawn_from: list[torch.Tensor | None] = [None] * len(states)
    drawn = []
    for at in range(0, len(sampled), _ROWS):
        part = sampled[at : at + _ROWS]
        params = [states[n].params for n in part]
        noise = uniforms([(states[n], len(states[n].draft.tokens)) for n in part], DRAFT)
        columns = Columns.of(params, scores.logits.shape[-1], scores.logits.device, noise)
        q = probabilities(select(scores.logits, part), params, columns)
        drawn.append(draw(q, columns.more[0]))
        for n, row in zip(part, q, strict=True):
            drawn_from[n] = row
    finite, tokens, found = scores.read(*drawn)
    token_ids = [token if row_finite else 0 for row_finite, token in zip(finite, tokens, strict=True)]
    for n, token in zip(sampled, found, strict=True):
        token_ids[n] = token
    for state, token, row in zip(states, token_ids, drawn_from, strict=True):
        state.draft.tokens.append(token)
        state.draft.q.append(row)


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

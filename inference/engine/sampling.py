"""Sampling: from logits to tokens, with drafts verified by speculative sampling."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from core.sampling_params import SamplingParams

# What a random number is for: each use at a position has its own.
SAMPLE, DRAFT, ACCEPT = 0, 1, 2


def uniform(seed: int, rng_key: int, position: int, use: int = SAMPLE) -> float:
    """A random number in [0, 1) from a counter-based generator (Philox 4x64): it depends on these numbers alone, not on
    what else is in the batch or was drawn before."""
    key = np.array([seed, rng_key], dtype=np.uint64)  # a plain list goes through float64 and merges large seeds
    counter = np.array([0, position, use, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())


def penalised(logits: torch.Tensor, params: SamplingParams, tokens: Sequence[int], n_prompt: int) -> torch.Tensor:
    """One row of logits (V,) after the penalties for `tokens`, the first n_prompt of which are the prompt, and with the
    biases of single tokens."""
    if not params.changes_logits:
        return logits
    logits = logits.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(tokens)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    answer = torch.tensor(list(tokens[n_prompt:]), dtype=torch.int64, device=logits.device)
    if len(answer):
        made, times = answer.unique(return_counts=True)
        logits[made] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        logits[torch.tensor(ids, device=logits.device)] += torch.tensor(biases, device=logits.device)
    return logits


def probabilities(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distributions (rows, V), float64, that rows of logits (rows, V) are sampled from; at temperature 0 all of it
    is on the likeliest token, the first one of equals.

    Temperature, then top-k, then the smallest set of the likeliest tokens that reaches top_p of what is left, then
    min_p. A token as likely as the last one kept stays out if it comes later.
    """
    best = logits.argmax(dim=-1, keepdim=True)
    peak = logits.gather(-1, best).double()
    temperature = _column([row.temperature for row in params], logits.device)
    divisor = temperature.masked_fill(temperature == 0, 1.0)
    p = ((logits.double() - peak) / divisor).softmax(dim=-1)  # the difference first: a tiny T overflows
    if any(row.top_k or row.top_p < 1 or row.min_p for row in params):
        p = _cut(p, params)
    return torch.where(temperature == 0, torch.zeros_like(p).scatter_(-1, best, 1.0), p)


_LIKELIEST = 1024  # tokens a CPU ranks at first: mostly all that a cut keeps, for a tenth of the time a sort takes


def _cut(p: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """p (rows, V) without the tokens that top_k, top_p and min_p leave out; rows sum to 1 again."""
    vocab = p.shape[-1]
    most = [min(row.top_k or vocab, vocab) for row in params]
    top_k, top_p, min_p = (
        _column(values, p.device) for values in (most, [row.top_p for row in params], [row.min_p for row in params])
    )
    few = vocab > _LIKELIEST and p.is_cpu  # elsewhere, to look whether they were enough would make the host wait
    for n in (_LIKELIEST, vocab) if few and all(k == vocab or k <= _LIKELIEST for k in most) else (vocab,):
        ranked = p.topk(n, dim=-1).values
        place = torch.arange(n, device=p.device)
        total = torch.where(top_k < vocab, ranked.masked_fill(place >= top_k, 0).sum(dim=-1, keepdim=True), 1.0)
        before = ranked.cumsum(dim=-1) - ranked
        stays = (place < top_k) & ((before < top_p * total) | (top_p == 1)) & (ranked >= min_p * ranked[:, :1])
        kept = stays.sum(dim=-1, keepdim=True).clamp(min=1)  # none stays in a row of NaN
        if n < vocab and bool((kept < n).all()):
            break
    last = ranked.gather(-1, kept - 1)
    level = p == last
    n_last = kept - (p > last).sum(dim=-1, keepdim=True)
    p = p.masked_fill((p < last) | (level & (level.cumsum(dim=-1) > n_last)), 0)
    return p / p.sum(dim=-1, keepdim=True)


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """One value per row, as (rows, 1), float64."""
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(-1)


def draw(p: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """For each row of p (rows, V), which need not sum to 1, the token at which its cumulative distribution passes the
    row's number from [0, 1): (rows,), int64."""
    cumulative = p.cumsum(dim=-1)
    at = torch.tensor(uniforms, dtype=p.dtype, device=p.device).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).clamp(max=p.shape[-1] - 1).squeeze(-1)


@dataclass
class Draft:
    """Tokens the MTP module proposes for one request, and the distribution each was drawn from (None: all on it)."""

    tokens: list[int] = field(default_factory=list)
    q: list[torch.Tensor | None] = field(default_factory=list)


@dataclass
class SamplingState:
    """What sampling a request's next tokens depends on, beside the logits."""

    params: SamplingParams
    rng_key: int  # tells its random numbers from other requests' under one seed
    tokens: Sequence[int]  # prompt and answer so far
    n_prompt: int
    draft: Draft = field(default_factory=Draft)  # of what follows

    def penalised(self, logits: torch.Tensor, n_drafts: int) -> torch.Tensor:
        """One row of logits (V,), after `n_drafts` drafts, with penalties and biases."""
        if not self.params.changes_logits:
            return logits
        return penalised(logits, self.params, [*self.tokens, *self.draft.tokens[:n_drafts]], self.n_prompt)

    def uniform(self, n_drafts: int, use: int) -> float:
        """The random number in [0, 1) for the token after `n_drafts` drafts."""
        return uniform(self.params.seed, self.rng_key, len(self.tokens) + n_drafts, use)


def is_finite(logits: torch.Tensor) -> torch.Tensor:
    """For each row of logits (rows, V) whether it can be sampled from: no NaN, no +inf, not -inf everywhere."""
    return logits.amax(dim=-1).isfinite()  # a NaN in the row makes it NaN


_ROWS = 32  # distributions that exist at one time: of 129,280 tokens, 33 MB for each array of them


def verify(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[list[int] | None]:
    """The tokens that follow each request's: its drafts accepted, in order, and one more. None where a row of the
    request's logits is not finite.

    logits (sum of 1 + drafts, V), requests in order: row i of a request is the main model's, after its tokens and i
    drafts. Speculative sampling (arXiv 2302.01318, algorithm 2): draft x, drawn from q, is accepted with probability
    min(1, p(x) / q(x)); at the first rejection the token comes from max(p - q, 0) instead; if none is rejected the last
    row gives one token more. The result is distributed as if there had been no drafts, penalties and cuts included;
    at temperature 0 it is equal. All rows are decided at once; what comes after a rejection is dropped.
    """
    rows = [(state, i) for state in states for i in range(len(state.draft.tokens) + 1)]
    if any(state.params.changes_logits for state in states):
        logits = torch.stack([state.penalised(row, i) for row, (state, i) in zip(logits, rows, strict=True)])
    accepted = torch.zeros(len(rows), dtype=torch.bool, device=logits.device)
    token_ids = logits.argmax(dim=-1)
    sampled = [n for n, (state, _) in enumerate(rows) if state.params.temperature]
    for at in range(0, len(sampled), _ROWS):
        part = sampled[at : at + _ROWS]
        accepted[part], token_ids[part] = accept_or_resample(logits[part], [rows[n] for n in part])
    columns = torch.stack((is_finite(logits).long(), accepted.long(), token_ids)).tolist()  # waits for the device once
    answers: list[list[int] | None] = []
    results = zip(*columns, strict=True)
    for state in states:
        answer: list[int] = []
        finite, rejected = True, False
        for i, (row_finite, row_accepted, token) in zip(range(len(state.draft.tokens) + 1), results, strict=False):
            finite = finite and bool(row_finite)
            if rejected:
                continue
            draft = state.draft.tokens[i] if i < len(state.draft.tokens) else None
            rejected = not (row_accepted if state.params.temperature else token == draft)
            answer.append(token if rejected or draft is None else draft)
        answers.append(answer if finite else None)
    return answers


def accept_or_resample(
    logits: torch.Tensor, rows: Sequence[tuple[SamplingState, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """For logits (rows, V) of sampled requests, each row after i of its request's drafts: whether the next draft is
    accepted (rows,), bool; and the token to take if it is not or there is none (rows,), int64."""
    p = probabilities(logits, [state.params for state, _ in rows])
    accepted = torch.zeros(len(rows), dtype=torch.bool, device=p.device)
    rest = p.clone()
    for n, (state, i) in enumerate(rows):
        if i == len(state.draft.tokens):
            continue
        x, q = state.draft.tokens[i], state.draft.q[i]
        accepted[n] = state.uniform(i, ACCEPT) * (1.0 if q is None else q[x]) < p[n, x]
        if q is None:
            rest[n, x] = 0
        else:
            rest[n] = (p[n] - q).clamp(min=0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)  # p = q up to rounding: any draw from p will do
    return accepted, draw(rest, [state.uniform(i, SAMPLE) for state, i in rows])


def propose(logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
    """Appends to each request's draft the next token the MTP module's logits (requests, V) propose after its tokens and
    the drafts so far.

    It is drawn as the main model's token would be, because a proposal like the target is accepted most often.
    """
    logits = logits.masked_fill(~is_finite(logits).unsqueeze(-1), 0.0)  # a bad draft costs time, never correctness
    if any(state.params.changes_logits for state in states):
        logits = torch.stack(
            [state.penalised(row, len(state.draft.tokens)) for row, state in zip(logits, states, strict=True)]
        )
    token_ids = logits.argmax(dim=-1)
    drawn_from: list[torch.Tensor | None] = [None] * len(states)
    sampled = [n for n, state in enumerate(states) if state.params.temperature]
    for at in range(0, len(sampled), _ROWS):
        part = sampled[at : at + _ROWS]
        q = probabilities(logits[part], [states[n].params for n in part])
        token_ids[part] = draw(q, [states[n].uniform(len(states[n].draft.tokens), DRAFT) for n in part])
        for n, row in zip(part, q, strict=True):
            drawn_from[n] = row
    for state, token, row in zip(states, token_ids.tolist(), drawn_from, strict=True):
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

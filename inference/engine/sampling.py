"""Logits to tokens, with drafts verified so that nobody can tell there were any."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from core.sampling_params import SamplingParams

# What a draw is for: each use of a position has noise of its own.
SAMPLE, DRAFT, ACCEPT = 0, 1, 2


def uniform(seed: int, request: int, position: int, use: int = SAMPLE) -> float:
    """The noise of one draw, in [0, 1): a counter-based generator (Philox 4x64), so it depends on these numbers alone
    and not on what else is in the batch or was drawn before."""
    key = np.array([seed, request], dtype=np.uint64)  # a plain list goes through float64 and merges large seeds
    counter = np.array([0, position, use, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())


def penalised(logits: torch.Tensor, params: SamplingParams, tokens: Sequence[int], n_prompt: int) -> torch.Tensor:
    """One row of logits (V,) after the penalties for `tokens`, the first n_prompt of which are the prompt."""
    if not params.penalises:
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
    return logits


def probabilities(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distributions (rows, V), float64, that rows of logits (rows, V) are sampled from; at temperature 0 all is on
    the likeliest token, the first of them where several are.

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
    few = vocab > _LIKELIEST and not p.is_cuda  # on a GPU, to look whether they were enough would make the host wait
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
    spare = kept - (p > last).sum(dim=-1, keepdim=True)
    p = p.masked_fill((p < last) | (level & (level.cumsum(dim=-1) > spare)), 0)
    return p / p.sum(dim=-1, keepdim=True)


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """One value per row, as (rows, 1), float64."""
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(-1)


def draw(p: torch.Tensor, noise: Sequence[float]) -> torch.Tensor:
    """For each row of p (rows, V), which need not sum to 1, the token at which its cumulative distribution passes the
    row's noise."""
    cumulative = p.cumsum(dim=-1)
    at = torch.tensor(noise, dtype=p.dtype, device=p.device).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).clamp(max=p.shape[-1] - 1).squeeze(-1)


@dataclass
class Draft:
    """Tokens the MTP module proposes for one request, and the distribution each was drawn from (None: all on it)."""

    tokens: list[int] = field(default_factory=list)
    q: list[torch.Tensor | None] = field(default_factory=list)


@dataclass
class Ask:
    """What is to be known of a request to continue it: `tokens` so far, the first `n_prompt` of which are the prompt,
    the draft of what follows, and the number that tells its noise from other requests'."""

    params: SamplingParams
    noise: int
    tokens: Sequence[int]
    n_prompt: int
    draft: Draft = field(default_factory=Draft)

    def penalised(self, logits: torch.Tensor, n_drafts: int) -> torch.Tensor:
        """One row of logits (V,), after `n_drafts` drafts, less the penalties."""
        if not self.params.penalises:
            return logits
        return penalised(logits, self.params, [*self.tokens, *self.draft.tokens[:n_drafts]], self.n_prompt)

    def uniform(self, n_drafts: int, use: int) -> float:
        """The noise for the token after `n_drafts` drafts."""
        return uniform(self.params.seed, self.noise, len(self.tokens) + n_drafts, use)


def is_sound(logits: torch.Tensor) -> torch.Tensor:
    """For each row of logits (rows, V) whether it can be sampled from: no NaN, no +inf, not -inf everywhere."""
    return logits.amax(dim=-1).isfinite()  # a NaN in the row makes it NaN


_ROWS = 32  # distributions that exist at one time: of 129,280 tokens, 33 MB for each array of them


def verify(logits: torch.Tensor, asks: Sequence[Ask]) -> list[list[int] | None]:
    """The tokens that follow each request's: its drafts accepted, in order, and one more. None if a row is unsound.

    logits (sum of 1 + drafts, V), requests in order: row i of a request is the main model's, after its tokens and i
    drafts. Speculative sampling (arXiv 2302.01318, algorithm 2): draft x, drawn from q, is accepted with probability
    min(1, p(x) / q(x)); at the first rejection the token comes from max(p - q, 0) instead; if none is rejected the last
    row gives one token more. The result is distributed as if there had been no drafts, penalties and cuts included;
    at temperature 0 it is equal. All rows are judged at once: what comes after a rejection is thrown away.
    """
    rows = [(ask, i) for ask in asks for i in range(len(ask.draft.tokens) + 1)]
    if any(ask.params.penalises for ask in asks):
        logits = torch.stack([ask.penalised(row, i) for row, (ask, i) in zip(logits, rows, strict=True)])
    believed = torch.zeros(len(rows), dtype=torch.bool, device=logits.device)
    said = logits.argmax(dim=-1)
    sampled = [n for n, (ask, _) in enumerate(rows) if ask.params.temperature]
    for at in range(0, len(sampled), _ROWS):
        part = sampled[at : at + _ROWS]
        believed[part], said[part] = _judge(logits[part], [rows[n] for n in part])
    facts = torch.stack((is_sound(logits).long(), believed.long(), said)).tolist()  # the one wait for the device
    answers: list[list[int] | None] = []
    found = zip(*facts, strict=True)
    for ask in asks:
        made: list[int] = []
        whole, rejected = True, False
        for i, (sound, accepted, token) in zip(range(len(ask.draft.tokens) + 1), found, strict=False):
            whole = whole and bool(sound)
            if rejected:
                continue
            draft = ask.draft.tokens[i] if i < len(ask.draft.tokens) else None
            rejected = not (accepted if ask.params.temperature else token == draft)
            made.append(token if rejected or draft is None else draft)
        answers.append(made if whole else None)
    return answers


def _judge(logits: torch.Tensor, rows: Sequence[tuple[Ask, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows (rows, V) that are sampled, each of a request after i drafts: whether its next draft is accepted, and
    the token to be said if it is not, or if there is none."""
    p = probabilities(logits, [ask.params for ask, _ in rows])
    believed = torch.zeros(len(rows), dtype=torch.bool, device=p.device)
    rest = p.clone()
    for n, (ask, i) in enumerate(rows):
        if i == len(ask.draft.tokens):
            continue
        x, q = ask.draft.tokens[i], ask.draft.q[i]
        believed[n] = ask.uniform(i, ACCEPT) * (1.0 if q is None else q[x]) < p[n, x]
        if q is None:
            rest[n, x] = 0
        else:
            rest[n] = (p[n] - q).clamp(min=0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)  # p = q up to rounding: any draw from p will do
    return believed, draw(rest, [ask.uniform(i, SAMPLE) for ask, i in rows])


def propose(logits: torch.Tensor, asks: Sequence[Ask]) -> None:
    """Appends to each request's draft the next token the MTP module's logits (requests, V) propose after its tokens and
    the drafts so far.

    It is drawn as the main model's token would be: a proposal like the target is accepted most often.
    """
    logits = logits.masked_fill(~is_sound(logits).unsqueeze(-1), 0.0)  # a bad draft costs time, never correctness
    if any(ask.params.penalises for ask in asks):
        logits = torch.stack([ask.penalised(row, len(ask.draft.tokens)) for row, ask in zip(logits, asks, strict=True)])
    said = logits.argmax(dim=-1)
    drawn_from: list[torch.Tensor | None] = [None] * len(asks)
    sampled = [n for n, ask in enumerate(asks) if ask.params.temperature]
    for at in range(0, len(sampled), _ROWS):
        part = sampled[at : at + _ROWS]
        q = probabilities(logits[part], [asks[n].params for n in part])
        said[part] = draw(q, [asks[n].uniform(len(asks[n].draft.tokens), DRAFT) for n in part])
        for n, row in zip(part, q, strict=True):
            drawn_from[n] = row
    for ask, token, row in zip(asks, said.tolist(), drawn_from, strict=True):
        ask.draft.tokens.append(token)
        ask.draft.q.append(row)


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

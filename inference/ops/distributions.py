"""Sampling in plain torch, the specification of the op `sample`: temperature, top-k, top-p, min-p, the draw, and drafts
that are verified."""

import math
from collections.abc import Sequence
from enum import IntEnum
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch

from core.devices import select, upload
from core.sampling_params import SamplingParams


class Field(IntEnum):
    """What the table of SamplingMetadata has of each row."""

    ROW = 0  # its number among the logits
    TEMPERATURE = 1
    TOP_K = 2  # the vocabulary's size where it is off
    TOP_P = 3  # infinite where it is 1
    MIN_P = 4
    UNIFORM = 5  # the number in [0, 1) that its token is drawn with
    DRAFT = 6  # the token proposed after it; -1: none
    ACCEPT = 7  # the number in [0, 1) that decides on the draft
    DRAWN_FROM = 8  # for the backend


class SamplingMetadata(NamedTuple):
    """How rows of logits are sampled: parameters, random numbers and drafts. On the host."""

    table: np.ndarray  # (9, rows), float64: by Field
    params: Sequence[SamplingParams]  # of each row
    # Of each row the distribution that its draft was drawn from, as `sample` gave it; None: all of it was on the draft.
    # Empty where no row has a draft.
    drawn_from: Sequence[Any] = ()


class Columns(NamedTuple):
    """Of each row the parameters it is sampled with, (rows, 1) float64 on the device, sent there in one piece."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor  # infinite where it is 1
    min_p: torch.Tensor
    more: tuple[torch.Tensor, ...]  # what else the caller has of each row

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], vocab: int, device: torch.device, *more: Sequence[float]
    ) -> "Columns":
        fields = zip(*(fields_of(row, vocab) for row in params), strict=True)
        return cls.sent(np.array([*fields, *more]), device)

    @classmethod
    def sent(cls, rows: np.ndarray, device: torch.device) -> "Columns":
        first, second, third, fourth, *others = upload(rows, torch.float64, device).unsqueeze(-1).unbind(0)
        return cls(first, second, third, fourth, tuple(others))


def fields_of(params: SamplingParams, vocab: int) -> tuple[float, float, float, float]:
    """From Field.TEMPERATURE on to MIN_P."""
    top_k, top_p = min(params.top_k or vocab, vocab), params.top_p if params.top_p < 1 else math.inf
    return params.temperature, top_k, top_p, params.min_p


ROWS = 32  # distributions that exist at one time: of 129,280 tokens, 33 MB for each array of them


def sample(
    logits: torch.Tensor, choice: torch.Tensor, metadata: SamplingMetadata, keep: bool = False
) -> tuple[torch.Tensor, list[Any]]:
    """For each row of the table, found (3, rows) int64 on the device: whether its logits are finite, whether its draft
    is accepted, and its token, which means nothing where the draft is. With `keep` also the distribution that each
    token was drawn from, for when it is a draft; one of logits that are not finite is as if they were all equal.

    logits (n, V), float32; choice (2, n), int64: of each whether it is finite, and the likeliest token, the first of
    equals, which is a row's token at temperature 0. Speculative sampling (arXiv 2302.01318, algorithm 2): draft x,
    drawn from q, is accepted with probability min(1, p(x) / q(x)); otherwise the token comes from max(p - q, 0).
    """
    table, params, device = metadata.table, metadata.params, logits.device
    rows = table[Field.ROW].astype(np.int64).tolist()
    finite, tokens = select(choice.T, rows).T
    drafts = upload(table[Field.DRAFT], torch.int64, device) if metadata.drawn_from else torch.full_like(tokens, -1)
    tokens = torch.where(finite > 0, tokens, 0)
    accepted = (tokens == drafts).long()
    kept: list[Any] = [None] * len(rows)
    sampled = [n for n, row in enumerate(params) if row.temperature]
    drawn = []
    for at in range(0, len(sampled), ROWS):
        part = sampled[at : at + ROWS]
        x = select(logits, [rows[n] for n in part])
        if keep:
            x = x.masked_fill(select(finite, part).unsqueeze(-1) == 0, 0.0)
        drawn_from = [metadata.drawn_from[n] for n in part] if metadata.drawn_from else []
        columns = Columns.sent(table[Field.TEMPERATURE : Field.DRAWN_FROM, part], device)
        p = probabilities(x, [params[n] for n in part], columns)
        drawn.append(_accept_or_resample(p, drawn_from, *columns.more))
        if keep:
            for n, row in zip(part, p, strict=True):
                kept[n] = row
    if drawn:
        verdicts, drawn_tokens = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        at_rows = upload(sampled, torch.int64, device)
        accepted, tokens = accepted.index_copy(0, at_rows, verdicts), tokens.index_copy(0, at_rows, drawn_tokens)
    return torch.stack((finite, accepted, tokens)), kept


def _accept_or_resample(
    p: torch.Tensor, drawn_from: Sequence[Any], to_sample: torch.Tensor, drafts: torch.Tensor, to_accept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows of p (rows, V) whether the next draft is accepted, and the token to take if it is not or there is none:
    (rows,), int64. The others (rows, 1), as columns have them."""
    if not drawn_from:
        return torch.zeros(len(p), dtype=torch.int64, device=p.device), draw(p, to_sample)
    drafted, x = drafts >= 0, drafts.long().clamp(min=0)
    certain = torch.zeros_like(p).scatter_(-1, x, 1.0)  # what a draft that was not drawn is drawn from
    q = [certain[n] if row is None else row for n, row in enumerate(drawn_from)]
    of_drafts = torch.where(drafted, torch.stack(q), 0)
    accepted = drafted & (to_accept * of_drafts.gather(-1, x) < p.gather(-1, x))
    rest = (p - of_drafts).clamp(min=0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)  # p = q up to rounding: any draw from p will do
    return accepted.squeeze(-1).long(), draw(rest, to_sample)


def probabilities(
    logits: torch.Tensor, params: Sequence[SamplingParams], columns: Columns | None = None
) -> torch.Tensor:
    """The distributions (rows, V), float64, that rows of logits (rows, V) are sampled from; at temperature 0 all of it
    is on the likeliest token, the first one of equals. `columns`: of params, if they are on the device already.

    Temperature, then top-k, then the smallest set of the likeliest tokens that reaches top_p of what is left, then
    min_p. A token as likely as the last one kept stays out if it comes later.
    """
    columns = columns or Columns.of(params, logits.shape[-1], logits.device)
    temperature, is_greedy = columns.temperature, not all(row.temperature for row in params)
    divisor = temperature.masked_fill(temperature == 0, 1.0) if is_greedy else temperature
    peak = logits.amax(dim=-1, keepdim=True).double()
    p = ((logits.double() - peak) / divisor).softmax(dim=-1)  # the difference first: a tiny T overflows
    if any(0 < row.top_k < logits.shape[-1] or row.top_p < 1 or row.min_p for row in params):
        p = _cut(p, params, columns)
    if is_greedy:
        best = logits.argmax(dim=-1, keepdim=True)
        p = torch.where(temperature == 0, torch.zeros_like(p).scatter_(-1, best, 1.0), p)
    return p


_LIKELIEST = 1024  # tokens a CPU ranks at first: mostly all that a cut keeps, for a tenth of the time a sort takes


def _cut(p: torch.Tensor, params: Sequence[SamplingParams], columns: Columns) -> torch.Tensor:
    """p (rows, V) without the tokens that top_k, top_p and min_p leave out, of which some row has one; rows sum to 1
    again, and one that has none is as it was. What no row asks for costs no launch."""
    vocab = p.shape[-1]
    most = [min(row.top_k or vocab, vocab) for row in params]
    top_k, top_p, min_p = columns.top_k, columns.top_p, columns.min_p
    few = vocab > _LIKELIEST and p.is_cpu  # elsewhere, to look whether they were enough would make the host wait
    for n in (_LIKELIEST, vocab) if few and all(k == vocab or k <= _LIKELIEST for k in most) else (vocab,):
        ranked, least = p.topk(n, dim=-1).values, top_p
        stay = []
        if min(most) < vocab:
            behind = torch.arange(n, device=p.device) >= top_k
            least = top_p * torch.where(top_k < vocab, ranked.masked_fill(behind, 0).sum(dim=-1, keepdim=True), 1.0)
            stay.append(~behind)
        if any(row.top_p < 1 for row in params):
            stay.append(ranked.cumsum(dim=-1) - ranked < least)
        if any(row.min_p for row in params):
            stay.append(ranked >= min_p * ranked[:, :1])
        stays = reduce(torch.logical_and, stay)
        kept = stays.sum(dim=-1, keepdim=True).clamp(min=1)  # none stays in a row of NaN
        if n < vocab and bool((kept < n).all()):
            break
    last = ranked.gather(-1, kept - 1)
    level = p == last
    n_last = kept - (p > last).sum(dim=-1, keepdim=True)
    p = p.masked_fill((p < last) | (level & (level.cumsum(dim=-1) > n_last)), 0)
    return torch.where(kept < vocab, p / p.sum(dim=-1, keepdim=True), p)


def draw(p: torch.Tensor, uniforms: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """For each row of p (rows, V), which need not sum to 1, the token at which its cumulative distribution passes the
    row's number from [0, 1), of the host or (rows, 1): (rows,), int64."""
    cumulative = p.cumsum(dim=-1)
    if not isinstance(uniforms, torch.Tensor):
        uniforms = upload(uniforms, p.dtype, p.device).unsqueeze(-1)
    at = uniforms * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).clamp(max=p.shape[-1] - 1).squeeze(-1)

"""The distribution that a request's next token is drawn from: penalties, biases, temperature, top-k, top-p, min-p."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch

from core.devices import upload
from core.sampling_params import SamplingParams


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
        rows = [[p.temperature for p in params], [min(p.top_k or vocab, vocab) for p in params]]
        rows += [[p.top_p if p.top_p < 1 else math.inf for p in params], [p.min_p for p in params], *map(list, more)]
        first, second, third, fourth, *others = upload(rows, torch.float64, device).unsqueeze(-1).unbind(0)
        return cls(first, second, third, fourth, tuple(others))


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

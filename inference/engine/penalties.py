"""What changes logits before they are sampled: penalties for a request's tokens so far, and biases of single ones."""

from collections.abc import Sequence

import torch

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

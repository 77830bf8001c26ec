"""What a request's next tokens depend on, beside the logits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from core.sampling_params import SamplingParams
from engine.constraint import Constraint, Mask
from engine.penalties import penalised


@dataclass
class Draft:
    """Tokens the MTP module proposes for one request, and the distribution each was drawn from (None: all on it)."""

    tokens: list[int] = field(default_factory=list)
    q: list[Any] = field(default_factory=list)  # as the backend's `sample` keeps it

    def clear(self) -> None:
        self.tokens.clear()
        self.q.clear()


@dataclass(eq=False)
class SamplingState:
    """What sampling a request's next tokens depends on, beside the logits."""

    params: SamplingParams
    rng_key: int  # tells its random numbers from other requests' under one seed
    tokens: Sequence[int]  # prompt and answer so far
    n_prompt: int
    draft: Draft = field(default_factory=Draft)  # of what follows
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

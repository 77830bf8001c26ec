"""The router of `exact_network.Network`, in float64: equations 13 to 16 of the V3 report, and V2's."""

import math

import torch
from torch import Tensor

from exact_math import Arithmetic


class Router:
    """Which experts a token has, and with what weights. T tokens, E experts, K experts a token."""

    math: Arithmetic
    weights: dict[str, Tensor]
    is_v2: bool
    top_k: int
    n_groups: int
    n_kept: int
    normalise: bool
    route_scale: float

    def sigmoid(self, x: Tensor) -> Tensor:
        return 1 / (1 + self.math.exp(-x))

    def router_logits(self, at: str, x: Tensor) -> Tensor:
        return self.math.product(x, self.weights[f"{at}.gate.weight"])

    def affinity(self, logits: Tensor) -> Tensor:
        """(15), and V2's softmax."""
        if not self.is_v2:
            return self.sigmoid(logits)
        p = self.math.exp(logits - logits.amax(-1, keepdim=True))
        return p / self.math.sum(p)

    def route(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Expert ids (T, K), the best first, and their weights (T, K)."""
        scores = self.affinity(logits)
        choice = self.candidates(scores, bias)
        ids = self.best(choice)
        weights = self.chosen(scores, choice, ids)
        if self.normalise:
            weights = weights / (self.divisor(weights, scores) + 1e-20)
        return ids, self.scaled(weights)

    def best(self, choice: Tensor) -> Tensor:
        return choice.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]

    def candidates(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        """What experts are chosen by: biased scores, -inf for those of groups that are not kept."""
        choice = scores if bias is None else scores + bias
        if self.n_groups == 1:
            return choice
        grouped = choice.unflatten(-1, (self.n_groups, -1))
        kept = self.worth(grouped).sort(dim=-1, descending=True, stable=True).indices[:, : self.n_kept]
        dropped = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter_(1, kept, False)
        return grouped.masked_fill(dropped.unsqueeze(-1), self.masked()).flatten(-2)

    def worth(self, grouped: Tensor) -> Tensor:
        """A group's worth: its two best biased scores added up (V3), its best score (V2)."""
        return grouped.amax(-1) if self.is_v2 else self.two_best(grouped)

    def two_best(self, grouped: Tensor) -> Tensor:
        best = grouped.sort(-1, descending=True).values
        return best[..., 0] + best[..., 1]

    def masked(self) -> float:
        return -math.inf

    def chosen(self, scores: Tensor, choice: Tensor, ids: Tensor) -> Tensor:
        return scores.gather(-1, ids)

    def divisor(self, weights: Tensor, scores: Tensor) -> Tensor:
        return self.math.sum(weights)

    def scaled(self, weights: Tensor) -> Tensor:
        return weights * self.route_scale

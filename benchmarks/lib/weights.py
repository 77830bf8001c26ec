"""Random weights for a model that is only timed."""

import torch
from torch import nn

CHUNK = 1 << 26  # numbers drawn at one time


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights, drawn on the device into the parameters: activations keep their size, experts are chosen evenly.

    By name and type: norms around 1, the router's bias near 0, FP8 values of spread 1 under scales that undo it.
    """
    for name, p in model.named_parameters():
        if name.endswith("scale"):
            p.uniform_(0.9, 1.1).mul_((128 * p.shape[-1]) ** -0.5)
        elif p.dim() == 1:
            p.normal_(0, 0.2).add_(1) if "norm" in name else p.normal_(0, 1e-3)
        else:
            spread = 1.0 if p.element_size() == 1 else p.shape[-1] ** -0.5
            for part in p.data.view(-1).split(CHUNK):
                part.copy_(torch.randn(part.numel(), device=p.device).mul_(spread).to(p.dtype))

"""Relaxed policies: level probabilities whose expected cost is the budget, differentiable in the utilities."""

from __future__ import annotations

import torch
from torch import Tensor

# Makes the multiplier's steps of order one for the softmax.
_MULTIPLIER = 32.0


def relax(utility: Tensor, kept: Tensor, cost: Tensor, temperature: float) -> Tensor:
    """softmax((u − μ·cost)/τ) [B, S, K] with the μ per row at which the expected cost is ``kept`` [B].

    ``utility`` is [B, S, K], ``cost`` [S, K] the share of the budget that a level takes. μ comes from a bisection,
    which has no gradient; one Newton step from there has the implicit function's.
    """

    def probabilities(multiplier: Tensor) -> Tensor:
        return torch.softmax((utility - _MULTIPLIER * multiplier[:, None, None] * cost) / temperature, dim=-1)

    with torch.no_grad():
        low, high = torch.full_like(kept, -200.0), torch.full_like(kept, 200.0)
        for _ in range(30):
            middle = (low + high) / 2
            over = (probabilities(middle) * cost).sum((1, 2)) > kept
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        middle = (low + high) / 2
        p = probabilities(middle)
        mean = (p * cost).sum(-1, keepdim=True)
        slope = (p * (cost - mean).square()).sum((1, 2)) * _MULTIPLIER / temperature
    excess = (probabilities(middle) * cost).sum((1, 2)) - kept
    return probabilities(middle + excess / slope.clamp_min(1e-4))

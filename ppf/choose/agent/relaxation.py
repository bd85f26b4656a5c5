"""Relaxed policies: level probabilities whose expected cost is the budget, differentiable in the utilities."""

from __future__ import annotations

import torch
from torch import Tensor

# Makes the multiplier's steps of order one for the softmax.
_MULTIPLIER = 32.0
_FAR, _NEAR = 200.0, 6.0  # half widths of the brackets that the bisection starts from
_FAR_STEPS, _NEAR_STEPS = 30, 10


def relax(
    utility: Tensor, kept: Tensor, cost: Tensor, temperature: float, near: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax((u − μ·cost)/τ) [B, S, K] with the μ per row at which the expected cost is ``kept`` [B]; and that μ [B].

    ``utility`` is [B, S, K], ``cost`` [S, K] the share of the budget that a level takes. μ comes from a bisection,
    around ``near`` [B] if given (a training step moves it little; should it move more, it catches up in the next
    steps). A bisection has no gradient; one Newton step from there has the implicit function's.
    """

    # Levels first, rows last: a softmax over a last dimension of seven levels is up to twenty times slower on a CPU.
    scaled, pull = utility.permute(2, 1, 0).contiguous() / temperature, cost.T * (_MULTIPLIER / temperature)
    weight = cost.T.flatten()

    def probabilities(multiplier: Tensor) -> Tensor:
        return torch.softmax(torch.addcmul(scaled, pull[..., None], multiplier, value=-1), dim=0)

    def expected(found: Tensor) -> Tensor:
        return weight @ found.flatten(0, 1)

    with torch.no_grad():
        half, steps = (_FAR, _FAR_STEPS) if near is None else (_NEAR, _NEAR_STEPS)
        low = torch.zeros_like(kept) - half if near is None else near - half
        high = low + 2 * half
        for _ in range(steps):
            middle = (low + high) / 2
            over = expected(probabilities(middle)) > kept
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        middle = (low + high) / 2
    p = probabilities(middle)
    excess, q = expected(p) - kept, p.detach()
    mean = (q * cost.T[..., None]).sum(0)
    slope = (q * (cost.T[..., None] - mean).square()).sum((0, 1)) * _MULTIPLIER / temperature
    # Where the slope vanishes, a whole step would leave the bracket.
    multiplier = middle + (excess / slope.clamp_min(1e-4)).clamp(-half, half)
    return probabilities(multiplier).permute(2, 1, 0), multiplier.detach()

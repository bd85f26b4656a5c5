"""What the methods share that drop whole layers or sub-layers: how far an order of removal reaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.grid import Grid


def sublayer_costs(grid: Grid) -> Tensor:
    """Parameters of every sub-layer at full width, fp64 [S]."""
    return torch.tensor(grid.maximum, dtype=torch.float64) * torch.tensor(grid.step_cost, dtype=torch.float64)


def kept_after(grid: Grid, dropped: Sequence[Sequence[int]], kept: float) -> Tensor:
    """Kept shares fp64 [S] when groups of sub-layers go in the order ``dropped`` until ``kept`` of all cost stays.

    The group at the boundary goes in part. What must stay of layer 0's attention counts as its cost.
    """
    costs = sublayer_costs(grid)
    least = torch.tensor(grid.minimum, dtype=torch.float64) / torch.tensor(grid.maximum)
    fractions, excess = torch.ones(len(costs), dtype=torch.float64), (1 - kept) * float(costs.sum())
    for group in dropped:
        chosen = list(group)
        room = float((costs[chosen] * (1 - least[chosen])).sum())
        share = min(1.0, excess / room) if room else 0.0
        fractions[chosen] = 1 - share * (1 - least[chosen])
        excess -= share * room
        if excess <= 0:
            break
    return fractions

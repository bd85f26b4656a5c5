"""What the methods share that drop whole layers or sub-layers: how far an order of removal reaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.grid import Grid


def sublayer_costs(grid: Grid) -> Tensor:
    """Parameters of every sub-layer at full width, fp64 [S]."""
    return torch.tensor(grid.maximum, dtype=torch.float64) * torch.tensor(grid.step_cost, dtype=torch.float64)


def removable(grid: Grid) -> Tensor:
    """Parameters that can go of every sub-layer, fp64 [S]: all, but of layer 0's attention, say, which keeps some."""
    least = torch.tensor(grid.minimum, dtype=torch.float64) * torch.tensor(grid.step_cost, dtype=torch.float64)
    return sublayer_costs(grid) - least


def kept_after(grid: Grid, dropped: Sequence[Sequence[int]], kept: float) -> Tensor:
    """Kept shares fp64 [S] when groups of sub-layers go in the order ``dropped`` until ``kept`` of all cost stays.

    The group at the boundary goes in part.
    """
    costs, rooms = sublayer_costs(grid), removable(grid)
    fractions, excess = torch.ones(len(costs), dtype=torch.float64), (1 - kept) * float(costs.sum())
    for group in dropped:
        chosen = list(group)
        room = float(rooms[chosen].sum())
        share = min(1.0, excess / room) if room else 0.0
        fractions[chosen] -= share * rooms[chosen] / costs[chosen].clamp_min(1)  # absent ones cost nothing
        excess -= share * room
        if excess <= 0:
            break
    return fractions

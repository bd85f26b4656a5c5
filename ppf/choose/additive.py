"""The policy that loses least if damages add up: what can be said of a budget before any policy was measured.

Every sub-layer's level has a damage, whatever the others keep. The projection (:mod:`ppf.choose.budget.projection`)
finds the policy of the least sum that meets the budget, by the multiplier of its cost: exactly, but for steps that pay
only together, and within what one step is worth of an integer program (tests/test_first.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.grid import Grid
from .budget.projection import Projector


class Additive(nn.Module):
    """Budget → policy of the least sum of damages; asked like an :class:`~ppf.choose.agent.Agent`."""

    damage: Tensor

    def __init__(self, grid: Grid, damage: Tensor | None = None):
        """``damage`` fp64 [S, K] of every level, 0 at the dense one; in any unit, for only its proportions count."""
        super().__init__()
        self.grid, self.projector = grid, Projector(grid)
        empty = torch.zeros(grid.sublayers, grid.levels, dtype=torch.float64)
        self.register_buffer("damage", empty if damage is None else damage.double())

    def utilities(self, ratio: Tensor) -> Tensor:
        """Utilities fp32 [B, S, K] for ratios [B], the same for all of them: the damages with their sign turned, in
        units of what removing a sub-layer costs on average."""
        worst = self.damage.amax(1).mean().clamp_min(torch.finfo(torch.float64).tiny)
        return -(self.damage / worst).float().expand(len(ratio), -1, -1)

    @torch.no_grad()
    def forward(self, ratio: Tensor) -> Tensor:
        """Levels int64 [B, S] for ratios [B]."""
        return self.projector(self.utilities(ratio), ratio)

    def total(self, levels: Tensor) -> Tensor:
        """Sums of damages fp64 [P] of levels int64 [P, S]."""
        return self.damage[torch.arange(self.grid.sublayers, device=levels.device), levels].sum(-1)

    @property
    def device(self) -> torch.device:
        return self.damage.device

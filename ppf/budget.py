"""Budgets: what a policy may cost, and the policies that cost exactly that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .grid import Grid
from .policy import Policy
from .projection import Projector, check_ratio, nearest


@dataclass(frozen=True)
class Budget:
    """A share ``ratio`` of the decoder's parameters to remove. Raises ``InputError`` if ``grid`` cannot give it."""

    grid: Grid
    ratio: float

    def __post_init__(self) -> None:
        check_ratio(self.ratio, self.grid)

    @property
    def kept(self) -> float:
        """The share of the decoder that may stay."""
        return 1 - self.ratio

    @cached_property
    def projector(self) -> Projector:
        return Projector(self.grid)

    def levels(self, utility: Tensor) -> Tensor:
        """Levels int64 [B, S] of the best policies by ``utility`` fp32 [B, S, K] that meet the budget."""
        return self.projector(utility, torch.full((len(utility),), self.ratio))

    def policy(self, fractions: Tensor) -> Policy:
        """The policy on the budget nearest to keeping ``fractions`` [S] of the sub-layers, or [L] of the layers.

        Fractions outside 0…1 are clamped; what they miss of the budget is made up by all sub-layers alike.
        """
        if len(fractions) == self.grid.structure.layers:
            fractions = torch.cat((fractions, fractions))
        wanted = fractions.float().nan_to_num(0).clamp(0, 1)[None]
        return self.grid.decode(self.levels(nearest(wanted, self.grid)))[0]

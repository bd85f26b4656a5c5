"""Budgets: what a policy may cost, in whatever unit the user asked, and the policies that cost exactly that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...model.grid import Grid
from ...model.policy import Policy
from .costs import Costs, parameters
from .projection import Projector, check_ratio, nearest, projector_of


@dataclass(frozen=True, eq=False)
class Budget:
    """``requested`` is what the user asked for under the name ``kind`` ("ratio", "memory-gb", …); ``target`` is the
    cost a policy shall have by ``costs``, their constant included."""

    grid: Grid
    kind: str
    requested: float
    costs: Costs
    target: float

    @property
    def kept(self) -> float:
        """The share of what policies can change that may stay."""
        return (self.target - self.costs.constant) / float(self.costs.table[:, -1].sum())

    @cached_property
    def projector(self) -> Projector:
        is_plain = self.costs.unit == "parameters"
        return projector_of(self.grid, torch.device("cpu")) if is_plain else Projector(self.grid, self.costs)

    def levels(self, utility: Tensor) -> Tensor:
        """Levels int64 [B, S] of the best policies by ``utility`` fp32 [B, S, K] that meet the budget."""
        target = torch.full((len(utility),), self.target - self.costs.constant, dtype=torch.float64)
        return self.projector.meet(utility, target.to(utility.device))

    def policy(self, fractions: Tensor) -> Policy:
        """The policy on the budget nearest to keeping ``fractions`` [S] of the sub-layers, or [L] of the layers.

        Fractions outside 0…1 are clamped; what they miss of the budget is made up by all sub-layers alike.
        """
        if len(fractions) == self.grid.structure.layers:
            fractions = torch.cat((fractions, fractions))
        wanted = fractions.float().nan_to_num(0).clamp(0, 1)[None]
        return self.grid.decode(self.levels(nearest(wanted, self.grid)))[0]

    def delivered(self, policy: Policy) -> float:
        """What ``policy`` costs, in the costs' unit."""
        return float(self.costs.of(self.grid.encode([policy]))[0])

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "requested": self.requested, "unit": self.costs.unit, "target": self.target}


def ratio_budget(grid: Grid, ratio: float) -> Budget:
    """A share ``ratio`` of the decoder's parameters is removed: the nearest the grid can give.

    Raises ``InputError`` for what is no share or more than the structure can give.
    """
    check_ratio(ratio, grid)
    return Budget(grid, "ratio", ratio, parameters(grid), (1 - ratio) * grid.structure.decoder_parameters)


def limit_budget(grid: Grid, kind: str, requested: float, costs: Costs, limit: float, scale: float = 1.0) -> Budget:
    """Policies that cost at most ``limit``, and as nearly that as the grid can give.

    ``scale`` turns the costs' unit into the one the user reads. Raises ``InputError``, with the range that can be had,
    for a limit outside it.
    """
    least, most = costs.range(grid)
    if not math.isfinite(limit) or not least <= limit < most:
        low, high = (f"{value / scale:.6g}" for value in (least, most))
        problem = "is more than the dense model needs" if limit >= most else "is less than the smallest policy needs"
        unit = "" if scale == 1 else f" in the unit of --{kind}"
        raise InputError(kind, requested, problem, f"Policies cost from {low} to below {high}{unit} ({costs.unit})")
    projector = Projector(grid, costs)
    # Of regular costs it delivers the nearest, up to half the cheapest step beyond the target: aim half a step below.
    margin = projector.cheapest / 2 if projector.is_regular else 0
    return Budget(grid, kind, requested, costs, max(limit - margin, least))

"""What every budget can do, and what those that are limits have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError
from ...model.grid import Grid
from ...model.policy import Policy
from .costs import Costs
from .projection import Projector, nearest

TOLERANCE = 0.05
"""How far a result may be from its prediction, or beyond the request, before the user is told."""

# Agents know ratios; for a budget in another unit this many are asked, and the predictor picks.
_ASKED = 64
_ROUNDING = 1e-9  # of sums of milliseconds
_LOWERED = 8  # times that a target is lowered for policies that came out above the limit


class Fitted(Protocol):
    """What budgets need to know of a run."""

    path: Path
    grid: Grid

    @property
    def model_path(self) -> Path: ...


class Budget(ABC):
    """What a policy may cost. ``requested`` is what the user asked for, in ``unit``; ``target`` is the cost a policy
    shall have by ``costs``, their constant included, and ``limit`` the most it may have."""

    name: ClassVar[str]
    """How it is asked for: the command line's option without its dashes."""
    unit: ClassVar[str]
    """Of what is requested and reported."""
    timed: ClassVar[bool] = False
    """Whether a result must run to be measured; else its shapes are enough."""

    def __init__(self, grid: Grid, requested: float, costs: Costs, target: float, limit: float = math.inf):
        self.grid, self.requested, self.costs, self.target, self.limit = grid, requested, costs, target, limit

    @classmethod
    @abstractmethod
    def of(cls, run: Fitted, requested: float, context: int) -> Budget:
        """The budget on ``run``; ``context`` is what a token attends to where that counts. Raises ``InputError``."""

    @abstractmethod
    def delivered(self, model: PreTrainedModel) -> float:
        """What a materialised ``model`` itself has, counted or timed, in ``unit``; counted ones ask for no weights
        (:func:`ppf.model.build.skeleton`)."""

    @abstractmethod
    def is_met(self, value: float) -> bool:
        """Whether ``value`` is what was asked for, give or take the tolerance."""

    @property
    def requested_ratio(self) -> float | None:
        """What was requested if that was a ratio."""
        return None

    @property
    def comes_to(self) -> float | None:
        """The ratio that comes to the same, which a search needs; None if there is none."""
        return None

    @property
    def kept(self) -> float:
        """The share of what policies can change that may stay."""
        return (self.target - self.costs.constant) / float(self.costs.table[:, -1].sum())

    @cached_property
    def projector(self) -> Projector:
        return Projector(self.grid, self.costs)

    def levels(self, utility: Tensor) -> Tensor:
        """Levels int64 [B, S] of the best policies by ``utility`` fp32 [B, S, K] that meet the budget."""
        target = torch.full((len(utility),), self.target - self.costs.constant, dtype=torch.float64)
        target = target.to(utility.device)
        levels = self.projector.meet(utility, target)
        for tries in range(_LOWERED + 1):
            over = self.costs.of(levels) - self.limit * (1 + _ROUNDING)
            if not (over > 0).any():
                break
            # Where steps are coarse the nearest policy may lie above; the cheapest of all is what is left at the end.
            lower = target - over - 1e-5 * self.projector.cheapest if tries < _LOWERED else torch.zeros_like(target)
            target = torch.where(over > 0, lower, target)
            levels = torch.where((over > 0)[:, None], self.projector.meet(utility, target), levels)
        return levels

    def candidates(self, agent: Any) -> Tensor:
        """Levels int64 [P, S] of policies that meet the budget, among them the best that ``agent`` knows: its answers
        to many ratios, moved onto the budget."""
        ratios = torch.linspace(0.02, min(0.9, self.grid.maximum_ratio), _ASKED, device=agent.device)
        return self.levels(agent.utilities(ratios)).unique(dim=0)

    def policy(self, fractions: Tensor) -> Policy:
        """The policy on the budget nearest to keeping ``fractions`` [S] of the sub-layers, or [L] of the layers.

        Fractions outside 0…1 are clamped; what they miss of the budget is made up by all sub-layers alike.
        """
        if len(fractions) == self.grid.structure.layers:
            fractions = torch.cat((fractions, fractions))
        wanted = fractions.float().nan_to_num(0).clamp(0, 1)[None]
        return self.grid.decode(self.levels(nearest(wanted, self.grid)))[0]

    def cost(self, policy: Policy) -> float:
        """What ``policy`` costs, in the costs' unit."""
        return float(self.costs.of(self.grid.encode([policy]))[0])

    def in_unit(self, cost: float) -> float:
        """A cost in the unit in which it was asked."""
        return cost

    def predicted(self, policy: Policy) -> float:
        """What ``policy`` has by the costs, in ``unit``."""
        return self.in_unit(self.cost(policy))

    def to_dict(self) -> dict[str, Any]:
        """What was asked, for JSON."""
        return {"kind": self.name, "unit": self.unit, "requested": self.requested}

    def report(self, policy: Policy, model: PreTrainedModel) -> dict[str, Any]:
        """What was requested, what the costs predict for ``policy``, and what ``model``, its materialised form, has.

        ``within_tolerance`` says that this is within 5 % of the prediction, and not more than 5 % beyond the request.
        """
        predicted, delivered = self.predicted(policy), self.delivered(model)
        off = delivered / predicted - 1 if predicted else None
        fine = (off is None or abs(off) <= TOLERANCE) and self.is_met(delivered)
        found = {"predicted": predicted, "delivered": delivered, "off": off, "within_tolerance": fine}
        return self.to_dict() | found | self.circumstances(model)

    def circumstances(self, model: PreTrainedModel) -> dict[str, Any]:
        """What else is to be said of where and how ``model`` was measured."""
        return {}


class LimitBudget(Budget):
    """Policies that cost at most ``limit``, and as nearly that as the grid can give."""

    def __init__(self, grid: Grid, requested: float, costs: Costs, limit: float):
        """Raises ``InputError``, with the range that can be had, for a limit outside it."""
        least, most = costs.range(grid)
        if not math.isfinite(limit) or not least <= limit < most:
            smallest, dense = (f"{self.in_unit(value):.6g}" for value in (least, most))
            remedy = f"Ask for something between {smallest} (the smallest policy) and {dense} (the dense model)"
            raise InputError(self.name, requested, f"is out of reach, in {self.unit}", remedy)
        projector = Projector(grid, costs)
        # Of regular costs it gives the nearest, up to half the cheapest step beyond the target: aim half a step below.
        margin = projector.cheapest / 2 if projector.is_regular else 0
        super().__init__(grid, requested, costs, max(limit - margin, least), limit)
        self.projector = projector

    def is_met(self, value: float) -> bool:
        return value <= self.requested * (1 + TOLERANCE)

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
from ...storage.sealed import Sealed
from .costs import Costs
from .figures import rounded
from .projection import Projector, nearest

TOLERANCE = 0.05
"""How far a result may be from its prediction, or beyond the request, before the user is told."""

# Agents know ratios; for a budget in another unit this many are asked, and the predictor picks.
_ASKED = 64
_DIGITS = range(6, 18)  # of figures that can be asked for


class Fitted(Protocol):
    """What budgets need to know of a run."""

    path: Path
    grid: Grid
    files: Sealed

    @property
    def model_path(self) -> Path: ...


class Budget(ABC):
    """What a policy may cost. ``requested`` is what the user asked for, in ``unit``; ``target`` is the cost a policy
    shall have by ``costs``, their constant included."""

    name: ClassVar[str]
    """How it is asked for: the command line's option without its dashes."""
    unit: ClassVar[str]
    """Of what is requested and reported."""
    timed: ClassVar[bool] = False
    """Whether a result must run to be measured; else its shapes are enough."""
    is_limit: ClassVar[bool] = False
    """Whether no policy may cost more than the target; else the nearest on either side is meant."""

    def __init__(self, grid: Grid, requested: float, costs: Costs, target: float):
        self.grid, self.requested, self.costs, self.target = grid, requested, costs, target

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
        return self.projector.meet(utility, target.to(utility.device), self.is_limit)

    def moved(self, fractions: Tensor, weight: Tensor | None = None) -> Tensor:
        """Levels int64 [B, S] of the policies on the budget nearest to keeping ``fractions`` fp32 [B, S], in which
        sub-layers count by their size, times ``weight`` [B, S] if given."""
        utility = nearest(fractions, self.grid)
        return self.levels(utility if weight is None else utility * weight[..., None])

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
    """Policies that are within what is requested, and as near to it as the grid can give."""

    is_limit = True
    upwards: ClassVar[bool] = False
    """Whether more of ``unit`` is what a smaller policy has."""
    quantum: ClassVar[float] = 1.0
    """What costs are whole multiples of, or are rounded up to: a power of two, so that no sum of them is rounded."""

    def __init__(self, grid: Grid, requested: float, costs: Costs, limit: float):
        """``limit`` is about the cost that comes to ``requested``. Raises ``InputError``, with the range that can be
        had, for what is outside it."""
        costs = costs.rounded_up(self.quantum)
        super().__init__(grid, requested, costs, limit)
        least, most = costs.range(grid)
        if not self.allows(self.in_unit(least)) or self.allows(self.in_unit(most)):
            raise InputError(self.name, requested, f"is out of reach, in {self.unit}", self._remedy(least, most))
        self.target = self._largest(limit)

    @cached_property
    def projector(self) -> Projector:
        return Projector(self.grid, self.costs)

    def allows(self, value: float) -> bool:
        """Whether ``value`` in ``unit`` is within what is requested."""
        return value >= self.requested if self.upwards else value <= self.requested

    def is_met(self, value: float) -> bool:
        return self.allows(value)

    def _largest(self, about: float) -> float:
        """The largest cost within the limit: the multiple of the quantum ``about`` there, which rounding has moved."""
        found = math.floor(about / self.quantum) + 1
        while not self.allows(self.in_unit(found * self.quantum)):
            found -= 1
        return found * self.quantum

    def _remedy(self, least: float, most: float) -> str:
        """What can be asked for; both figures are rounded to the side on which they can be had."""
        smallest, dense = self.in_unit(least), self.in_unit(most)
        if smallest == dense:
            return f"All policies of this model have {dense}: ask with another budget, such as --ratio"
        for digits in _DIGITS:  # more where the range is narrow
            low, high = rounded(smallest, digits, up=not self.upwards), rounded(dense, digits, up=self.upwards)
            if float(low) > float(high) if self.upwards else float(low) < float(high):
                break
        words = ("at most", "more") if self.upwards else ("at least", "less")
        return f"Ask for {words[0]} {low} (the smallest policy) and {words[1]} than {high} (the dense model)"

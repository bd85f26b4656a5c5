"""Puzzle (arXiv 2411.19146): replace one block at a time, add the scores up, and let an integer program choose."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array, vstack
from torch import Tensor

from ...choose.budget import Budget
from ...errors import InputError, PPFError
from ...model.grid import Grid
from ...model.policy import Policy
from ...model.structure import Structure
from .statistics import PeerStatistics


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """The policy of the least sum of damages that costs what the budget says.

    A level's damage is the true rise of log-perplexity with only this sub-layer pruned to it; interactions are ignored.
    With fewer evaluations than S·(K − 1) + 1, evenly spaced levels are measured and the rest interpolated.
    """
    return solve(damages(statistics, budget.grid), budget)


def damages(statistics: PeerStatistics, grid: Grid) -> list[Tensor]:
    """For every sub-layer the damage of each level from its minimum to its maximum, fp64; the same for all budgets."""
    movable = sum(high > low for low, high in zip(grid.minimum, grid.maximum, strict=True))
    each = int(statistics.meter.remaining - 1) // movable
    if each < 1:
        needed = movable + 1
        raise InputError("evaluations", statistics.meter.limit, "is too little for Puzzle", f"Use at least {needed}")
    measured = [_spaced(low, high, each) for low, high in zip(grid.minimum, grid.maximum, strict=True)]
    policies = [grid.dense()]
    for sublayer, levels in enumerate(measured):
        policies += [_only(grid, sublayer, level) for level in levels]
    dense, *values = statistics.meter.measure(policies)
    return [_interpolated(grid, s, levels, values, dense, measured) for s, levels in enumerate(measured)]


def _spaced(low: int, high: int, count: int) -> list[int]:
    """At most ``count`` levels of low…high − 1, evenly spaced, the lowest among them."""
    count = min(count, high - low)
    return sorted({low + index * (high - low) // count for index in range(count)})


def _only(grid: Grid, sublayer: int, level: int) -> Policy:
    levels = list(grid.maximum)
    levels[sublayer] = level
    return grid.decode(torch.tensor([levels]))[0]


def _interpolated(
    grid: Grid, sublayer: int, levels: list[int], values: list[float], dense: float, measured: list[list[int]]
) -> Tensor:
    start = sum(len(other) for other in measured[:sublayer])
    known = [value - dense for value in values[start : start + len(levels)]] + [0.0]
    low, high = grid.minimum[sublayer], grid.maximum[sublayer]
    return torch.from_numpy(np.interp(np.arange(low, high + 1), [*levels, high], known))


def solve(damage: list[Tensor], budget: Budget) -> Policy:
    """The policy of the least total damage whose cost meets the budget as nearly as other methods' (HiGHS)."""
    grid, unit = budget.grid, budget.projector.cheapest
    score = np.concatenate([d.numpy() for d in damage])
    levels = zip(budget.costs.table.numpy(), grid.minimum, grid.maximum, strict=True)
    cost = np.concatenate([row[low : high + 1] for row, low, high in levels]) / unit
    rows = vstack((block_diag([np.ones((1, len(d))) for d in damage], format="csr"), csr_array(cost[None])))
    low, high = (bound / unit for bound in _bounds(budget))
    while True:
        bounds = np.append(np.ones(len(damage)), low), np.append(np.ones(len(damage)), high)
        answer = milp(
            score, integrality=np.ones_like(score), bounds=Bounds(0, 1), constraints=LinearConstraint(rows, *bounds),
            options={"time_limit": 60.0, "mip_rel_gap": 1e-4},
        )  # fmt: skip
        if answer.x is None:
            raise PPFError(f"no policy meets the budget: {answer.message}")
        policy = grid.decode(torch.tensor([_chosen(answer.x, damage, grid.minimum)]))[0]
        if not budget.is_limit or budget.cost(policy) <= budget.target:
            return policy
        high -= 1e-6  # what HiGHS lets a constraint be off by


def _bounds(budget: Budget) -> tuple[float, float]:
    """The least and the most that a policy may cost, the constant left out: within half a step, or less than one step
    below a limit; where the grid does not give that, as near as the projection comes."""
    step, target = budget.projector.cheapest, budget.target
    off = abs(budget.cost(budget.policy(torch.full((budget.grid.structure.layers,), budget.kept))) - target)
    room = max(off, step if budget.is_limit else step / 2) * (1 + 1e-9)
    low, high = target - room, target if budget.is_limit else target + room
    return low - budget.costs.constant, high - budget.costs.constant


def _chosen(x: np.ndarray, damage: list[Tensor], minimum: tuple[int, ...]) -> list[int]:
    parts = np.split(x, np.cumsum([len(d) for d in damage])[:-1])
    return [low + int(part.argmax()) for low, part in zip(minimum, parts, strict=True)]

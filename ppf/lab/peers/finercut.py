"""FinerCut (arXiv 2405.18218): sub-layers go one at a time, always the one whose loss changes the model least."""

from __future__ import annotations

import torch

from ...choose.budget import Budget
from ...errors import InputError
from ...model.policy import Policy
from ...model.structure import Structure
from .dropping import kept_after, removable, sublayer_costs
from .statistics import PeerStatistics


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """Greedy removal by true evaluations of every remaining sub-layer; the last one goes in part, to meet the budget.

    The change of the model is measured as everybody's is here, by log-perplexity on the search text. Needs about
    2L + (2L − 1) + … evaluations, one term for each sub-layer that goes.
    """
    grid, rooms = budget.grid, removable(budget.grid).tolist()
    left, dropped = [s for s, room in enumerate(rooms) if room], []
    levels, excess = list(grid.maximum), (1 - budget.kept) * float(sublayer_costs(grid).sum())
    while excess > 0 and left:
        candidates = [_without(budget, levels, s) for s in left]
        if len(candidates) > statistics.meter.remaining:
            raise InputError(
                "evaluations", statistics.meter.limit, "end before the budget is met", "Give FinerCut more"
            )
        values = statistics.meter.measure(candidates)
        chosen = left.pop(values.index(min(values)))
        levels[chosen] = grid.minimum[chosen]
        dropped.append((chosen,))
        excess -= rooms[chosen]
    return budget.policy(kept_after(grid, dropped, budget.kept))


def _without(budget: Budget, levels: list[int], sublayer: int) -> Policy:
    """The policy of ``levels`` [S] with one sub-layer at its least width."""
    changed = [budget.grid.minimum[s] if s == sublayer else level for s, level in enumerate(levels)]
    return budget.grid.decode(torch.tensor([changed]))[0]

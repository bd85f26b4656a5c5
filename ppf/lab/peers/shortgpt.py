"""ShortGPT (arXiv 2403.03853): whole layers go, the least influential first."""

from __future__ import annotations

from ...choose.budget import Budget
from ...model.policy import Policy
from ...model.structure import Structure
from .dropping import kept_after
from .statistics import PeerStatistics


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """Drop layers by rising block influence 1 − cos(x_in, x_out); the last one in part, to meet the budget."""
    influence = [1 - seen.cosine for seen in statistics.activations]
    order = sorted(range(structure.layers), key=influence.__getitem__)
    groups = [(layer, structure.layers + layer) for layer in order]
    return budget.policy(kept_after(budget.grid, groups, budget.kept))

"""Random search: the best of as many random policies as there are evaluations."""

from __future__ import annotations

import torch

from ...choose.budget import Budget
from ...choose.candidates.sampling import random_fractions
from ...model.policy import Policy
from ...model.structure import Structure
from .statistics import PeerStatistics


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """The best of random policies from near uniform to very uneven; without evaluations, the first drawn."""
    generator = torch.Generator().manual_seed(statistics.seed)
    count = int(statistics.meter.remaining)
    fractions = random_fractions(budget.grid, torch.full((max(1, count),), 1 - budget.kept), generator)
    policies = list(dict.fromkeys(budget.grid.decode(budget.moved(fractions))))
    if count < 1:
        return policies[0]
    values = statistics.meter.measure(policies)
    return policies[values.index(min(values))]

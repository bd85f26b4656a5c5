"""Uniform: the same share of every sub-layer; or of every attention and of every FFN, with the better split."""

from __future__ import annotations

import torch

from ...choose.budget import Budget
from ...model.policy import Policy
from ...model.structure import Structure
from .dropping import sublayer_costs
from .statistics import PeerStatistics

# Kept shares of attention that are tried; the FFN's follow from the budget.
_SPLITS = 11


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """The policy nearest to keeping the same share of every sub-layer."""
    return budget.policy(torch.full((structure.layers,), budget.kept))


def allocate_split(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """The best, by true evaluations, of policies with one share for all attention and one for all FFN sub-layers.

    Uses as many evaluations as there are different splits, at most 11 and at most what is given.
    """
    attention, ffn = (float(costs.sum()) for costs in sublayer_costs(budget.grid).chunk(2))
    kept = budget.kept * (attention + ffn)
    low, high = max(0.0, (kept - ffn) / attention), min(1.0, kept / attention)
    shares = torch.linspace(low, high, max(1, min(_SPLITS, int(statistics.meter.remaining))))
    rests = (kept - shares * attention) / max(1.0, ffn)
    fractions = torch.stack((shares, rests), 1).repeat_interleave(structure.layers, 1)  # [splits, S]
    policies = list(dict.fromkeys(map(budget.policy, fractions)))
    values = statistics.meter.measure(policies)
    return policies[values.index(min(values))]

"""Uniform: the same share of every sub-layer; or of every attention and of every FFN, with the better split."""

from __future__ import annotations

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...model.policy import Policy
from ...model.structure import Structure
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
    attention = structure.kv_groups * structure.kv_group_cost
    ffn = structure.channels * structure.channel_cost
    kept = budget.kept * (attention + ffn)
    low, high = max(0.0, (kept - ffn) / attention), min(1.0, kept / attention)
    shares = torch.linspace(low, high, max(1, min(_SPLITS, int(statistics.meter.remaining))))
    policies = list(dict.fromkeys(budget.policy(_fractions(structure, kept, share)) for share in shares))
    values = statistics.meter.measure(policies)
    return policies[values.index(min(values))]


def _fractions(structure: Structure, kept: float, share: Tensor) -> Tensor:
    """Kept shares [S] if every attention keeps ``share`` and the FFNs the rest of ``kept`` parameters a layer."""
    rest = (kept - share * structure.kv_groups * structure.kv_group_cost) / (
        structure.channels * structure.channel_cost
    )
    return torch.stack((share, rest)).repeat_interleave(structure.layers)

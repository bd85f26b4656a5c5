"""ATP (arXiv 2502.14770): pruning ratios that rise from layer to layer in an arithmetic progression.

As is, from the paper and its published code (github.com/wzhuang-xmu/ATP): s_i = S − β(L − 1)/2 + β(i − 1) for layer
i = 1…L, the same for all matrices of a layer; 0 < β ≤ min(2S/(L − 1), 2(1 − S)/(L − 1)), so that every s_i is a ratio;
of β = 0.002, 0.004, … the one whose model has the lowest perplexity.

Adapted: s_i is a share of a layer's kv-groups and FFN channels, where the paper prunes single weights. Where layers
differ, (L − 1)/2 is the mean position weighted by their parameters, which keeps the mean ratio at S. β is chosen on the
search text and costs an evaluation each; the authors' code takes the test text, for nothing. With fewer evaluations
than there are values of β, evenly spaced ones are measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...model.policy import Policy
from ...model.structure import Structure
from .layers import mean_over_layers
from .statistics import PeerStatistics

_STEP = 0.002


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """The best of the progressions by true evaluations."""
    ratio = 1 - budget.kept
    found = differences(ratio, structure, max(1, int(statistics.meter.remaining)))
    policies = list(dict.fromkeys(budget.policy(1 - rates(ratio, difference, structure)) for difference in found))
    values = statistics.meter.measure(policies)
    return policies[values.index(min(values))]


def rates(ratio: float, difference: float, structure: Structure) -> Tensor:
    """Pruning ratios fp64 [L] that rise by ``difference`` from layer to layer; their mean is ``ratio``."""
    place = torch.arange(structure.layers, dtype=torch.float64)
    return ratio + difference * (place - mean_over_layers(place, structure))


def differences(ratio: float, structure: Structure, most: int) -> list[float]:
    """At most ``most`` values of β, of 0.002, 0.004, … up to the largest that leaves every ratio in 0…1; the last one
    is always among them. 0 where not even the first does."""
    middle = float(mean_over_layers(torch.arange(structure.layers, dtype=torch.float64), structure))
    sides = (ratio, middle), (1 - ratio, structure.layers - 1 - middle)
    count = int(min((room / side for room, side in sides if side), default=0.0) / _STEP + 1e-9)
    most = min(most, count)
    return [_STEP * (count * (index + 1) // most) for index in range(most)] or [0.0]

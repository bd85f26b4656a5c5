"""UniQL (arXiv 2512.03383): pruning ratios from a softmax over the layers' influence."""

from __future__ import annotations

import torch

from ...choose.budget import Budget
from ...model.policy import Policy
from ...model.structure import Structure
from .layers import mean_over_layers
from .statistics import PeerStatistics

_TEMPERATURE = 0.1  # ε
_MOST = 0.85  # no layer loses more


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """φ_l = L·φ·softmax(−(1 − cos_l)/ε), at most 0.85. What the clamp leaves over, the original never removes (it
    under-delivers); here the projection spreads it over all layers, so that the budget is met."""
    influence = 1 - torch.tensor([seen.cosine for seen in statistics.activations], dtype=torch.float64)
    share = torch.softmax(-influence / _TEMPERATURE, 0)
    ratio = (1 - budget.kept) * share / mean_over_layers(share, structure)  # the mean is 1/L where layers are alike
    return budget.policy(1 - ratio.clamp_max(_MOST))

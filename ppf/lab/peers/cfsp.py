"""CFSP (arXiv 2409.13199), its coarse part: layers that turn the residual stream further keep more."""

from __future__ import annotations

import torch

from ...choose.budget import Budget
from ...model.policy import Policy
from ...model.structure import Structure
from .layers import mean_over_layers
from .statistics import PeerStatistics

# The authors sum angles over 128 · 2,048 tokens and divide by 10⁴ before the sigmoid.
_SCALE = 128 * 2048 / 1e4
_MARGIN = 1.05


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """keep_l ∝ sigmoid(I_l − Ī), I_l the angle between a layer's input and output; attention and FFN alike.

    The authors prune only the FFN. Where the best layer would keep more than all of it, differences are shrunk, as in
    their code.
    """
    angle = torch.tensor([seen.angle for seen in statistics.activations], dtype=torch.float64)
    importance = torch.sigmoid(_SCALE * (angle - mean_over_layers(angle, structure)))
    mean, most = mean_over_layers(importance, structure), importance.max()
    if most / mean * budget.kept >= 1:
        importance = mean + (importance - mean) * mean * (1 / budget.kept - 1) / (most - mean) / _MARGIN
    return budget.policy(importance / mean_over_layers(importance, structure) * budget.kept)

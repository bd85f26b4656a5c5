"""Adapt-Pruner (arXiv 2502.03460): many small steps, in each of which the layers that turn the residual stream less
lose more.

As is, from the paper's published code (github.com/research4pan/AdaptPruner): a layer's importance is −cos(x_in, x_out),
the mean over tokens, shifted to mean 0 over the layers and scaled to a largest magnitude of 1. A step raises its
pruning ratio by 1/50 − A·importance, A = 0.02, within 0…0.99, attention and FFN alike; then importance is measured
anew, on the model as it is pruned by now. Steps end when the budget is reached.

Adapted: units go by the run's ranking (the authors' by Taylor) and widths are the grid's nearest, between steps without
a refit. The last step is as long as what is missing (the authors' goes beyond). Means are weighted by the layers'
parameters, which changes nothing where these are alike. The training that the authors put between steps is recovery,
which no method here has. Every step reads the text that all methods observe; no true evaluation is spent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...model.grid import Grid
from ...model.policy import Policy
from ...model.structure import Structure
from .activations import LayerActivations
from .layers import layer_costs, mean_over_layers
from .statistics import PeerStatistics

_STEPS = 50  # from the whole model to none
_AMPLITUDE = 0.02  # A
_MOST = 0.99  # no layer loses more
_SAME = 1e-9  # cosines that differ by less are rounded differently, no more


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """The ratios that the steps end with; what their bounds miss of the budget, the projection makes up."""
    way = (1 - budget.kept) * _STEPS
    ratios, seen = torch.zeros(structure.layers, dtype=torch.float64), statistics.activations
    for step in range(math.ceil(way - 1e-9)):
        if step:
            seen = statistics.observed(_nearest(1 - ratios, budget.grid))
        rise = 1 / _STEPS - _AMPLITUDE * importance(seen, structure)
        ratios = (ratios + min(1.0, way - step) * rise).clamp(0, _MOST)
    return budget.policy(1 - ratios)


def importance(seen: Sequence[LayerActivations], structure: Structure) -> Tensor:
    """−cos(x_in, x_out) of every layer, shifted to mean 0 and scaled to a largest magnitude of 1, fp64 [L]; 0 for a
    layer that has no units, and where all are alike."""
    similarity = torch.tensor([layer.cosine for layer in seen], dtype=torch.float64)
    found = (mean_over_layers(similarity, structure) - similarity) * (layer_costs(structure) > 0)
    return found / found.abs().max().clamp_min(_SAME)


def _nearest(kept: Tensor, grid: Grid) -> Policy:
    """The policy nearest to keeping the shares ``kept`` [L] of the layers, whatever it costs."""
    highest, lowest = torch.tensor(grid.maximum), torch.tensor(grid.minimum)
    levels = (torch.cat((kept, kept)) * highest).round().long()
    return grid.decode(levels.clamp(lowest, highest)[None])[0]

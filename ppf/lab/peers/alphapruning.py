"""AlphaPruning (arXiv 2410.10912): layers whose weight spectra have heavier tails keep more. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...model.policy import Policy
from ...model.structure import Structure
from ...model.weights import LayerWeights
from .statistics import PeerStatistics

_SPREAD = 0.3  # ε: ratios lie between 1 − ε and 1 + ε times their mean


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """Pruning ratios linear in the layer's mean tail index α, from 1 − ε to 1 + ε, scaled to the budget."""
    alpha = torch.tensor([_layer_alpha(layer) for layer in statistics.weights.layers])
    position = (alpha - alpha.min()) / (alpha.max() - alpha.min()).clamp_min(1e-30)
    ratio = 1 - _SPREAD + 2 * _SPREAD * position
    return budget.policy(1 - ratio * (1 - budget.kept) / ratio.mean())


def _layer_alpha(layer: LayerWeights) -> float:
    matrices = layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down
    return float(torch.stack([tail_index(matrix) for matrix in matrices]).mean())


def tail_index(matrix: Tensor) -> Tensor:
    """Hill's estimate of the power-law exponent of the larger half of the eigenvalues λ of WᵀW, fp64 scalar:
    α = 1 + n / (Σ ln λ_i − n ln λ_k), the sum over the n eigenvalues above the median one, λ_k."""
    values = torch.linalg.svdvals(matrix.float()).double().square().clamp_min(1e-30)  # falling
    tail = len(values) // 2
    return 1 + tail / (values[:tail].log().sum() - tail * values[tail].log()).clamp_min(1e-30)

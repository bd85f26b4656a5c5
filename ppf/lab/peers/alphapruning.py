"""AlphaPruning (arXiv 2410.10912): layers whose weight spectra have heavier tails keep more. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...model.decoder import Decoder
from ...model.policy import Policy
from ...model.structure import Structure
from .layers import mean_over_layers, positions, projections
from .statistics import PeerStatistics

_SPREAD = 0.3  # ε: ratios lie between 1 − ε and 1 + ε times their mean


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """Pruning ratios linear in the layer's mean tail index α, from 1 − ε to 1 + ε, scaled to the budget."""
    alpha = [_layer_alpha(statistics.decoder, index) for index in range(structure.layers)]
    ratio = 1 - _SPREAD + 2 * _SPREAD * positions(alpha)
    return budget.policy(1 - ratio * (1 - budget.kept) / mean_over_layers(ratio, structure))


def _layer_alpha(decoder: Decoder, index: int) -> float | None:
    """Mean tail index of a layer's projections; None if it has none."""
    found = [tail_index(matrix) for _, _, matrix in projections(decoder, index)]
    return float(torch.stack(found).mean()) if found else None


def tail_index(matrix: Tensor) -> Tensor:
    """Hill's estimate of the power-law exponent of the larger half of the eigenvalues λ of WᵀW, fp64 scalar:
    α = 1 + n / (Σ ln λ_i − n ln λ_k), the sum over the n eigenvalues above the median one, λ_k."""
    values = torch.linalg.svdvals(matrix.float()).double().square().clamp_min(1e-30)  # falling
    tail = len(values) // 2
    return 1 + tail / (values[:tail].log().sum() - tail * values[tail].log()).clamp_min(1e-30)

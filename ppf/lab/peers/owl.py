"""OWL (arXiv 2310.05175): layers with more outliers keep more."""

from __future__ import annotations

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...model.policy import Policy
from ...model.structure import Structure
from .layers import mean_over_layers, positions, projections
from .statistics import PeerStatistics

_OUTLIER = 5.0  # M: an outlier is M times the layer's mean
_SPREAD = 0.08  # λ: layers' kept shares differ by at most 2λ


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """keep_l = 2λ(LOD_l − min)/(max − min) − mean + kept, LOD_l the layer's outlier distribution: the share of its
    |W|·‖x‖ entries above M times their mean."""
    share = 2 * _SPREAD * positions([_outlier_share(statistics, index) for index in range(structure.layers)])
    return budget.policy(share - mean_over_layers(share, structure) + budget.kept)


def _outlier_share(statistics: PeerStatistics, index: int) -> float | None:
    """Layer outlier distribution of all projections of one layer together; None if it has none."""
    decoder, read, inner = statistics.decoder, statistics.activations[index].inputs, statistics.moments[index]
    parts = []
    for kind, name, matrix in projections(decoder, index):
        is_output = name == decoder.family.parts[kind].output_name
        parts.append(_metric(matrix, inner.of(kind).second_moment if is_output else read[kind]))
    if not parts:
        return None
    metric = torch.cat(parts)
    return float((metric > _OUTLIER * metric.mean()).double().mean())


def _metric(matrix: Tensor, second_moment: Tensor) -> Tensor:
    """|W_ij|·‖x_j‖ of [out, in], flattened; ‖x_j‖ up to a factor that all projections share."""
    return (matrix.float().abs() * second_moment.to(matrix.device).float().sqrt()).flatten()

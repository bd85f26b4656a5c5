"""OWL (arXiv 2310.05175): layers with more outliers keep more."""

from __future__ import annotations

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...model.policy import Policy
from ...model.structure import Structure
from .statistics import PeerStatistics

_OUTLIER = 5.0  # M: an outlier is M times the layer's mean
_SPREAD = 0.08  # λ: layers' kept shares differ by at most 2λ


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """keep_l = 2λ(LOD_l − min)/(max − min) − mean + kept, LOD_l the layer's outlier distribution: the share of its
    |W|·‖x‖ entries above M times their mean."""
    outliers = torch.tensor([_outlier_share(statistics, index) for index in range(structure.layers)])
    spread = (outliers.max() - outliers.min()).clamp_min(1e-30)
    share = 2 * _SPREAD * (outliers - outliers.min()) / spread
    return budget.policy(share - share.mean() + budget.kept)


def _outlier_share(statistics: PeerStatistics, index: int) -> float:
    """Layer outlier distribution of all seven projections of one layer together."""
    w, seen = statistics.weights.layers[index], statistics.activations[index]
    attention, ffn = statistics.moments[index]
    inputs = [(m, seen.attention_input) for m in (w.q, w.k, w.v)] + [(m, seen.ffn_input) for m in (w.gate, w.up)]
    inputs += [(w.o, attention.second_moment), (w.down, ffn.second_moment)]
    metric = torch.cat([_metric(matrix, second) for matrix, second in inputs])
    return float((metric > _OUTLIER * metric.mean()).double().mean())


def _metric(matrix: Tensor, second_moment: Tensor) -> Tensor:
    """|W_ij|·‖x_j‖ of [out, in], flattened; ‖x_j‖ up to a factor that all projections share."""
    return (matrix.float().abs() * second_moment.to(matrix.device).float().sqrt()).flatten()

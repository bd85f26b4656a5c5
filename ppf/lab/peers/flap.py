"""FLAP (arXiv 2312.11983): one global threshold over standardised scores, structure "AL-AM"."""

from __future__ import annotations

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...fitting.calibration import Moments
from ...fitting.ranking.scores import Scored, flap_wifv
from ...model.policy import Policy
from ...model.structure import Structure
from .statistics import PeerStatistics


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """Keep the units with the highest standardised scores until their costs fill the budget.

    Scores are WIFV, Var(x_j)·‖W[:,j]‖₂², standardised within each layer; the attention's are squared first and then
    averaged over a kv-group. Each unit counts with its cost, (2g+2)·d/3 channels for a kv-group.
    """
    weights, moments = statistics.weights.layers, statistics.moments
    attention = torch.stack([_scores(w.o, m).square() for w, (m, _) in zip(weights, moments, strict=True)])
    ffn = torch.stack([_scores(w.down, m) for w, (_, m) in zip(weights, moments, strict=True)])
    groups = _standardised(attention).view(structure.layers, structure.kv_groups, -1).mean(-1)
    kept = _above_threshold(groups, _standardised(ffn), structure, budget.kept)
    return budget.policy(torch.cat([k.double().mean(1) for k in kept]))


def _above_threshold(groups: Tensor, channels: Tensor, structure: Structure, kept: float) -> tuple[Tensor, Tensor]:
    """Which kv-groups [L, G] and channels [L, C] stand above the threshold at which ``kept`` of all cost stays."""
    scores = torch.cat((groups.flatten(), channels.flatten()))
    cost = torch.full_like(scores, structure.channel_cost, dtype=torch.float64)
    cost[: groups.numel()] = structure.kv_group_cost
    order = scores.argsort(descending=True)
    filled = cost[order].cumsum(0)
    threshold = scores[order[(filled - kept * cost.sum()).abs().argmin()]]
    return groups >= threshold, channels >= threshold


def _scores(output: Tensor, moments: Moments) -> Tensor:
    return flap_wifv(Scored(output.cpu(), moments, ()))


def _standardised(scores: Tensor) -> Tensor:
    """Scores [L, n] with mean 0 and deviation 1 in each layer; a layer of equal scores becomes all 0."""
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True).clamp_min(1e-30)

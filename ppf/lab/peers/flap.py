"""FLAP (arXiv 2312.11983): one global threshold over standardised scores, structure "AL-AM"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...families import KINDS
from ...fitting.ranking.scores import Scored, flap_wifv
from ...model.policy import Policy
from ...model.structure import Structure
from .statistics import PeerStatistics


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """Keep the units with the highest standardised scores until their costs fill the budget.

    Scores are WIFV, Var(x_j)·‖W[:,j]‖₂², standardised within each layer; the attention's are squared first and then
    averaged over a kv-group. Each unit counts with its cost, (2g+2)·d/3 channels for a kv-group without biases.
    """
    # Layer by layer, for these may stream; then by sub-layer.
    layers = [{kind: _unit_scores(statistics, kind, index) for kind in KINDS} for index in range(structure.layers)]
    scores = [layer[kind] for kind in KINDS for layer in layers]
    kept = above_threshold(scores, [sublayer.cost for sublayer in structure.sublayers], budget.kept)
    return budget.policy(torch.tensor([float(k.double().mean()) if len(k) else 0.0 for k in kept]))


def above_threshold(scores: Sequence[Tensor], costs: Sequence[int], kept: float) -> list[Tensor]:
    """Of every sub-layer, bool [its units]: which units stand above the threshold at which ``kept`` of all cost stays.
    ``scores`` [its units] and the ``costs`` of one unit are by sub-layer."""
    every = torch.cat(list(scores))
    cost = torch.tensor(costs, dtype=torch.float64).repeat_interleave(torch.tensor([len(s) for s in scores]))
    order = every.argsort(descending=True)
    filled = cost[order].cumsum(0)
    threshold = every[order[(filled - kept * cost.sum()).abs().argmin()]]
    return [part >= threshold for part in scores]


def _unit_scores(statistics: PeerStatistics, kind: str, index: int) -> Tensor:
    """Standardised scores of the units of one sub-layer, fp32; none where there is no such sub-layer."""
    sublayer, moments = statistics.grid.structure.of(kind)[index], statistics.moments[index].of(kind)
    if moments is None:
        return torch.zeros(0)
    scores = flap_wifv(Scored(statistics.decoder.output(index, kind).cpu(), moments, ()))
    scores = _standardised(scores.square() if kind == "attention" else scores)
    return scores.view(sublayer.units, -1).mean(-1)


def _standardised(scores: Tensor) -> Tensor:
    """Scores [n] with mean 0 and deviation 1; all 0 where they are equal."""
    return (scores - scores.mean()) / scores.std(correction=min(1, len(scores) - 1)).clamp_min(1e-30)

"""How good predictions are, within one ratio: ranks, errors, what picking by them costs, whether intervals hold."""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor

# 90 % of a normal distribution lie within so many standard deviations.
NINETY = 1.645
_TOP = 10


def scores(mean: Tensor, truth: Tensor, std: Tensor | None = None) -> dict[str, Any]:
    """Scores of predicted log-perplexities [N] (nats) against true ones, for policies of one ratio.

    ``regret`` is in perplexity: the truly best of the ten that look best, minus the truly best of all. ``spread`` is
    the truth's standard deviation, which errors and ranks are to be read against; ``coverage`` the share of truths
    within the 90 % intervals. Rank correlations are None where all predictions are equal.
    """
    mean, truth = mean.double().cpu(), truth.double().cpu()
    error = mean - truth
    picked = truth[mean.argsort(stable=True)[:_TOP]].min()
    constant = bool((mean == mean[0]).all() or (truth == truth[0]).all())
    found: dict[str, Any] = {
        "policies": len(truth),
        "spearman": None if constant else float(spearmanr(mean, truth).statistic),
        "kendall": None if constant else float(kendalltau(mean, truth).statistic),
        "mse": float(error.square().mean()),
        "mae": float(error.abs().mean()),
        "regret": float(picked.exp() - truth.min().exp()),
        "spread": float(truth.std(correction=0)),
    }
    if std is not None:
        found["coverage"] = float((error.abs() <= NINETY * std.double().cpu()).double().mean())
    return found


def by_ratio(mean: Tensor, truth: Tensor, group: Tensor, ratios: list[float], std: Tensor | None = None) -> list[dict]:
    """:func:`scores` of every ratio; ``group`` int64 [N] is each policy's index into ``ratios``."""
    found = []
    for index, ratio in enumerate(ratios):
        rows = group == index
        found.append({"ratio": ratio} | scores(mean[rows], truth[rows], None if std is None else std[rows]))
    return found


def stacked(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors one after the other, and the index of the part that each row came from."""
    return torch.cat(parts), torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])

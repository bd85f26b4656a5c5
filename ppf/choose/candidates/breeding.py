"""Breeding: an evolution of candidate policies in the predictor's opinion, at many budgets at once.

Every budget is an island with a population of its own. Offspring come from mutation and from crossing two parents;
every few generations an island also mutates its neighbours' best, moved to its own budget: good policies of nearby
sizes look alike. Thousands of candidates cost one batched prediction a generation and no true evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ...model.grid import Grid
from ..budget.projection import projector_of
from ..predictor import Predictor
from .sampling import mutate

Judge = Callable[[Tensor], Tensor]
"""Levels int64 [P, S] to what is minimised, fp32 [P]."""

_MIGRATION = 4  # generations between visits of the neighbouring islands


@dataclass(frozen=True)
class Effort:
    """Generations of ``offspring`` candidates an island, of which the best ``keep`` survive."""

    generations: int = 24
    offspring: int = 48
    keep: int = 16


def cautious(predictor: Predictor, caution: float | Tensor) -> Judge:
    """Predicted log-perplexity plus ``caution`` standard deviations; a negative caution seeks the unknown.

    ``caution`` may be fp32 [R], one for each island: candidates then come in R blocks of equal size, as
    :func:`breed` passes them.
    """

    def judge(levels: Tensor) -> Tensor:
        prediction = predictor(levels)
        weight = caution
        if isinstance(weight, Tensor):
            weight = weight.to(prediction.mean.device).repeat_interleave(len(levels) // len(weight))
        return prediction.mean + weight * prediction.std

    return judge


def move(levels: Tensor, grid: Grid, ratio: Tensor, ceiling: bool = False) -> Tensor:
    """Levels int64 [B, S] moved to the budgets of ``ratio`` [B], every sub-layer as little as possible; with
    ``ceiling`` they never keep more than these leave."""
    if not len(levels):
        return levels
    projector = projector_of(grid, levels.device)
    return projector.nearest(levels / projector.top, ratio, ceiling=ceiling)


def breed(
    start: Tensor, ratio: Tensor, judge: Judge, grid: Grid, generator: Generator, effort: Effort | None = None,
    ceiling: bool = False,
) -> Tensor:  # fmt: skip
    """Populations int64 [R, keep, S], best first and without repetitions, bred from ``start`` [R, P, S].

    ``ratio`` [R] is every island's budget, which its policies in ``start`` meet already; with ``ceiling``, none keeps
    more than it leaves. The device is that of ``start``; the same generator state gives the same result.
    """
    effort = effort or Effort()
    pool, value = _survivors(start, _judged(judge, start), effort.keep)
    for generation in range(1, effort.generations + 1):
        parents = _parents(pool, effort.offspring, generator)
        if len(pool) > 1 and generation % _MIGRATION == 0:
            parents = torch.cat((parents, pool[:, :2].roll(1, 0), pool[:, :2].roll(-1, 0)), 1)
        budget = ratio.repeat_interleave(parents.shape[1])
        children = mutate(parents.flatten(0, 1), grid, generator, ratio=budget, ceiling=ceiling)
        children = children.view(parents.shape)
        everyone = torch.cat((pool, children), 1)
        pool, value = _survivors(everyone, torch.cat((value, _judged(judge, children)), 1), effort.keep)
    return pool


def _judged(judge: Judge, levels: Tensor) -> Tensor:
    return judge(levels.flatten(0, 1)).to(levels.device).view(levels.shape[:2])


def _parents(pool: Tensor, count: int, generator: Generator) -> Tensor:
    """``count`` parents of every island, int64 [R, count, S]; half of them have each sub-layer from one of two."""
    islands, size, sublayers = pool.shape

    def drawn() -> Tensor:
        chosen = torch.randint(size, (islands, count), generator=generator).to(pool.device)
        return pool.gather(1, chosen[..., None].expand(-1, -1, sublayers))

    crossed = torch.rand((islands, count, sublayers), generator=generator) < 0.5
    crossed[:, count // 2 :] = False
    return torch.where(crossed.to(pool.device), drawn(), drawn())


def _survivors(pool: Tensor, value: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The best ``keep`` distinct policies of every island [R, keep, S] and their values; repetitions come last."""
    order = value.argsort(dim=1, stable=True)
    pool, value = pool.gather(1, order[..., None].expand_as(pool)), value.gather(1, order)
    # Twins share a value, so they are neighbours now; only a chance tie of others can hide a pair.
    twin = torch.zeros_like(value, dtype=torch.bool)
    twin[:, 1:] = (pool[:, 1:] == pool[:, :-1]).all(-1)
    order = twin.int().argsort(dim=1, stable=True)[:, :keep]
    value = value.masked_fill(twin, torch.inf).gather(1, order)
    return pool.gather(1, order[..., None].expand(-1, -1, pool.shape[2])), value

"""Evolution by level swaps on true evaluations: plain, and in stages as EvoPress, DarwinLM and Týr run it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ...choose.budget import Budget
from ...choose.candidates.sampling import swapped
from ...model.policy import Policy
from ...model.structure import Structure
from .statistics import PeerStatistics

# Plain: the parents kept, offspring measured at once (their parents do not know of each other's results).
_PARENTS, _OFFSPRING = 8, 8
# Staged: offspring of one parent a generation, and the survivors of each stage with the tokens it measures on.
_BROOD = 128
_STAGES = ((16, 2_048), (4, 16_384), (1, 131_072))
_PATIENCE = 50  # fruitless draws of a generation, after which there are no new policies near the parents

Measure = Callable[[list[Policy]], list[float]]


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """Elitist (8 + 8) evolution from the uniform policy, 1 to 3 level swaps an offspring, every one truly measured."""
    return evolve(statistics, budget, int(statistics.meter.remaining), statistics.meter.measure)


def evolve(statistics: PeerStatistics, budget: Budget, count: int, measure: Measure) -> Policy:
    """The best of ``count`` different policies that elitist evolution scores with ``measure`` (lower is better)."""
    generator = torch.Generator().manual_seed(statistics.seed)
    start = budget.policy(torch.full((budget.grid.structure.layers,), budget.kept))
    known = dict(zip([start], measure([start]), strict=True))
    while len(known) < count:
        parents = sorted(known, key=known.__getitem__)[:_PARENTS]
        young = _offspring(parents, budget, min(_OFFSPRING, count - len(known)), generator, set(known))
        if not young:
            break
        known |= zip(young, measure(young), strict=True)
    return min(known, key=known.__getitem__)


def allocate_staged(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """(1 + λ) evolution as in EvoPress (arXiv 2410.14649): each generation's 128 offspring are measured on 2k tokens,
    the best 16 on 16k, the best 4 of these on 128k (or all there are), where the parent competes with them.

    Fitness is log-perplexity; the originals take the divergence from the dense model.
    """
    generator, meter = torch.Generator().manual_seed(statistics.seed), statistics.meter
    parent = budget.policy(torch.full((structure.layers,), budget.kept))
    stages = [stage for stage in _STAGES if stage[0] == 1 or meter.cost(stage[1]) < 1]
    while (count := _affordable(stages, statistics)) > 1:
        brood = _offspring([parent], budget, count, generator, {parent})
        if not brood:
            break
        for survivors, tokens in stages:
            competing = brood + ([parent] if survivors == 1 else [])
            values = meter.measure(competing, tokens)
            best = sorted(range(len(competing)), key=values.__getitem__)
            brood = [competing[index] for index in best[:survivors]]
        parent = brood[0]
    return parent


def _affordable(stages: list[tuple[int, int]], statistics: PeerStatistics) -> int:
    """The largest brood, 128 or a half, a quarter… of it, that the remaining evaluations can see through all stages."""
    count = _BROOD
    while count > 1 and _generation_cost(count, stages, statistics) > statistics.meter.remaining:
        count //= 2
    return count


def _generation_cost(count: int, stages: list[tuple[int, int]], statistics: PeerStatistics) -> float:
    """Evaluations that one generation of ``count`` offspring takes, the parent's in the last stage among them."""
    cost = statistics.meter.cost(stages[-1][1])
    for survivors, tokens in stages:
        cost += count * statistics.meter.cost(tokens)
        count = min(count, survivors)
    return cost


def _offspring(
    parents: list[Policy], budget: Budget, count: int, generator: Generator, known: set[Policy]
) -> list[Policy]:
    """``count`` new policies, each one to three level swaps away from a random parent; fewer if there are none."""
    levels, young = budget.grid.encode(parents), {}
    for _ in range(_PATIENCE):
        chosen: Tensor = torch.randint(len(levels), (count,), generator=generator)
        mutants = budget.moved(*swapped(levels[chosen], budget.grid, generator))
        young |= dict.fromkeys(policy for policy in budget.grid.decode(mutants) if policy not in known)
        if len(young) >= count:
            break
    return list(young)[:count]

"""What to measure next: the proposals of the fit loop, where the agent goes and around it.

Round 0 measures random and uniform policies over all ratios. Every later round mixes the agent's own answers (there the
predictor must be right), the same with noise, and neighbours of the best measured policies that the predictor likes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from .agent import Agent
from .errors import InputError, PPFError
from .experience import Evaluation
from .grid import Grid
from .policy import Policy
from .predictor import Predictor
from .sampling import RATIO_RANGE, mutate, random_levels, random_ratios, uniform_policy

# Share of a round that comes from the agent itself, from the agent with noise; the rest are screened neighbours.
_GREEDY, _NOISY = 0.4, 0.3
_NEIGHBOURS = 32  # candidates screened per proposal
_PATIENCE = 60  # fruitless draws after which a small model is taken to have no new policies left


def check_evaluations(evaluations: int, grid: Grid) -> None:
    """Raise ``InputError`` unless ``grid`` has at least four times as many policies as shall be measured."""
    policies = math.prod(high - low + 1 for low, high in zip(grid.minimum, grid.maximum, strict=True))
    if evaluations > policies // 4:
        remedy = f"Use at most {policies // 4}, or a smaller --ffn-multiple"
        raise InputError("evaluations", evaluations, f"is too much for a model with {policies} policies", remedy)


def initial_proposals(grid: Grid, count: int, seed: int) -> list[tuple[Policy, str]]:
    """``count`` distinct policies with their source: the dense and five uniform ones, the rest random."""
    generator = torch.Generator().manual_seed(seed)
    ratios = [r for r in (0.1, 0.2, 0.3, 0.4, 0.5) if r <= grid.maximum_ratio]
    proposals = {grid.dense(): "dense"}
    proposals |= {uniform_policy(grid, ratio): "uniform" for ratio in ratios}
    for _ in range(_PATIENCE):
        if len(proposals) >= count:
            break
        drawn = random_levels(grid, random_ratios(2 * count, generator), generator)
        for policy in grid.decode(drawn):
            proposals.setdefault(policy, "random")
    else:
        raise _exhausted(count)
    return list(proposals.items())[:count]


def next_proposals(
    agent: Agent, predictor: Predictor, rows: Sequence[Evaluation], count: int, seed: int
) -> list[tuple[Policy, str]]:
    """``count`` distinct policies that ``rows`` do not hold, with their source; the same seed gives the same ones."""
    generator = torch.Generator().manual_seed(seed)
    seen = {row.policy for row in rows}
    proposals: dict[Policy, str] = {}

    device = agent.projector.step_cost.device

    def add(levels: Tensor, source: str, limit: int) -> None:
        for policy in agent.grid.decode(levels):
            if len(proposals) >= limit:
                return
            if policy not in seen:
                proposals.setdefault(policy, source)

    add(agent(_spread(count, generator).to(device)), "agent", round(_GREEDY * count))
    with_noise = round((_GREEDY + _NOISY) * count)
    for attempt in range(_PATIENCE):
        if len(proposals) >= with_noise:
            break
        noise = 0.2 * 1.5**attempt  # an agent that is sure of itself repeats itself
        add(agent(_spread(count, generator).to(device), noise, generator), "agent-noise", with_noise)
    for _ in range(_PATIENCE):
        if len(proposals) >= count:
            return list(proposals.items())
        add(_screened(agent.grid, predictor, rows, count, generator), "neighbour", count)
    raise _exhausted(count)


def _exhausted(count: int) -> PPFError:
    return PPFError(f"cannot find {count} new policies to measure: the model has too few. Fit with fewer evaluations")


def _spread(count: int, generator: Generator) -> Tensor:
    """``count`` ratios, one from each of ``count`` equal parts of the range, in random order."""
    low, high = RATIO_RANGE
    place = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return low + (high - low) * place


def _screened(grid: Grid, predictor: Predictor, rows: Sequence[Evaluation], count: int, generator: Generator) -> Tensor:
    """Neighbours int64 [P, S] of the best measured policies over all ratios: of each one's mutants, the most promising.

    A random ensemble member judges (Thompson sampling), so that what the ensemble disagrees on gets its chance.
    """
    parents = frontier(grid, rows, count, generator)
    mutants = mutate(parents.repeat_interleave(_NEIGHBOURS, 0), grid, generator, swaps=4)
    with torch.no_grad():
        member = int(torch.randint(predictor.members, (1,), generator=generator))
        outputs = predictor.members_at(mutants)[member].cpu()
    best = outputs.view(len(parents), _NEIGHBOURS).argmin(1)
    return mutants.view(len(parents), _NEIGHBOURS, -1)[torch.arange(len(parents)), best]


def frontier(grid: Grid, rows: Sequence[Evaluation], count: int, generator: Generator) -> Tensor:
    """Levels int64 [count, S] of measured policies that are the best within 2 % of ratios drawn over the range."""
    ratio = torch.tensor([row.ratio for row in rows])
    value = torch.tensor([row.log_perplexity for row in rows])
    wanted = _spread(count, generator)
    # Beyond the window, distance in ratio outweighs any difference in log-perplexity.
    distance = ((ratio - wanted[:, None]).abs() - 0.02).clamp_min(0)
    best = (value + 100 * distance).argmin(1)
    return grid.encode([rows[index].policy for index in best.tolist()])

"""What to measure next: the proposals of the fit loop, where the agent goes and around it.

Round 0 measures random and uniform policies over all ratios. Every later round mixes the agent's own answers (there the
predictor must be right), the same with noise, and what breeding on the predictor finds around the best measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from ...choose.additive import Additive
from ...choose.agent import Agent
from ...choose.candidates.breeding import Effort, breed, cautious, move
from ...choose.candidates.sampling import RATIO_RANGE, random_levels, random_ratios, uniform_policy
from ...choose.predictor import Predictor
from ...errors import InputError, PPFError
from ...model.grid import Grid
from ...model.policy import Policy
from ...timings import timed
from ..experience import Evaluation

# Share of a round that comes from the agent itself, from the agent with noise; the rest is bred on the predictor.
_GREEDY, _NOISY = 0.35, 0.15
_CAUTIONS = (0.0, -0.5, -1.0, -2.0)
_EFFORT = Effort(generations=12, offspring=24, keep=8)
_FRONTIER = 4  # measured policies that an island starts from
_STRATA = 64  # parts of the range of ratios whose uncertainty is asked for
_PATIENCE = 60  # fruitless draws after which a small model is taken to have no new policies left


def check_evaluations(evaluations: int, grid: Grid) -> None:
    """Raise ``InputError`` unless ``grid`` has at least four times as many policies as shall be measured."""
    policies = math.prod(high - low + 1 for low, high in zip(grid.minimum, grid.maximum, strict=True))
    if evaluations > policies // 4:
        remedy = f"Use at most {policies // 4}, or a smaller --ffn-multiple"
        raise InputError("evaluations", evaluations, f"is too much for a model with {policies} policies", remedy)


def initial_proposals(
    grid: Grid, count: int, seed: int, first: Additive | None = None
) -> list[tuple[Policy, str]]:  # fmt: skip
    """``count`` distinct policies with their source: the dense and five uniform ones, five of the ``first`` answer if
    there is one, the rest random."""
    generator = torch.Generator().manual_seed(seed)
    ratios = [r for r in (0.1, 0.2, 0.3, 0.4, 0.5) if r <= grid.maximum_ratio]
    proposals = {grid.dense(): "dense"}
    proposals |= {uniform_policy(grid, ratio): "uniform" for ratio in ratios}
    if first is not None and ratios:
        for policy in grid.decode(first(torch.tensor(ratios, dtype=torch.float64))):
            proposals.setdefault(policy, "calibration")
    for _ in range(_PATIENCE):
        if len(proposals) >= count:
            break
        drawn = random_levels(grid, random_ratios(2 * count, generator), generator)
        for policy in grid.decode(drawn):
            proposals.setdefault(policy, "random")
    else:
        raise _exhausted(count)
    return list(proposals.items())[:count]


@timed("breeding proposals")
def next_proposals(
    agent: Agent, predictor: Predictor, rows: Sequence[Evaluation], count: int, seed: int
) -> list[tuple[Policy, str]]:
    """``count`` distinct policies that ``rows`` do not hold, with their source; the same seed gives the same ones."""
    generator, new = torch.Generator().manual_seed(seed), New(agent.grid, rows)
    new.add(agent(_budgets(agent, predictor, count, generator)), "agent", round(_GREEDY * count))
    with_noise = round((_GREEDY + _NOISY) * count)
    new.add_noisy(agent, lambda: _budgets(agent, predictor, count, generator), with_noise, generator)
    for _ in range(_PATIENCE):
        if len(new.proposals) >= count:
            return list(new.proposals.items())
        new.add(_bred(agent, predictor, rows, count - len(new.proposals), generator), "bred", count)
    raise _exhausted(count)


def own_proposals(agent: Agent, rows: Sequence[Evaluation], count: int, seed: int) -> list[tuple[Policy, str]]:
    """``count`` distinct policies that ``rows`` do not hold: the agent's answers, evenly over all ratios, and where
    these repeat themselves or are known, such with noise."""
    generator, new = torch.Generator().manual_seed(seed), New(agent.grid, rows)
    low, high = RATIO_RANGE
    ratio = low + (high - low) * (torch.arange(count, device=agent.device) + 0.5) / count
    new.add(agent(ratio), "agent", count)
    new.add_noisy(agent, lambda: ratio, count, generator)
    if len(new.proposals) < count:
        raise _exhausted(count)
    return list(new.proposals.items())


class New:
    """Distinct policies that ``rows`` do not hold, with their source, in the order in which they come."""

    def __init__(self, grid: Grid, rows: Sequence[Evaluation]):
        self.grid, self.seen = grid, {row.policy for row in rows}
        self.proposals: dict[Policy, str] = {}

    def add(self, levels: Tensor, source: str, limit: int) -> None:
        """Levels int64 [P, S], until there are ``limit`` in all."""
        for policy in self.grid.decode(levels):
            if len(self.proposals) >= limit:
                return
            if policy not in self.seen:
                self.proposals.setdefault(policy, source)

    def add_noisy(self, agent: Agent, budgets: Callable[[], Tensor], limit: int, generator: Generator) -> None:
        """The agent's answers to ratios that ``budgets`` draws, with noise: more and more of it, since an agent that is
        sure of itself repeats itself."""
        for attempt in range(_PATIENCE):
            if len(self.proposals) >= limit:
                return
            self.add(agent(budgets(), 0.2 * 1.5**attempt, generator), "agent-noise", limit)


def _exhausted(count: int) -> PPFError:
    return PPFError(f"cannot find {count} new policies to measure: the model has too few. Fit with fewer evaluations")


def _budgets(agent: Agent, predictor: Predictor, count: int, generator: Generator) -> Tensor:
    """``count`` ratios in random order on the agent's device: half of them evenly over the range, the others where the
    predictor is unsure of the agent's own policies (as a rule the severe ones)."""
    low, high = RATIO_RANGE
    middle = low + (high - low) * (torch.arange(_STRATA) + 0.5) / _STRATA
    unsure = predictor(agent(middle.to(agent.device))).std.double().cpu().clamp_min(1e-12)
    share = (0.5 / _STRATA + 0.5 * unsure / unsure.sum()).cumsum(0)
    place = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    stratum = torch.searchsorted(share, place.double()).clamp_max(_STRATA - 1)
    within = torch.rand(count, generator=generator) - 0.5
    ratio = middle[stratum] + within * (high - low) / _STRATA
    return ratio[torch.randperm(count, generator=generator)].to(agent.device)


def _bred(agent: Agent, predictor: Predictor, rows: Sequence[Evaluation], count: int, generator: Generator) -> Tensor:
    """Policies int64 [P, S], the most promising of every island first: ``count`` budgets over all ratios.

    Every island draws how much it trusts the predictor, so that what the predictor is unsure of gets its chance.
    """
    grid, device = agent.grid, agent.device
    ratio = _budgets(agent, predictor, count, generator).sort().values  # neighbouring islands exchange policies
    known = frontier(grid, rows, ratio.cpu(), _FRONTIER).to(device)
    moved = move(known.flatten(0, 1), grid, ratio.repeat_interleave(known.shape[1])).view(known.shape)
    caution = torch.tensor(_CAUTIONS)[torch.randint(len(_CAUTIONS), (count,), generator=generator)]
    start, judge = torch.cat((moved, agent(ratio)[:, None]), 1), cautious(predictor, caution)
    pool = breed(start, ratio, judge, grid, generator, _EFFORT)
    return pool.transpose(0, 1).flatten(0, 1).cpu()


def frontier(grid: Grid, rows: Sequence[Evaluation], wanted: Tensor, count: int) -> Tensor:
    """Levels int64 [R, count, S] of the ``count`` best measured policies within 2 % of each ratio ``wanted`` [R]."""
    ratio = torch.tensor([row.ratio for row in rows])
    value = torch.tensor([row.log_perplexity for row in rows])
    # Beyond the window, distance in ratio outweighs any difference in log-perplexity.
    distance = ((ratio - wanted[:, None]).abs() - 0.02).clamp_min(0)
    best = (value + 100 * distance).argsort(1)[:, :count]
    levels = grid.encode([row.policy for row in rows])
    return levels[best]

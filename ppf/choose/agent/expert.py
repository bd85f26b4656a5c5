"""Expert iteration: the agent learns to give at once what breeding finds from its answers.

The pathwise gradient follows relaxed policies into one basin; breeding (:mod:`ppf.choose.candidates.breeding`)
crosses between them on definite policies, at no true evaluation. What it finds at many budgets becomes the agent's
target, as a tree search's moves do in expert iteration (arXiv 1705.08439).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..candidates.breeding import Effort, breed, cautious
from ..predictor import Predictor
from .actor import Agent
from .episodes import stratified_ratios

_RATE = 3e-3
_TEMPERATURE = 0.3
_FEWEST = 20  # steps that the schedule of the learning rate needs
_START = 4  # answers that breeding starts from at every budget
_PARTS = 4  # a step looks at every fourth budget: as good as all of them, in a quarter of the time


def imitate_breeding(
    agent: Agent, predictor: Predictor, seed: int, budgets: int, steps: int, effort: Effort, caution: float = 0.0
) -> None:
    """Train ``agent`` in place, for ``steps`` steps, on the best policies bred at ``budgets`` ratios."""
    generator, judge = torch.Generator().manual_seed(seed), cautious(predictor, caution)
    ratio = stratified_ratios(budgets, generator).to(agent.device)
    best = breed(_answers(agent, ratio, generator), ratio, judge, agent.grid, generator, effort)[:, 0]
    _imitate(agent, ratio, best, max(steps, _FEWEST), generator)


def _answers(agent: Agent, ratio: Tensor, generator: Generator) -> Tensor:
    """The agent's answer and noisy ones at every ratio, int64 [R, answers, S]."""
    noisy = [agent(ratio, noise=0.3, generator=generator) for _ in range(_START - 1)]
    return torch.stack([agent(ratio), *noisy], 1)


def _imitate(agent: Agent, ratio: Tensor, best: Tensor, steps: int, generator: Generator) -> None:
    """Cross-entropy of the agent's relaxed policies with definite ones int64 [R, S]."""
    optimiser = torch.optim.Adam(agent.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps, pct_start=0.1)
    with torch.no_grad():
        near = agent.relaxed_near(ratio, _TEMPERATURE, None)[1]
    for first in torch.randint(_PARTS, (steps,), generator=generator).tolist():
        part = slice(first, None, _PARTS)
        probabilities, near[part] = agent.relaxed_near(ratio[part], _TEMPERATURE, near[part])
        chosen = probabilities.gather(-1, best[part, :, None])
        loss = -chosen.clamp_min(1e-9).log().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()

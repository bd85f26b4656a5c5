"""What a fit learns from its rows: a predictor of log perplexity, and an agent trained against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..choose import agent as agent_kinds
from ..choose import predictor as predictor_kinds
from ..choose.additive import Additive
from ..choose.agent import Agent, train_agent
from ..choose.predictor import Predictor, make_predictor
from ..choose.predictor.training import fit_predictor
from ..model.grid import Grid
from .experience import Evaluation

_PREDICTOR_STEPS, _AGENT_STEPS = 800, 400
_MORE_STEPS = 100  # for a few more rows
# The agent's steps were found on a 14M Llama with 255 levels to decide on. A model with fewer, or rows too few to tell
# the predictor where the best policies are, is learnt in as much less, but no less than schedules need (dev/LOG.md).
_FULL_SIZE, _FULL_ROWS, _FEWEST = 255, 250, 50


@dataclass(frozen=True)
class Fitted:
    """What the loop learns."""

    predictor: Predictor
    agent: Agent


@dataclass(frozen=True)
class Learning:
    """How to learn: the kind of predictor, the way to train the agent, the library's error energies [S, K], and what
    calibration alone answers."""

    predictor: str = predictor_kinds.DEFAULT
    agent: str = agent_kinds.DEFAULT
    energies: Tensor | None = None
    first: Additive | None = None


def learn(
    grid: Grid,
    rows: Sequence[Evaluation],
    seed: int,
    device: torch.device,
    effort: float = 1.0,
    learning: Learning | None = None,
    experts: int = 1,
    caution: float = 0.0,
) -> Fitted:
    """A predictor and an agent, trained from scratch on ``rows``; ``effort`` scales their steps, ``experts`` are the
    agent's rounds of expert iteration, and it minimises what is predicted plus ``caution`` standard uncertainties. The
    agent's steps follow what there is to learn as well: :func:`agent_steps`."""
    how = learning or Learning()
    predictor = learn_predictor(grid, rows, seed, device, effort, how)
    agent = Agent(grid, seed=seed, energies=how.energies).to(device)
    steps = agent_steps(grid, len(rows), how.agent, effort)
    train_agent(agent, predictor, seed, steps=steps, caution=caution, kind=how.agent, experts=experts)
    return Fitted(predictor, agent.eval())


def learn_predictor(
    grid: Grid, rows: Sequence[Evaluation], seed: int, device: torch.device, effort: float, how: Learning
) -> Predictor:
    """A predictor trained from scratch on ``rows``."""
    predictor = make_predictor(how.predictor, grid, how.energies).to(device)
    fit_predictor(predictor, *_tensors(grid, rows), seed=seed, steps=round(_PREDICTOR_STEPS * effort))
    return predictor.eval()


def learn_more(predictor: Predictor, grid: Grid, rows: Sequence[Evaluation], seed: int) -> None:
    """Go on training ``predictor`` in place on ``rows``, a few of which it has not seen."""
    fit_predictor(predictor.train(), *_tensors(grid, rows), seed=seed, steps=_MORE_STEPS, fresh=False)
    predictor.eval()


def agent_steps(grid: Grid, rows: int, kind: str, effort: float) -> int:
    """How long to train an agent of this ``kind`` on a predictor of so many ``rows``: ``effort`` times the full length,
    or less for a small grid or few rows. The actor-critic, which learns from draws, always takes the full length."""
    full = round(_AGENT_STEPS * effort)
    if kind != agent_kinds.DEFAULT:
        return full
    size = sum(high - low for low, high in zip(grid.minimum, grid.maximum, strict=True))
    share = min(1.0, size / _FULL_SIZE) * min(1.0, math.sqrt(rows / _FULL_ROWS))
    return min(full, max(_FEWEST, round(share * full)))


def _tensors(grid: Grid, rows: Sequence[Evaluation]) -> tuple[Tensor, Tensor]:
    return grid.encode([row.policy for row in rows]), torch.tensor([row.log_perplexity for row in rows])

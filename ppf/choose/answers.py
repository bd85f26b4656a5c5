"""A budget's policy: the most promising of what the agent and calibration say, what was measured, and the uniform one.

An agent learns from the predictor, and of few measurements that is wrong where the agent goes: its answer can then be
worse than those that nobody had to learn. So each is predicted, and a policy counts for what it may well be, not for
what is hoped of it: its prediction plus ``_CAUTION`` standard uncertainties. These are small near what was measured,
and a fit measures the uniform policies and those of calibration in its first round. Where the predictor was never
tried at the agent's own policies, or failed there, the agent is not asked at all: from 24 evaluations of the bundled
model its policy at 20 % was predicted 9 standard uncertainties too well, and lost 72 % to calibration's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..model.grid import Grid
from .additive import Additive
from .agent import Agent
from .budget import Budget
from .budget.projection import projector_of
from .measured import Measured
from .predictor import Predictor

_CAUTION = 1.0


class Offer(NamedTuple):
    """Levels int64 [1, S] and whose they are: "agent", "calibration", "measured" or "uniform"."""

    levels: Tensor
    source: str


class Answers:
    """What a run can say of budgets: by ``agent`` and ``predictor``, which go together, by what was ``measured``, and
    by ``first``; the last alone where nothing was. The agent is left out unless it is ``trusted``, if there is
    ``first`` to ask. Raises ``ValueError`` without anybody."""

    def __init__(
        self, grid: Grid, agent: Agent | None, predictor: Predictor | None, first: Additive | None,
        trusted: bool = True, measured: Measured | None = None,
    ):  # fmt: skip
        if (agent is None or predictor is None) and first is None:
            raise ValueError("there is nobody to ask")
        self.grid, self.predictor, self.first, self.measured = grid, predictor, first, measured
        self.agent = agent if trusted or first is None else None

    @torch.no_grad()
    def __call__(self, budget: Budget) -> Offer:
        """The best offer for one budget of any kind."""
        asked = {"agent": self.agent, "calibration": self.first}
        offers = {name: budget.candidates(who) for name, who in asked.items() if who is not None}
        if self.predictor is not None:
            kept = torch.full((1, self.grid.sublayers), budget.kept)
            offers["uniform"] = budget.moved(kept.clamp(0, 1))
        if self.measured is not None:
            # In units that come to no ratio the share that may stay is about that of parameters.
            ratio = 1 - budget.kept if budget.comes_to is None else budget.comes_to
            if len(near := self.measured.near(ratio)):
                offers["measured"] = budget.moved(near)
        sources = [name for name, levels in offers.items() for _ in range(len(levels))]
        levels = torch.cat(list(offers.values()))
        best = int(self._judged(levels).argmin())
        return Offer(levels[best : best + 1], sources[best])

    @torch.no_grad()
    def at(self, ratio: Tensor) -> Tensor:
        """Levels int64 [R, S] of the best offers for ratios fp64 [R]: the same as one by one, at once."""
        offers = [who(ratio) for who in (self.agent, self.first) if who is not None]
        if self.predictor is not None:
            kept = (1 - ratio).float()[:, None].expand(-1, self.grid.sublayers)
            offers.append(projector_of(self.grid, ratio.device).nearest(kept, ratio))
        levels = torch.stack(offers, 1)
        if self.measured is not None:
            levels = torch.cat((levels, *self._moved(ratio, levels[:, -1])), 1)
        score = self._judged(levels.flatten(0, 1)).view(levels.shape[:2])
        return levels[torch.arange(len(levels)), score.argmin(1)]

    def _moved(self, ratio: Tensor, filler: Tensor) -> list[Tensor]:
        """The best measured policies near each ratio, moved onto it, int64 [R, B, S], where there are any at all;
        ``filler`` [R, S] stands where a ratio has fewer."""
        found = [self.measured.near(float(value)) for value in ratio]
        counts = [len(part) for part in found]
        if not any(counts):
            return []
        wanted = ratio.repeat_interleave(torch.tensor(counts))
        moved = projector_of(self.grid, ratio.device).nearest(torch.cat(found), wanted)
        filled = filler[:, None].repeat(1, max(counts), 1)
        for row, part in enumerate(moved.split(counts)):
            filled[row, : len(part)] = part
        return [filled]

    def _judged(self, levels: Tensor) -> Tensor:
        """What is minimised, [P]."""
        if self.predictor is None:
            return self.first.total(levels)
        prediction = self.predictor(levels)
        return prediction.mean + _CAUTION * prediction.std

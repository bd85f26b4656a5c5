"""The pathwise gradient: the predictor's own gradient reaches the actor through relaxed policies.

The argmax inside the projection becomes a softmax whose temperature falls until the policies are nearly definite.
"""

from __future__ import annotations

import torch

from ..predictor import Predictor
from .actor import Agent
from .episodes import stratified_ratios

_RATE = 5e-3
_COLD = 0.1  # the temperature at the end


def train_pathwise(
    agent: Agent,
    predictor: Predictor,
    seed: int,
    steps: int = 400,
    batch: int = 64,
    caution: float = 0.0,
    warm: float = 1.0,
    rate: float = _RATE,
) -> None:
    """Train ``agent`` in place against ``predictor`` over all ratios; the temperature falls from ``warm`` to 0.1.

    The loss is the predicted log-perplexity plus ``caution`` times the members' standard deviation, which keeps the
    agent away from policies the predictor knows nothing about.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(agent.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    near = None  # strata keep their place in the batch, so a row's multiplier is about the last step's
    for step in range(steps):
        ratio = stratified_ratios(batch, generator).to(agent.device)
        probabilities, near = agent.relaxed_near(ratio, warm * (_COLD / warm) ** (step / steps), near)
        outputs = predictor.relaxed(probabilities)
        loss = outputs.mean(0).mean()
        if caution:
            loss = loss + caution * outputs.std(0).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()

"""The pathwise gradient: the predictor's own gradient reaches the actor through relaxed policies.

The argmax inside the projection becomes a softmax whose temperature falls until the policies are nearly definite.
"""

from __future__ import annotations

import torch

from ..predictor import Predictor
from .actor import Agent
from .episodes import stratified_ratios

_RATE = 5e-3


def train_pathwise(
    agent: Agent, predictor: Predictor, seed: int, steps: int = 400, batch: int = 64, caution: float = 0.0
) -> None:
    """Train ``agent`` in place against ``predictor`` over all ratios.

    The loss is the predicted log-perplexity plus ``caution`` times the members' standard deviation, which keeps the
    agent away from policies the predictor knows nothing about.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(agent.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps, pct_start=0.1)
    near = None  # strata keep their place in the batch, so a row's multiplier is about the last step's
    for step in range(steps):
        ratio = stratified_ratios(batch, generator).to(agent.device)
        probabilities, near = agent.relaxed_near(ratio, 0.1 ** (step / steps), near)
        outputs = predictor.relaxed(probabilities)
        loss = outputs.mean(0).mean()
        if caution:
            loss = loss + caution * outputs.std(0).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()

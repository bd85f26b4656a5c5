"""The agent: budget → policy in one forward pass, meeting the budget exactly.

An actor network maps the requested ratio to a utility for every level of every sub-layer; the projection
(:mod:`ppf.projection`) turns utilities into the levels that meet the budget. For training, the argmax inside the
projection becomes a softmax, so that the predictor's gradient reaches the actor through relaxed policies that meet the
budget in expectation (the pathwise gradient); the temperature falls until they are nearly definite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .grid import Grid
from .predictor import Predictor
from .projection import Projector, nearest
from .sampling import RATIO_RANGE

_FREQUENCIES = 3
# Scales make the uniform policy's utilities and the multiplier's steps of order one for the networks and the softmax.
_START = 64.0
_MULTIPLIER = 32.0


class Agent(nn.Module):
    """The actor. It starts as the uniform policy: its network's last layer is zero, and adds to uniform utilities."""

    def __init__(self, grid: Grid, hidden: int = 128, seed: int = 0):
        super().__init__()
        self.grid = grid
        self.projector = Projector(grid)
        outputs = grid.sublayers * grid.levels
        self.network = nn.Sequential(
            nn.Linear(3 + 2 * _FREQUENCIES, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, outputs),
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.network[0], self.network[2]):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / math.sqrt(layer.in_features))
                layer.bias.zero_()
            self.network[4].weight.zero_()
            self.network[4].bias.zero_()

    def utilities(self, ratio: Tensor) -> Tensor:
        """Utilities fp32 [B, S, K] for requested ratios fp32 [B]."""
        waves = [f(math.pi * k * ratio) for k in range(1, _FREQUENCIES + 1) for f in (torch.sin, torch.cos)]
        features = torch.stack([ratio, ratio.square(), torch.log1p(-ratio), *waves], dim=-1)
        uniform = nearest((1 - ratio)[:, None].expand(-1, self.grid.sublayers), self.grid)
        return self.network(features).view(-1, self.grid.sublayers, self.grid.levels) + _START * uniform

    @torch.no_grad()
    def forward(self, ratio: Tensor, noise: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Levels int64 [B, S] for ratios fp32 [B]. ``noise`` scales Gumbel noise on the utilities, for exploration."""
        utility = self.utilities(ratio)
        if noise:
            uniform = torch.rand(utility.shape, generator=generator).clamp(1e-9, 1 - 1e-7).to(utility.device)
            utility = utility - noise * torch.log(-torch.log(uniform))
        return self.projector(utility, ratio)

    def relaxed(self, ratio: Tensor, temperature: float) -> Tensor:
        """Level probabilities [B, S, K] whose expected cost is the budget; differentiable."""
        utility = self.utilities(ratio).masked_fill(~self.projector.allowed, -1e9)
        return _relax(utility, 1 - ratio, self.projector.relative_cost, temperature)


def _relax(utility: Tensor, kept: Tensor, cost: Tensor, temperature: float) -> Tensor:
    """softmax((u − μ·cost)/τ) with the μ per row at which the expected cost is ``kept`` [B].

    μ comes from a bisection, which has no gradient; one Newton step from there has the implicit function's.
    """

    def probabilities(multiplier: Tensor) -> Tensor:
        return torch.softmax((utility - _MULTIPLIER * multiplier[:, None, None] * cost) / temperature, dim=-1)

    with torch.no_grad():
        low, high = torch.full_like(kept, -200.0), torch.full_like(kept, 200.0)
        for _ in range(30):
            middle = (low + high) / 2
            over = (probabilities(middle) * cost).sum((1, 2)) > kept
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        middle = (low + high) / 2
        p = probabilities(middle)
        mean = (p * cost).sum(-1, keepdim=True)
        slope = (p * (cost - mean).square()).sum((1, 2)) * _MULTIPLIER / temperature
    excess = (probabilities(middle) * cost).sum((1, 2)) - kept
    return probabilities(middle + excess / slope.clamp_min(1e-4))


def train_agent(
    agent: Agent, predictor: Predictor, seed: int, steps: int = 400, batch: int = 64, caution: float = 0.0
) -> None:
    """Train ``agent`` in place against ``predictor`` over all ratios of ``RATIO_RANGE``.

    The loss is the predicted log-perplexity plus ``caution`` times the ensemble's standard deviation, which keeps the
    agent away from policies the predictor knows nothing about.
    """
    generator = torch.Generator().manual_seed(seed)
    predictor.requires_grad_(False)
    optimiser = torch.optim.Adam(agent.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps, pct_start=0.1)
    device = agent.projector.step_cost.device
    low, high = RATIO_RANGE
    for step in range(steps):
        # Stratified ratios: each batch covers the whole range evenly.
        place = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        outputs = predictor.relaxed(agent.relaxed((low + (high - low) * place).to(device), 0.1 ** (step / steps)))
        loss = (outputs.mean(0) + caution * outputs.std(0)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    predictor.requires_grad_(True)

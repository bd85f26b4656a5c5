"""The actor: from a requested ratio to a utility for every level of every sub-layer, and from there to a policy.

Two networks add up. One sees the budget alone and has outputs of its own for every sub-layer and level; the other is
shared by all of them and sees their state: kind, depth, level, the error energy that the library's refit leaves there,
and the budget. The projection (:mod:`ppf.choose.budget.projection`) turns
utilities into the levels that meet the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...model.grid import Grid
from ..budget.projection import Projector, nearest
from .features import BUDGET_FEATURES, STATE_FEATURES, budget_features, state_features
from .relaxation import relax

# Makes the uniform policy's utilities of order one for the networks and the softmax.
_START = 64.0
_SHARED = 32  # hidden units of the network that all levels share


def error_energies(errors: Sequence[Tensor], grid: Grid) -> Tensor:
    """Relative error energies fp32 [S, K] of every level, from those of every sub-layer [its levels]; zero where a
    sub-layer has no such level."""
    energies = torch.zeros(grid.sublayers, grid.levels)
    for sublayer, found in enumerate(errors):
        energies[sublayer, : len(found)] = found.float()
    return energies


class Agent(nn.Module):
    """The actor. It starts as the uniform policy: its networks' last layers are zero, and add to uniform utilities."""

    def __init__(self, grid: Grid, hidden: int = 128, seed: int = 0, energies: Tensor | None = None):
        """``energies`` fp32 [S, K] as :func:`error_energies` gives them; they are saved with the agent."""
        super().__init__()
        self.grid = grid
        self.projector = Projector(grid)
        state = state_features(grid, torch.zeros(grid.sublayers, grid.levels) if energies is None else energies)
        self.register_buffer("state", state)
        self.network = _perceptron(BUDGET_FEATURES, hidden, grid.sublayers * grid.levels)
        self.shared = _perceptron(STATE_FEATURES + 2, _SHARED, 1)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for network in (self.network, self.shared):
                for layer in (network[0], network[2], network[4]):
                    draw = torch.randn(layer.weight.shape, generator=generator) / math.sqrt(layer.in_features)
                    layer.weight.copy_(draw * (layer is not network[4]))
                    layer.bias.zero_()

    def utilities(self, ratio: Tensor) -> Tensor:
        """Utilities fp32 [B, S, K] for requested ratios fp32 [B]."""
        uniform = nearest((1 - ratio)[:, None].expand(-1, self.grid.sublayers), self.grid)
        own = self.network(budget_features(ratio)).view(-1, self.grid.sublayers, self.grid.levels)
        budget = torch.stack((ratio, ratio.square()), -1)[:, None, None].expand(-1, *self.state.shape[:2], -1)
        state = self.state.expand(len(ratio), -1, -1, -1)
        return own + self.shared(torch.cat((state, budget), -1)).squeeze(-1) + _START * uniform

    @torch.no_grad()
    def forward(
        self, ratio: Tensor, noise: float = 0.0, generator: torch.Generator | None = None, ceiling: bool = False
    ) -> Tensor:  # fmt: skip
        """Levels int64 [B, S] for ratios [B], fp32 or fp64; with ``ceiling`` they never keep more than these leave.
        ``noise`` scales Gumbel noise on the utilities, for exploration."""
        utility = self.utilities(ratio.float())
        if noise:
            uniform = torch.rand(utility.shape, generator=generator).clamp(1e-9, 1 - 1e-7).to(utility.device)
            utility = utility - noise * torch.log(-torch.log(uniform))
        return self.projector(utility, ratio, ceiling)

    def relaxed(self, ratio: Tensor, temperature: float) -> Tensor:
        """Level probabilities [B, S, K] whose expected cost is the budget; differentiable."""
        return self.relaxed_near(ratio, temperature, None)[0]

    def relaxed_near(self, ratio: Tensor, temperature: float, near: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same, and the multipliers [B] of the budget's cost; ``near`` are those of the step before, which is
        faster (see :func:`ppf.choose.agent.relaxation.relax`)."""
        utility = self.utilities(ratio).masked_fill(~self.projector.allowed, -1e9)
        return relax(utility, 1 - ratio, self.projector.relative_cost, temperature, near)

    @property
    def device(self) -> torch.device:
        return self.state.device


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    layers = nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
    return nn.Sequential(*layers)

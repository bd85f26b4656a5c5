"""From preferences to policies that meet a budget exactly.

A preference gives every sub-layer a utility for each of its levels. The projection picks the levels with the highest
total utility whose cost is the budget: a Lagrange multiplier found by bisection, then single steps of the best
marginal utility until no step brings the cost closer. The result is within half a step of the cheapest sub-layer that
still has room, always; there is no penalty to tune.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import InputError
from .grid import Grid

_BISECTIONS = 40


def check_ratio(ratio: float, grid: Grid) -> None:
    """Raise ``InputError`` unless 0 < ratio ≤ what the structure can give."""
    if not 0 < ratio < 1:  # also refuses NaN
        raise InputError("ratio", ratio, "is not a share of parameters", "Use a number between 0 and 1, such as 0.3")
    if ratio > grid.maximum_ratio:
        remedy = f"The maximum for this model is {grid.maximum_ratio:.4f} (layer 0 keeps one kv-group)"
        raise InputError("ratio", ratio, "is more than the structure can give", remedy)


class Projector(nn.Module):
    """Projects utilities fp32 [B, S, K] onto the policies of a budget; K = ``grid.levels``. A module only to follow its
    owner's device: it has nothing to learn and nothing to save."""

    maximum: Tensor  # [S]
    minimum: Tensor  # [S]
    step_cost: Tensor  # fp64 [S]: parameters a level
    allowed: Tensor  # bool [S, K]
    relative_cost: Tensor  # fp32 [S, K]: share of the decoder's parameters, so that μ's range suits every model

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid
        level = torch.arange(grid.levels)
        maximum, minimum = torch.tensor(grid.maximum), torch.tensor(grid.minimum)
        step_cost = torch.tensor(grid.step_cost, dtype=torch.float64)
        for name, tensor in (
            ("maximum", maximum),
            ("minimum", minimum),
            ("step_cost", step_cost),
            ("allowed", (level >= minimum[:, None]) & (level <= maximum[:, None])),
            ("relative_cost", (level * step_cost[:, None] / grid.structure.decoder_parameters).float()),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, utility: Tensor, ratio: Tensor) -> Tensor:
        """Levels int64 [B, S] of the policies that remove ``ratio`` [B] of the decoder parameters."""
        utility = utility.masked_fill(~self.allowed, -torch.inf)
        target = (1 - ratio.double()) * self.grid.structure.decoder_parameters
        return self._repair(self._relaxed(utility, target), utility, target)

    def cost(self, levels: Tensor) -> Tensor:
        """Kept parameters, fp64 [B], of int64 levels [B, S]."""
        return (levels * self.step_cost).sum(-1)

    def _relaxed(self, utility: Tensor, target: Tensor) -> Tensor:
        """Levels that maximise utility − μ·cost with the smallest μ per row whose cost does not exceed the target."""
        finite = utility.masked_fill(~self.allowed, 0)
        span = (finite.abs().amax((1, 2)) * 2 + 1e-6) / self.relative_cost[:, 1:].min()
        low, high = -span, span
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            over = self.cost((utility - middle[:, None, None] * self.relative_cost).argmax(-1)) > target
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        return (utility - high[:, None, None] * self.relative_cost).argmax(-1)

    def _repair(self, levels: Tensor, utility: Tensor, target: Tensor) -> Tensor:
        """Single steps up or down, each the least loss of utility, while one brings the cost closer to the target."""
        for _ in range(sum(self.grid.maximum)):
            gap = target - self.cost(levels)
            step = torch.where(gap >= 0, 1, -1)[:, None]
            moved = levels + step
            closer = (gap[:, None] - step * self.step_cost).abs() < gap.abs()[:, None]
            possible = closer & (moved >= self.minimum) & (moved <= self.maximum)
            if not possible.any():
                break
            gain = self._at(utility, moved.clamp(self.minimum, self.maximum)) - self._at(utility, levels)
            gain = (gain / self.step_cost).masked_fill(~possible, -torch.inf)
            best = gain.argmax(-1, keepdim=True)
            levels = levels.scatter_add(1, best, step * possible.any(1, keepdim=True))
        return levels

    @staticmethod
    def _at(utility: Tensor, levels: Tensor) -> Tensor:
        return utility.gather(-1, levels[..., None]).squeeze(-1)


def nearest(fractions: Tensor, grid: Grid) -> Tensor:
    """Utilities fp32 [B, S, K] that pull every sub-layer towards kept ``fractions`` [B, S], weighted by its cost."""
    maximum = torch.tensor(grid.maximum, device=fractions.device)
    level = torch.arange(grid.levels, device=fractions.device) / maximum[:, None]
    weight = maximum * torch.tensor(grid.step_cost, device=fractions.device) / grid.structure.decoder_parameters
    return -(level - fractions[..., None]).square() * weight[:, None]

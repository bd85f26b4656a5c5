"""From preferences to policies that meet a budget exactly.

A preference gives every sub-layer a utility for each of its levels. The projection picks the levels with the highest
total utility whose cost is the budget: a Lagrange multiplier found by bisection, then single steps of the best
marginal utility until no step brings the cost closer, and at last one exchange of a dear step for cheap ones where the
cheap sub-layers have no room left. There is no penalty to tune. What is guaranteed for every feasible ratio: the cost
is within half a step of the cheapest sub-layers of the budget, provided these together span a step of the dearest;
in any case within half a step of the dearest.
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
        levels = self._repair(self._relaxed(utility, target), utility, target, self.step_cost > 0)
        return self._exchange(levels, utility, target)

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

    def _repair(self, levels: Tensor, utility: Tensor, target: Tensor, movable: Tensor) -> Tensor:
        """Single steps of ``movable`` [S] sub-layers, while one brings the cost closer to the target."""
        for _ in range(sum(self.grid.maximum)):
            gap = target - self.cost(levels)
            step = torch.where(gap >= 0, 1, -1)[:, None]
            closer = (gap[:, None] - step * self.step_cost).abs() < gap.abs()[:, None]
            moved = self._best_step(levels, utility, step, closer & movable)
            if moved is None:
                break
            levels = moved
        return levels

    def _exchange(self, levels: Tensor, utility: Tensor, target: Tensor) -> Tensor:
        """Where cheap steps could come closer but have no room: one dear step too far, and back in cheap ones."""
        cheapest = self.step_cost.min()
        cheap, gap = self.step_cost == cheapest, target - self.cost(levels)
        stuck = gap.abs() > cheapest / 2
        step = torch.where(gap >= 0, 1, -1)[:, None]
        moved = self._best_step(levels, utility, step, ~cheap & stuck[:, None])
        if moved is None:
            return levels
        moved = self._repair(moved, utility, target, cheap)
        better = (target - self.cost(moved)).abs() < gap.abs()
        return torch.where(better[:, None], moved, levels)

    def _best_step(self, levels: Tensor, utility: Tensor, step: Tensor, movable: Tensor) -> Tensor | None:
        """``levels`` with one ``step`` (±1, [B, 1]) of the best utility for its cost among ``movable`` [B, S]; rows
        without any stay as they are, and None says that all do."""
        moved = levels + step
        possible = movable & (moved >= self.minimum) & (moved <= self.maximum)
        if not possible.any():
            return None
        gain = self._at(utility, moved.clamp(self.minimum, self.maximum)) - self._at(utility, levels)
        gain = (gain / self.step_cost).masked_fill(~possible, -torch.inf)
        best = gain.argmax(-1, keepdim=True)
        return levels.scatter_add(1, best, step * possible.any(1, keepdim=True))

    @staticmethod
    def _at(utility: Tensor, levels: Tensor) -> Tensor:
        return utility.gather(-1, levels[..., None]).squeeze(-1)


def nearest(fractions: Tensor, grid: Grid) -> Tensor:
    """Utilities fp32 [B, S, K] that pull every sub-layer towards kept ``fractions`` [B, S], weighted by its cost."""
    maximum = torch.tensor(grid.maximum, device=fractions.device)
    level = torch.arange(grid.levels, device=fractions.device) / maximum[:, None]
    weight = maximum * torch.tensor(grid.step_cost, device=fractions.device) / grid.structure.decoder_parameters
    return -(level - fractions[..., None]).square() * weight[:, None]

"""Refinement of policies whose costs are irregular: raises and exchanges that bring a cost closer to its target.

Tables of measured latencies have steps of many sizes, some of them zero, so that no order of steps ends near the target
by itself. Where all sums that policies can cost are few enough to be listed (:mod:`ppf.choose.budget.sums`), what the
exchanges miss is taken from the list.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from .sums import Sums

_EXCHANGES = 64
_MOVES = (-2, -1, 0, 1, 2)  # levels that a sub-layer moves by
_CLOSE = 0.01  # share of a measured target: nearer than this nothing is exchanged any more


class Refinement(nn.Module):
    """Refines levels int64 [B, S] that do not exceed their target; a module only to follow its owner's device."""

    table: Tensor  # fp64 [S, K]
    minimum: Tensor  # int64 [S]
    maximum: Tensor

    def __init__(self, table: Tensor, minimum: Tensor, maximum: Tensor, step: float | None):
        """``table`` fp64 [S, K] of costs, the lowest and highest levels [S]; ``step`` is the cheapest step's cost where
        all steps of a sub-layer cost the same, None where nearness is a share of the target."""
        super().__init__()
        self.step = step
        for name, tensor in (("table", table), ("minimum", minimum), ("maximum", maximum)):
            self.register_buffer(name, tensor, persistent=False)

    @cached_property
    def sums(self) -> Sums | None:
        return Sums.of(self.table, self.minimum, self.maximum)

    def forward(self, levels: Tensor, utility: Tensor, target: Tensor, ceiling: bool) -> Tensor:
        """Levels whose cost is closer to ``target`` fp64 [B]; with ``ceiling`` never beyond it. ``utility`` is fp32
        [B, S, K]. Afterwards no level can be raised without exceeding the target."""
        close = torch.full_like(target, self.step) if self.step else _CLOSE * target
        close = close if ceiling else close / 2
        levels = self._filled(levels, utility, target)
        for _ in range(_EXCHANGES):
            moved, gap, left = self._best_exchange(levels, utility, target, close)
            closer = (left < gap) & (gap >= close)
            if not closer.any():
                break
            levels = torch.where(closer[:, None], self._filled(moved, utility, target), levels)
        if not ceiling:
            levels = self._nearer_above(levels, target)
        return self._filled(self._listed(levels, target, close, ceiling), utility, target)  # some steps cost nothing

    def cost(self, levels: Tensor) -> Tensor:
        """Costs fp64 [B, S] of levels [B, S]."""
        return self.table.expand(len(levels), -1, -1).gather(2, levels[..., None])[..., 0]

    def _filled(self, levels: Tensor, utility: Tensor, target: Tensor) -> Tensor:
        """Levels after single raises that fit, the best by utility a cost first, until none does."""
        while True:
            step, gain = self._raises(levels, utility)
            fits = step <= (target - self.cost(levels).sum(1))[:, None]
            if not fits.any():
                return levels
            worth = (gain / (step / self.table.max()).clamp_min(1e-12)).masked_fill(~fits, -torch.inf)
            chosen = torch.zeros_like(levels).scatter(1, worth.argmax(1, keepdim=True), 1)
            levels = levels + chosen * fits.any(1)[:, None]

    def _raises(self, levels: Tensor, utility: Tensor) -> tuple[Tensor, Tensor]:
        """Cost and utility fp64 [B, S] of one level more; of infinite cost where there is none."""
        higher = (levels + 1).minimum(self.maximum)
        gain = (utility.gather(2, higher[..., None]) - utility.gather(2, levels[..., None]))[..., 0]
        step = self.cost(higher) - self.cost(levels)
        return step.masked_fill(levels >= self.maximum, torch.inf), gain.double().nan_to_num(0)

    def _nearer_above(self, levels: Tensor, target: Tensor) -> Tensor:
        """Levels with one more where that ends nearer to the target, if beyond it."""
        gap = target - self.cost(levels).sum(1)
        higher = (levels + 1).minimum(self.maximum)
        step = (self.cost(higher) - self.cost(levels)).masked_fill(levels >= self.maximum, torch.inf)
        beyond, index = (step - gap[:, None]).abs().min(1, keepdim=True)
        chosen = torch.zeros_like(levels).scatter(1, index, 1)
        return levels + chosen * (beyond < gap[:, None])

    def _listed(self, levels: Tensor, target: Tensor, close: Tensor, ceiling: bool) -> Tensor:
        """Levels with the rows that did not come close exchanged for the nearest there are, if these can be listed."""
        gap = target - self.cost(levels).sum(1)
        far = (gap >= close if ceiling else gap.abs() > close).nonzero()[:, 0].tolist()
        if not far or self.sums is None:
            return levels
        levels = levels.clone()
        for row in far:
            found = self.sums.nearest(float(target[row]), ceiling)
            if abs(found - float(target[row])) < abs(float(gap[row])):
                levels[row] = self.sums.levels(found, levels[row])
        return levels

    def _best_exchange(
        self, levels: Tensor, utility: Tensor, target: Tensor, close: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Levels after the best pair of moves, with the distances to the target, fp64 [B], before and after it; of
        pairs that come about equally close, or close enough, the one of the best utility."""
        gap = target - self.cost(levels).sum(1)
        cost, gain = self._moves(levels, utility)
        left = gap[:, None, None] - cost[:, :, None] - cost[:, None, :]
        # Never beyond the target, and never two moves of one sub-layer.
        owner = torch.arange(cost.shape[1], device=cost.device) // len(_MOVES)
        left = left.masked_fill((left < 0) | (owner[:, None] == owner), torch.inf)
        enough = torch.maximum(1.5 * left.amin((1, 2)), close)
        worth = (gain[:, :, None] + gain[:, None, :]).masked_fill(left > enough[:, None, None], -torch.inf)
        best = worth.flatten(1).argmax(1)
        change = sum(_change(move, levels) for move in (best // cost.shape[1], best % cost.shape[1]))
        return levels + change, gap, left.flatten(1).gather(1, best[:, None])[:, 0]

    def _moves(self, levels: Tensor, utility: Tensor) -> tuple[Tensor, Tensor]:
        """Cost fp64 and utility fp32 of every move of every sub-layer, [B, S·moves]; infinite where impossible."""
        minimum, maximum = self.minimum[:, None], self.maximum[:, None]
        moved = levels[..., None] + torch.tensor(_MOVES, device=levels.device)
        possible = (moved >= minimum) & (moved <= maximum)
        moved = moved.clamp(minimum, maximum)
        table, now = self.table.expand(len(levels), -1, -1), levels[..., None]
        cost = (table.gather(2, moved) - table.gather(2, now)).masked_fill(~possible, torch.inf)
        return cost.flatten(1), (utility.gather(2, moved) - utility.gather(2, now)).flatten(1)


def _change(move: Tensor, levels: Tensor) -> Tensor:
    """By how much each of the moves [B] changes every level, int64 [B, S]."""
    size = torch.tensor(_MOVES, device=levels.device)[move % len(_MOVES)]
    owner = (move // len(_MOVES))[:, None] == torch.arange(levels.shape[1], device=levels.device)
    return owner * size[:, None]

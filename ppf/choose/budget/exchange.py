"""Refinement of policies whose costs are irregular: exchanges that bring a cost closer to its target from below.

Tables of measured latencies have steps of many sizes, some of them zero, so that no order of steps ends near the target
by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXCHANGES = 64
_MOVES = (-2, -1, 0, 1, 2)  # levels that a sub-layer moves by
_CLOSE = 0.01  # share of the target: nearer than this nothing is exchanged any more


def refined(levels: Tensor, utility: Tensor, table: Tensor, limits: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Levels int64 [B, S] after moves of one or two sub-layers by up to two levels each, while one brings the cost
    closer to ``target`` fp64 [B] from below; among those that come about equally close, the one of the best utility.

    ``utility`` is fp32 [B, S, K], ``table`` fp64 [S, K], ``limits`` the lowest and highest levels [S]. Expects levels
    whose cost does not exceed the target.
    """
    for _ in range(_EXCHANGES):
        moved, gap, left = _best_exchange(levels, utility, table, limits, target)
        closer = (left < gap * (1 - 1e-9)) & (gap > _CLOSE * target)
        if not closer.any():
            break
        levels = torch.where(closer[:, None], moved, levels)
    return levels


def _best_exchange(
    levels: Tensor, utility: Tensor, table: Tensor, limits: tuple[Tensor, Tensor], target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels after the best pair of moves, with the distances to the target, fp64 [B], before and after it."""
    now = table.expand(len(levels), -1, -1).gather(2, levels[..., None])
    gap = target - now.sum((1, 2))
    cost, gain = _moves(levels, utility, table, limits)
    left = gap[:, None, None] - cost[:, :, None] - cost[:, None, :]
    # Never beyond the target, and never two moves of one sub-layer.
    owner = torch.arange(cost.shape[1], device=cost.device) // len(_MOVES)
    left = left.masked_fill((left < -1e-9 * target[:, None, None]) | (owner[:, None] == owner), torch.inf)
    close = torch.maximum(1.5 * left.amin((1, 2)), _CLOSE * target)
    worth = (gain[:, :, None] + gain[:, None, :]).masked_fill(left > close[:, None, None], -torch.inf)
    best = worth.flatten(1).argmax(1)
    change = sum(_change(move, levels) for move in (best // cost.shape[1], best % cost.shape[1]))
    return levels + change, gap.abs(), left.flatten(1).gather(1, best[:, None])[:, 0].abs()


def _moves(levels: Tensor, utility: Tensor, table: Tensor, limits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cost fp64 and utility fp32 of every move of every sub-layer, [B, S·moves]; infinite where impossible."""
    minimum, maximum = (limit[:, None] for limit in limits)
    moved = levels[..., None] + torch.tensor(_MOVES, device=levels.device)
    possible = (moved >= minimum) & (moved <= maximum)
    moved = moved.clamp(minimum, maximum)
    table, now = table.expand(len(levels), -1, -1), levels[..., None]
    cost = (table.gather(2, moved) - table.gather(2, now)).masked_fill(~possible, torch.inf)
    return cost.flatten(1), (utility.gather(2, moved) - utility.gather(2, now)).flatten(1)


def _change(move: Tensor, levels: Tensor) -> Tensor:
    """By how much each of the moves [B] changes every level, int64 [B, S]."""
    size = torch.tensor(_MOVES, device=levels.device)[move % len(_MOVES)]
    owner = (move // len(_MOVES))[:, None] == torch.arange(levels.shape[1], device=levels.device)
    return owner * size[:, None]

"""All costs that policies can have, where these are few: for the nearest policy when no exchange comes near."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MOST = 1 << 18  # sums of known ones with the levels of one sub-layer that are looked at


class Sums:
    """``parts[s]`` fp64, sorted: what the first s sub-layers together can cost. Costs must add up without rounding."""

    def __init__(self, parts: list[np.ndarray], costs: list[np.ndarray], minimum: list[int]):
        self.parts, self.costs, self.minimum = parts, costs, minimum

    @classmethod
    def of(cls, table: Tensor, minimum: Tensor, maximum: Tensor) -> Sums | None:
        """The sums of ``table`` fp64 [S, K] between the levels ``minimum`` and ``maximum`` [S]; None of too many."""
        rows, low, high = table.cpu().numpy(), minimum.tolist(), maximum.tolist()
        costs = [row[a : b + 1] for row, a, b in zip(rows, low, high, strict=True)]
        parts = [np.zeros(1)]
        for cost in costs:
            if len(parts[-1]) * len(cost) > _MOST:
                return None
            parts.append(np.unique(parts[-1][:, None] + cost))
        return cls(parts, costs, low)

    def nearest(self, target: float, ceiling: bool) -> float:
        """The sum nearest to ``target``; with ``ceiling``, nearest of those that do not exceed it, if there is one."""
        every = self.parts[-1]
        place = int(np.searchsorted(every, target, side="right"))
        below, above = every[max(0, place - 1)], every[min(place, len(every) - 1)]
        return float(below if ceiling or target - below <= above - target else above)

    def levels(self, total: float, near: Tensor) -> Tensor:
        """Levels int64 [S] that cost ``total``, a sum; of those that do, from the last sub-layer on, each as ``near``
        as can be to the levels [S] given."""
        found = near.tolist()
        for index in range(len(found) - 1, -1, -1):
            rest, known = total - self.costs[index], self.parts[index]
            there = known[np.searchsorted(known, rest).clip(0, len(known) - 1)] == rest
            level = np.arange(len(rest)) + self.minimum[index]
            chosen = int(np.where(there, np.abs(level - found[index]), len(level) + 1).argmin())
            found[index], total = int(level[chosen]), float(rest[chosen])
        return torch.tensor(found, device=near.device)

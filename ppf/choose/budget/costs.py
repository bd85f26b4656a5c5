"""What policies cost: a table of every sub-layer's cost at every level, plus what does not depend on the policy.

Parameters, bytes and floating-point operations are exact; milliseconds come from a profile
(:mod:`ppf.deliver.profiling`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.grid import Grid


@dataclass(frozen=True)
class Costs:
    """``table`` fp64 [S, K] never falls with the level and stays at its last value beyond a sub-layer's maximum;
    ``constant`` is the cost of embeddings, head and the like; both in ``unit``."""

    table: Tensor
    constant: float
    unit: str

    def of(self, levels: Tensor) -> Tensor:
        """Total cost, fp64 [...], of int64 levels [..., S]."""
        table = self.table.to(levels.device)
        return table.gather(1, levels.flatten(0, -2).T).sum(0).view(levels.shape[:-1]) + self.constant

    def rounded_up(self, quantum: float) -> Costs:
        """The same in whole multiples of ``quantum``, a power of two: their sums are exact in any order."""
        return Costs((self.table / quantum).ceil() * quantum, math.ceil(self.constant / quantum) * quantum, self.unit)

    def range(self, grid: Grid) -> tuple[float, float]:
        """The least and the most that a policy of ``grid`` can cost."""
        least, most = self.of(torch.tensor((grid.minimum, grid.maximum))).tolist()
        return least, most


def linear(grid: Grid, per_unit: Sequence[float], constant: float, unit: str) -> Costs:
    """Costs that grow by the same amount with every unit of a sub-layer; ``per_unit`` has one number a sub-layer."""
    step = torch.tensor(per_unit, dtype=torch.float64) * torch.tensor(grid.steps, dtype=torch.float64)
    level = torch.arange(grid.levels, dtype=torch.float64)
    return Costs(step[:, None] * torch.minimum(level, torch.tensor(grid.maximum)[:, None]), constant, unit)


def parameters(grid: Grid) -> Costs:
    """Decoder parameters as :class:`ppf.model.structure.SubLayer` counts them; what belongs to no unit is left out."""
    return linear(grid, [sublayer.cost for sublayer in grid.structure.sublayers], 0, "parameters")


def weight_bytes(grid: Grid, element: int, other_parameters: int) -> Costs:
    """Bytes of all weights at ``element`` bytes each, with ``other_parameters`` outside the decoder's units."""
    return linear(grid, [element * s.cost for s in grid.structure.sublayers], element * other_parameters, "bytes")


def token_flops(grid: Grid, context: int, vocabulary: int) -> Costs:
    """Floating-point operations of one token that attends to ``context`` others: 2 a parameter, 4·g·d a position and
    kv-group for scores and values, 2·hidden·vocabulary for the head."""
    s = grid.structure
    groups = [2 * sublayer.cost + 4 * context * sublayer.columns for sublayer in s.attention]
    channels = [2 * sublayer.cost for sublayer in s.ffn]
    return linear(grid, groups + channels, 2 * s.hidden * vocabulary, "FLOPs per token")

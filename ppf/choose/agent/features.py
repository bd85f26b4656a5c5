"""What the actor and the critic see: features of the budget, and the state of every sub-layer's levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...model.grid import Grid
from ..candidates.sampling import RATIO_RANGE

_WAVES = 3
# Bumps over the range of ratios let the answer at one size differ from that at another without disturbing the rest.
_BUMPS = 27
BUDGET_FEATURES = 3 + 2 * _WAVES + _BUMPS
STATE_FEATURES = 6


def budget_features(ratio: Tensor) -> Tensor:
    """Features fp32 [B, F] of ratios [B]: powers, waves, and bumps over the range that is learnt."""
    low, high = RATIO_RANGE
    waves = [f(math.pi * k * ratio) for k in range(1, _WAVES + 1) for f in (torch.sin, torch.cos)]
    smooth = torch.stack([ratio, ratio.square(), torch.log1p(-ratio), *waves], dim=-1)
    centre = torch.linspace(low, high, _BUMPS, device=ratio.device)
    bumps = torch.exp(-(((ratio[:, None] - centre) * (_BUMPS - 1) / (high - low)).square()))
    return torch.cat((smooth, bumps), -1)


def state_features(grid: Grid, energies: Tensor) -> Tensor:
    """State of every level, fp32 [S, K, F]: level, depth, kind, and the library's error ``energies`` [S, K]."""
    layers = grid.structure.layers
    level = torch.arange(grid.levels) / torch.tensor(grid.top)[:, None]
    depth = torch.linspace(-1, 1, layers).repeat(2)[:, None].expand_as(level)
    kind = torch.cat((torch.ones(layers), -torch.ones(layers)))[:, None].expand_as(level)
    features = level.clamp_max(1), level.eq(0).float(), depth, kind, energies.float(), energies.float().sqrt()
    return torch.stack(features, -1)

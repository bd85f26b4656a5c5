"""Policies to learn from: random ones over all ratios, uniform ones, and neighbours of good ones."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ...model.grid import Grid
from ...model.policy import Policy
from ..budget.projection import check_ratio, projector_of

# The ratios that PPF learns and answers.
RATIO_RANGE = (0.05, 0.70)


def uniform_policy(grid: Grid, ratio: float) -> Policy:
    """The policy nearest to keeping the same share 1 − ratio of every sub-layer."""
    check_ratio(ratio, grid)
    fractions = torch.full((1, grid.sublayers), 1 - ratio)
    return grid.decode(projector_of(grid, fractions.device).nearest(fractions, torch.tensor([ratio])))[0]


def random_levels(grid: Grid, ratio: Tensor, generator: Generator) -> Tensor:
    """Random levels int64 [B, S] at the given ratios [B]; see :func:`random_fractions`."""
    return projector_of(grid, ratio.device).nearest(random_fractions(grid, ratio, generator), ratio)


def random_fractions(grid: Grid, ratio: Tensor, generator: Generator) -> Tensor:
    """Random kept shares fp32 [B, S] of policies around the given ratios [B], from near uniform to very uneven.

    A sub-layer's kept share is a sigmoid of noise whose scale itself is drawn from 0.2 to 2.5, plus a common shift of
    all attention sub-layers and a slope over depth: good policies are uneven in exactly these ways.
    """
    batch, layers = len(ratio), grid.structure.layers

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scale = 0.2 + 2.3 * torch.rand((batch, 1), generator=generator)
    depth = torch.linspace(-1, 1, layers).repeat(2)
    kind = torch.cat((torch.ones(layers), -torch.ones(layers)))
    logits = torch.logit(1 - ratio)[:, None] + scale * draw(batch, 2 * layers)
    logits += 0.5 * draw(batch, 1) * kind + 0.5 * draw(batch, 1) * depth
    return torch.sigmoid(logits)


def random_ratios(count: int, generator: Generator) -> Tensor:
    """``count`` ratios drawn evenly from :data:`RATIO_RANGE`, fp32."""
    low, high = RATIO_RANGE
    return low + (high - low) * torch.rand(count, generator=generator)


def mutate(
    levels: Tensor, grid: Grid, generator: Generator, swaps: int = 3, ratio: float | Tensor | None = None,
    ceiling: bool = False,
) -> Tensor:  # fmt: skip
    """Neighbours of levels int64 [B, S] at the budgets of ``ratio`` (one, or [B]), or each at its own: 1 to ``swaps``
    level swaps. With ``ceiling`` they never keep more than these leave. On the device of ``levels``.

    Give ``ratio`` when mutants are mutated again: every generation may be half a step off the one before.
    """
    projector = projector_of(grid, levels.device)
    own = 1 - projector.cost(levels) / grid.structure.decoder_parameters
    budget = own if ratio is None else torch.as_tensor(ratio, device=levels.device).to(own).expand(len(levels))
    fractions, weight = swapped(levels, grid, generator, swaps)
    return projector.nearest(fractions, budget, weight, ceiling)


def swapped(levels: Tensor, grid: Grid, generator: Generator, swaps: int = 3) -> tuple[Tensor, Tensor]:
    """Kept shares fp32 [B, S] of levels int64 [B, S] after 1 to ``swaps`` level swaps, not yet on any budget, and
    weights [B, S] with which to move them there. ``generator`` is a CPU's."""
    device, projector = levels.device, projector_of(grid, levels.device)
    count = torch.randint(1, swaps + 1, (len(levels), 1), generator=generator)
    noise = torch.rand(levels.shape, generator=generator)
    last = noise.sort(-1).values.gather(-1, (2 * count).clamp_max(noise.shape[-1]) - 1)
    chosen = noise <= last  # 2·count random sub-layers a row
    sign = torch.where(torch.rand(levels.shape, generator=generator) < 0.5, -1, 1)
    size = torch.randint(1, 3, levels.shape, generator=generator)
    moved = (levels + (chosen * sign * size).to(device)).clamp(projector.minimum, projector.maximum)
    # A little noise decides which of many equal neighbours pays for what the swaps leave over.
    noise = 1e-4 * torch.rand((*levels.shape, 1), generator=generator).to(device)
    return moved / projector.top, 1 + noise[..., 0]

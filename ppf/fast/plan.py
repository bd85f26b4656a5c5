"""What policies have in common. Policies are lists of levels in execution order (attention 0, FFN 0, attention 1, …);
sorted by levels, those that begin alike are neighbours."""

from __future__ import annotations

from collections.abc import Sequence


def executed(levels: Sequence[int]) -> list[int]:
    """Levels in the grid's order (all attention, then all FFN) put into execution order."""
    layers = len(levels) // 2
    return [levels[index // 2 + layers * (index % 2)] for index in range(2 * layers)]


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading sub-layers on which two policies agree."""
    return next((depth for depth, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def order(policies: Sequence[Sequence[int]]) -> list[int]:
    """Indices of the policies with those that begin alike side by side, the widest (nearest to dense) first."""
    return sorted(range(len(policies)), key=lambda index: tuple(policies[index]), reverse=True)

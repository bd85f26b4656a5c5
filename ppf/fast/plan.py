"""What policies have in common: the order to evaluate them in, and which activations to keep for the next one.

Policies are lists of levels in execution order (attention 0, FFN 0, attention 1, …). Sorted by levels, policies that
begin alike are neighbours, so each one starts where it leaves an earlier one: a walk through the tree of prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One policy of a walk: ``index`` in the caller's list, ``start`` sub-layers that an earlier policy (or the dense
    model) has run already, and the depths whose activations later policies start from."""

    index: int
    start: int
    keep: frozenset[int]


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


def walk(policies: Sequence[Sequence[int]], dense: Sequence[int]) -> list[Step]:
    """The steps of a depth-first walk. The first one starts as deep as it agrees with the ``dense`` levels."""
    ordered = order(policies)
    levels = [policies[index] for index in ordered]
    starts = [shared(dense, levels[0])] if levels else []
    starts += [shared(a, b) for a, b in zip(levels, levels[1:], strict=False)]
    return [Step(index, starts[at], _kept(starts, at)) for at, index in enumerate(ordered)]


def _kept(starts: list[int], at: int) -> frozenset[int]:
    """Depths at which policies after ``at`` branch off from it, deeper than its own start."""
    kept, still = set(), None
    for following in starts[at + 1 :]:
        still = following if still is None else min(still, following)
        if still <= starts[at]:
            break
        if still == following:
            kept.add(still)
    return frozenset(kept)

"""One policy at a time, on any device: prefix views of the ranked weights, and no sub-layer run twice in vain.

Policies go in the order of :mod:`ppf.fast.plan`; activations at their branching points are kept on a stack, those
of the dense model's first sub-layers for good, as far as they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...families import KINDS
from ...fast.losses import token_losses
from ...fast.plan import Step, executed, walk
from ...fast.sublayers import sublayers_of
from ...model.decoder import Decoder
from ...model.grid import Grid
from ...text import batches
from ..library import Library

# For activations of the dense model below the first pruned sub-layer.
_DENSE_BYTES = 2 << 30


class Serial:
    """Evaluates levels in execution order (attention 0, FFN 0, attention 1, …) on int64 ``sequences`` [N, T]."""

    def __init__(self, decoder: Decoder, grid: Grid, sequences: Tensor, library: Library | None):
        self.decoder, self.grid, self.library = decoder, grid, library
        self.parts = batches(sequences, decoder.device)
        self._run_sublayer = sublayers_of(decoder)
        self._dense_levels = executed(grid.maximum)
        self._dense: list[list[Tensor]] = [[] for _ in self.parts]  # of every part: depth 0, 1, …
        self._depth_limit = _DENSE_BYTES // max(1, sequences.numel() * grid.structure.hidden * decoder.dtype.itemsize)

    @torch.no_grad()
    def losses(self, levels: Sequence[Sequence[int]]) -> Tensor:
        """Summed negative log-likelihood of every policy, fp64 [P] in nats."""
        total = torch.zeros(len(levels), dtype=torch.float64, device=self.decoder.device)

        def add(index: int, part: int, hidden: Tensor) -> None:
            total[index] += token_losses(self.decoder.frame, hidden, self.parts[part]).double().sum()

        self.visit(levels, add)
        return total

    @torch.no_grad()
    def visit(self, levels: Sequence[Sequence[int]], use: Callable[[int, int, Tensor], None]) -> None:
        """Call ``use(index, part, hidden)`` for every policy and part of the text, with the final hidden states
        [B, T, hidden] of that part's tokens before the last norm."""
        steps = walk(levels, self._dense_levels)
        for part in range(len(self.parts)):
            stack: dict[int, Tensor] = {}
            for step in steps:
                use(step.index, part, self._run(step, levels[step.index], part, stack))

    def _run(self, step: Step, levels: Sequence[int], part: int, stack: dict[int, Tensor]) -> Tensor:
        for depth in [d for d in stack if d > step.start]:
            del stack[depth]
        start, x = self._state(step.start, part, stack)
        for depth in range(start, len(levels)):
            x = self._advance(x, depth, levels[depth])
            if depth + 1 in step.keep:
                stack[depth + 1] = x.clone()
        return x

    def _state(self, depth: int, part: int, stack: dict[int, Tensor]) -> tuple[int, Tensor]:
        """Activations at ``depth``, or at the deepest place above it that there is memory for; the caller may overwrite
        them."""
        if depth in stack:
            return depth, stack[depth].clone()
        known, depth = self._dense[part], min(depth, self._depth_limit)
        if not known:
            known.append(self.decoder.frame.begin(self.parts[part]))
        while len(known) <= depth:
            at = len(known) - 1
            known.append(self._advance(known[at].clone(), at, self._dense_levels[at]))
        return depth, known[depth].clone()

    def _advance(self, x: Tensor, depth: int, level: int) -> Tensor:
        """Activations after sub-layer ``depth`` at ``level``; may overwrite x [B, T, hidden]."""
        if not level:
            return x
        index, kind = depth // 2, KINDS[depth % 2]
        sublayer = index + (depth % 2) * self.grid.structure.layers
        told = self.decoder.frame.context(*x.shape[:2])[index]
        output = None if self.library is None else self.library.weight(sublayer, level)
        return self._run_sublayer(index, kind, level * self.grid.steps[sublayer], output, x, told)

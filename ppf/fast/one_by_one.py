"""Moves one after the other, on any device and for every family: prefix views of a layer's weights, cuBLAS on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..families import KINDS
from ..model.decoder import Decoder
from ..model.grid import Grid
from .layer_major import Move
from .losses import token_losses
from .outputs import Outputs
from .sublayers import sublayers_of


class OneByOne:
    """A :class:`ppf.fast.layer_major.Stepper`. ``library`` gives refitted output projections; None leaves the
    dense ones, cut.

    Moves go from the highest level to the lowest, the order in which a library solves levels, so that one solution
    exists at a time.
    """

    def __init__(self, decoder: Decoder, grid: Grid, library: Outputs | None):
        self.decoder, self.grid, self.library = decoder, grid, library
        self._run = sublayers_of(decoder)

    def begin(self, x: Tensor) -> list[Tensor]:
        return [x]

    def advance(self, index: int, kind: str, states: list[Tensor], moves: Sequence[Move]) -> list[Tensor]:
        left = Counter(source for source, _ in moves)
        after: list[Tensor | None] = [None] * len(moves)
        sublayer = index + KINDS.index(kind) * self.grid.structure.layers
        for level, output in self._outputs(sublayer, {level for _, level in moves}):
            for at, (source, wanted) in enumerate(moves):
                if wanted == level:
                    x = self._taken(states, source, left)
                    told = self.decoder.frame.context(*x.shape[:2])[index]
                    after[at] = self._run(index, kind, level * self.grid.steps[sublayer], output, x, told)
        for at, (source, level) in enumerate(moves):
            if not level:  # nothing is added; nobody else needs the source any more
                after[at] = states[source]
        return after

    def losses(self, states: list[Tensor], tokens: Tensor, scored: Tensor | None = None) -> Tensor:
        sums = []
        while states:  # let go of a state as soon as it is scored
            found = token_losses(self.decoder.frame, states.pop(0), tokens)
            sums.append((found if scored is None else found[scored[:, 1:]]).double().sum())
        return torch.stack(sums)

    def _outputs(self, sublayer: int, levels: set[int]) -> Iterable[tuple[int, Tensor | None]]:
        """Levels above 0 from the highest on, each with what replaces the output projection."""
        wanted = sorted(levels - {0}, reverse=True)
        if self.library is None:
            return [(level, None) for level in wanted]
        return self.library.descending(sublayer, wanted)

    @staticmethod
    def _taken(states: list[Tensor | None], source: int, left: Counter[int]) -> Tensor:
        """The source's activations, which may be overwritten: itself for the last move that needs it, else a copy."""
        left[source] -= 1
        if left[source]:
            return states[source].clone()
        x, states[source] = states[source], None
        return x

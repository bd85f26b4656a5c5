"""The library: for every sub-layer and level, the output projection refitted to reproduce the dense output best.

What is kept of it is :mod:`ppf.fitting.factors`; a level's weight is solved from them and the dense weight, or comes
from the levels that were solved before, if there is room for all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..families import KINDS
from ..memory import room
from ..model.decoder import Decoder
from ..model.grid import Grid
from .factors import Factors, boundaries_of, packed_size, solve, stored_dtype, widths_of

# The share of a GPU's free memory that solved levels may take; the rest is for activations.
_FREE_SHARE = 0.5


class Library:
    """Refitted output projections by sub-layer (numbered as in :class:`Grid`) and level.

    If the solutions of all levels of all sub-layers fit into ``cache_bytes`` (default: 8 GiB on a CPU, half of what is
    free on a GPU), a sub-layer's are solved together when the first one is asked for, and kept. Otherwise nothing is
    kept, and what is asked for is solved each time. The results are the same, bit for bit. Weights and factors are
    asked for layer by layer as the caller goes, so that both may stream.
    """

    def __init__(
        self, decoder: Decoder, grid: Grid, factors: Sequence[Mapping[str, Tensor]], dtype: torch.dtype | None = None,
        cache_bytes: int | None = None, errors: Sequence[Mapping[str, Tensor]] | None = None,
    ):  # fmt: skip
        """``decoder`` stands in ranking order. ``factors`` are the tensors of every layer's file
        (:data:`ppf.fitting.factors.STORED`), on any device. Of ``errors``, by default the same, "error" and
        "boundaries" are read here and now: give it if ``factors`` stream. ``dtype`` is what weights are handed out in,
        by default the decoder's.

        Raises ``InputError`` for a grid whose widths the factors do not have, ``KeyError`` for a missing tensor.
        """
        self.decoder, self.grid = decoder, grid
        self._factors, self._dtype = factors, dtype
        self._limit = _cache_room(decoder.device) if cache_bytes is None else cache_bytes
        known = factors if errors is None else errors
        self._widths = [widths_of(grid, *self._place(at)) for at in range(grid.sublayers)]
        self._known = [self._about(at, known) for at in range(grid.sublayers)]
        self._start_cache()

    def weight(self, sublayer: int, level: int) -> Tensor:
        """The refitted output projection, [hidden, width of that level]; at the highest one the decoder's own."""
        return next(self.descending(sublayer, (level,)))[1]

    def solved(self, sublayer: int, level: int) -> Tensor:
        """The same as :meth:`weight`, of a sub-layer that is asked for once: what is not kept yet is not kept now."""
        kept = self._cache.get(sublayer, {})
        return kept[level] if level in kept else next(self._solutions(sublayer, (level,)))[1]

    def descending(self, sublayer: int, levels: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Each of ``levels`` once, highest first, with its weight [hidden, width]. Those that are not kept are solved
        on the way: together they cost what the lowest one does."""
        wanted = sorted(set(levels), reverse=True)
        if not self._all_fit:
            yield from self._solutions(sublayer, wanted)
            return
        if sublayer not in self._cache:
            # Where layers stream nobody may hold several, and the full width's weight is a layer's own.
            kept = range(self.grid.maximum[sublayer] + self.decoder.resident)
            self._cache[sublayer] = dict(self._solutions(sublayer, kept))
        found = self._cache[sublayer]
        for level in wanted:
            yield (level, found[level]) if level in found else next(self._solutions(sublayer, (level,)))

    def regression(self, sublayer: int, level: int) -> Tensor:
        """What inputs of a sub-layer that leave hand to those that stay, R fp32 [n - width, width]: refits are linear
        in the dense weight W [hidden, n], W[:, :width] + W[:, width:] @ R, whatever W is by now. Not kept here."""
        _, factors = self._problem(sublayer)
        width, n = self._widths[sublayer][level], factors.boundaries[-1]
        leaving = torch.eye(n, device=self.decoder.device)[width:]
        return next(solve(leaving, factors, (width,)))[1]

    def levels(self, sublayer: int) -> Tensor:
        """The refitted output projections of all levels, [levels, hidden, n], zero past each width. Not kept here."""
        dense, _ = self._problem(sublayer)
        levels = range(self.grid.maximum[sublayer] + 1)
        stacked = dense.new_zeros(len(levels), *dense.shape, dtype=self._dtype)
        for level, weight in self._solutions(sublayer, levels):
            stacked[level, :, : weight.shape[1]] = weight
        return stacked

    def error(self, sublayer: int) -> Tensor:
        """Relative error energy of every level of a sub-layer (:class:`ppf.fitting.factors.Factors`), fp64 [levels];
        one zero where the model has none."""
        boundaries, error = self._known[sublayer]
        return error[[boundaries.index(width) for width in self._widths[sublayer]]]

    @property
    def outstanding(self) -> int:
        """Bytes that will be kept beside what is kept now."""
        if not self._all_fit:
            return 0
        return self._solved_bytes() - sum(w.nbytes for levels in self._cache.values() for w in levels.values())

    def to(self, dtype: torch.dtype) -> Library:
        """The same refits, handed out in ``dtype``: rounded to the decoder's first, as a checkpoint holds them."""
        if dtype is (self._dtype or self.decoder.dtype):
            return self
        other = copy.copy(self)
        other._dtype = dtype
        other._start_cache()
        return other

    def _start_cache(self) -> None:
        self._all_fit = self._solved_bytes() <= self._limit
        self._cache: dict[int, dict[int, Tensor]] = {}  # by sub-layer and level

    def _solved_bytes(self) -> int:
        columns = sum(sum(widths) for widths in self._widths)
        return self.grid.structure.hidden * (self._dtype or self.decoder.dtype).itemsize * columns

    def _solutions(self, sublayer: int, levels: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        widths = self._widths[sublayer]
        level_at = {width: level for level, width in enumerate(widths)}
        for width, weight in solve(*self._problem(sublayer), [widths[level] for level in levels]):
            yield level_at[width], weight if self._dtype is None else weight.to(self._dtype)

    def _problem(self, sublayer: int) -> tuple[Tensor, Factors]:
        """The dense weight [hidden, n] and its factors; n = 0 where the model has none."""
        kind, index = self._place(sublayer)
        if not self.grid.maximum[sublayer]:
            none = torch.empty(self.grid.structure.hidden, 0, dtype=self.decoder.dtype, device=self.decoder.device)
            return none, Factors(none.flatten(), *self._known[sublayer])
        packed = self._factors[index][f"{kind}.regression"]
        return self.decoder.output(index, kind), Factors(packed, *self._known[sublayer])

    def _about(self, sublayer: int, known: Sequence[Mapping[str, Tensor]]) -> tuple[tuple[int, ...], Tensor]:
        """The factors' boundaries and the error energies at them, on the CPU."""
        if not self.grid.maximum[sublayer]:
            return (0,), torch.zeros(1, dtype=torch.float64)
        kind, index = self._place(sublayer)
        boundaries = known[index][f"{kind}.boundaries"].tolist()
        if not set(self._widths[sublayer]) <= set(boundaries):
            problem = f"the run's library has only multiples of {math.gcd(*boundaries)} for the {kind} of layer {index}"
            remedy = "Use the run's own, or a multiple of it, or fit a new run"
            raise InputError("ffn-multiple", self.grid.ffn_multiple, problem, remedy)
        return tuple(boundaries), known[index][f"{kind}.error"].cpu()

    def _place(self, sublayer: int) -> tuple[str, int]:
        layers = self.grid.structure.layers
        return KINDS[sublayer // layers], sublayer % layers


def _cache_room(device: torch.device) -> int:
    return int(_FREE_SHARE * room(device)) if device.type == "cuda" else room(device)


def library_bytes(grid: Grid) -> int:
    """Bytes of the tensors of all factors of a model, in memory and on disk."""
    total = 0
    for kind in KINDS:
        for index, sublayer in enumerate(grid.structure.of(kind)):
            if sublayer.units:
                boundaries = boundaries_of(grid, kind, index)
                total += packed_size(boundaries) * stored_dtype(sublayer.width).itemsize + 16 * len(boundaries)
    return total

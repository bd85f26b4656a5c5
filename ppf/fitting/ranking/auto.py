"""The ranking that chooses itself: for every sub-layer the order of units that costs the whole model least.

No single score is best everywhere: which one is depends on the model, the sub-layer and how much goes (dev/LOG.md). So
several orders are tried for each sub-layer, at a few widths, on the model itself (:mod:`ppf.fitting.ranking.trials`),
and the one with the lowest damage wins: the geometric mean over the widths, so that none of them outweighs the others.
Where there are few kv-groups all of their orders are tried, for all of them share a few sets.

The sub-layers are tried one at a time, and what one of them loses depends on what the others have lost: the choice of
kv-groups can be wrong for a model that loses many at once, as dev/LOG.md has it of one, which is why this is not the
default.

An order is one nested sequence whatever won, so that policies stay prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor

from ... import ranks
from ...families import KINDS
from ...model.decoder import Decoder
from ...model.grid import Grid, unrestricted
from ...model.layer import LayerRanking
from ...progress import Progress, silent
from ...timings import timed
from ..calibration import LayerStatistics, calibrate
from .scores import rank_sublayer
from .trials import Kept, Trials, refitted

Scored = tuple[Tensor, Tensor | None]
"""Sequences int64 [N, T], and which of their tokens count, bool [N, T]; None for all."""
CANDIDATES = "wanda-sp", "flap-wifv", "obs"
"""What is tried for FFNs, and for the attention of many kv-groups. None needs all weights at once."""
MEASURED = "measured"
"""What the order of few kv-groups is called that none of the candidates has."""

# Shares of a sub-layer that stay in its trials; of few kv-groups every number of them does.
_SHARES = 0.75, 0.5, 0.25
# So many kv-groups have 24 orders, of which 14 sets are all that there is to try.
_FEW = 4
_HELD_BYTES = 512 << 20  # of all layers' Grams, to save the second pass
_LEAST = 1e-9  # nats a token: less is rounding


@dataclass(frozen=True)
class Chosen:
    """The rankings of all layers, None each for a run that names one; and by kind of sub-layer where each comes from:
    one of ``CANDIDATES``, "measured", or None where there was nothing to choose.

    ``statistics`` are those of all layers, if they are small: calibration need not go through the text again."""

    rankings: list[LayerRanking] | list[None]
    names: dict[str, list[str | None]]
    statistics: list[LayerStatistics] | None = None


@dataclass(frozen=True)
class _Heat:
    """Orders of one sub-layer by name, and which of the sets ``kept`` in trials each of them leads through."""

    kind: str
    orders: list[tuple[str, Tensor]]
    through: list[list[int]]
    kept: list[Kept]

    def results(self, damages: Sequence[float]) -> list[tuple[float, str, Tensor]]:
        """Cost, name and order, of all orders, given what the sets have cost."""
        scales = [math.log(max(damage, _LEAST)) if math.isfinite(damage) else math.inf for damage in damages]
        return [
            (sum(scales[at] for at in sets) / len(sets), *order)
            for order, sets in zip(self.orders, self.through, strict=True)
        ]


@timed("choosing rankings")
def choose_rankings(
    decoder: Decoder, grid: Grid, calibration: Scored, evaluation: Scored, progress: Progress = silent
) -> Chosen:
    """Try the candidates in every sub-layer of the dense ``decoder``, in checkpoint order, and choose.

    Candidates and refits come from the text ``calibration``, the choice from a little of ``evaluation``. All processes
    of a job call this together, share the trials, and get the same answer. Raises ``PPFError`` for activations that are
    not finite.
    """
    layers, heats = decoder.structure.layers, {}
    stream, trials = calibrate(decoder, *calibration), Trials(decoder, *evaluation, _trials(grid))
    held = [] if _gram_bytes(grid) <= _HELD_BYTES else None
    progress("rank", 0, layers)
    for index in range(layers):
        found = _heats(decoder, grid, index, _noted(held, next(stream)))
        trials.advance(index, {name: (heat.kind, heat.kept) for name, heat in found.items()})
        # The sets are on their way; here they would be all refits of the model.
        heats |= {(index, name): replace(heat, kept=[]) for name, heat in found.items()}
        del found
        progress("rank", index + 1, layers)
    damages = trials.damages()
    mine = {key: heat.results(damages[key]) for key, heat in heats.items()}
    results = {key: found for part in ranks.gather(mine) for key, found in part.items()}
    return replace(_chosen(grid, results), statistics=held)


def _noted(held: list[LayerStatistics] | None, statistics: LayerStatistics) -> LayerStatistics:
    if held is not None:
        held.append(statistics)
    return statistics


def _gram_bytes(grid: Grid) -> int:
    """What the Grams of all layers take."""
    return sum(torch.float32.itemsize * sublayer.width**2 for sublayer in grid.structure.sublayers)


def _chosen(grid: Grid, results: Mapping[tuple[int, str], Sequence[tuple[float, str, Tensor]]]) -> Chosen:
    """The cheapest order of every sub-layer; of equal ones the first."""
    structure, names, rankings = grid.structure, {kind: [] for kind in KINDS}, []
    for index in range(structure.layers):
        orders = {}
        for kind in KINDS:
            found = [one for name in _jobs(grid, index, kind) for one in results[index, name]]
            nothing = math.inf, None, torch.arange(structure.of(kind)[index].units)
            _, name, orders[kind] = min(found, key=lambda one: one[0], default=nothing)
            names[kind].append(name)
        rankings.append(LayerRanking(**orders))
    return Chosen(rankings, names)


def _jobs(grid: Grid, index: int, kind: str) -> list[str]:
    """What is tried of a sub-layer, each by one process: the name is the kind and a candidate, or the kind alone for
    all orders of few units. Empty where there is nothing to choose."""
    if not _widths(grid, index, kind):
        return []
    if grid.structure.of(kind)[index].units <= _FEW:
        return [kind]
    return [f"{kind}/{name}" for name in CANDIDATES]


def _widths(grid: Grid, index: int, kind: str) -> list[int]:
    """Units that stay in a sub-layer's trials, ascending."""
    grid = unrestricted(grid)
    at = index + KINDS.index(kind) * grid.structure.layers
    top, step = grid.maximum[at], grid.steps[at]
    levels = range(1, top) if top <= _FEW else {round(share * top) for share in _SHARES}
    return [level * step for level in sorted(levels)]


def _trials(grid: Grid) -> int:
    """How many trials there can be in all."""
    places = [(index, kind) for index in range(grid.structure.layers) for kind in KINDS]
    return sum(max(len(CANDIDATES), 5) * len(_widths(grid, *place)) for place in places)


def _heats(decoder: Decoder, grid: Grid, index: int, statistics: LayerStatistics) -> dict[str, _Heat]:
    """This process's jobs of one layer. They go round, so that an expensive candidate is not always the same one's."""
    names = [(kind, name) for kind in KINDS for name in _jobs(grid, index, kind)]
    mine = [pair for number, pair in enumerate(names, index) if number % ranks.world() == ranks.rank()]
    return {name: _heat(decoder, grid, index, kind, name, statistics) for kind, name in mine}


def _heat(
    decoder: Decoder, grid: Grid, index: int, kind: str, name: str, statistics: LayerStatistics
) -> _Heat:  # fmt: skip
    """The orders of one job, and what has to be tried for them: sets that orders share only once."""
    sublayer, found, place = decoder.structure.of(kind)[index], statistics.of(kind), {}
    orders, kept, output = list(_orders(decoder, index, kind, name, statistics)), [], decoder.output(index, kind)
    widths = _widths(grid, index, kind)
    for _, order in orders:
        new = [width for width in widths if _set(order, width) not in place]
        place |= {_set(order, width): len(kept) + at for at, width in enumerate(new)}
        kept += refitted(output, found, order, sublayer.columns, new) if new else []
    through = [[place[_set(order, width)] for width in widths] for _, order in orders]
    return _Heat(kind, orders, through, kept)


def _set(order: Tensor, width: int) -> tuple[int, ...]:
    return tuple(sorted(order[:width].tolist()))


def _orders(
    decoder: Decoder, index: int, kind: str, name: str, statistics: LayerStatistics
) -> Iterator[tuple[str, Tensor]]:
    """Names and orders of one job."""
    if name != kind:
        candidate = name.removeprefix(f"{kind}/")
        yield candidate, rank_sublayer(candidate, decoder, index, kind, statistics)
        return
    for order in permutations(range(decoder.structure.of(kind)[index].units)):
        yield MEASURED, torch.tensor(order)

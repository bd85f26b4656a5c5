"""Units into ranking order, by the channel gather: afterwards every policy is a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..families import KINDS
from ..model.decoder import Decoder
from ..model.layer import Layer, LayerMap, LayerRanking
from .ops.gather import gather_many

Job = tuple[Tensor, Tensor, int]
"""A matrix, the kept entries int64, and the dimension they are of."""


def unit_jobs(
    names: LayerMap, layer: Layer, kind: str, order: Tensor, with_output: bool = True
) -> Iterator[tuple[str, Job]]:
    """Name and gather of every tensor of a sub-layer that the units ``order`` have a part in."""
    for unit in names.unit_tensors(layer, kind):
        if with_output or unit.dim == 0:
            yield unit.name, (layer[unit.name], unit.index(order, names.units(kind)), unit.dim)


def gathered(jobs: Sequence[Job]) -> list[Tensor]:
    """The results of all jobs; vectors (biases) beside matrices."""
    matrices = [job for job in jobs if job[0].dim() == 2]
    found = iter(gather_many(matrices))
    return [next(found) if x.dim() == 2 else x[index.to(x.device)] for x, index, _ in jobs]


def permute_layer(names: LayerMap, layer: Layer, ranking: LayerRanking) -> dict[str, Tensor]:
    """One layer's weights with its units in ranking order; what has no units is shared, not copied."""
    pairs = [
        pair for kind in KINDS if len(ranking.of(kind)) for pair in unit_jobs(names, layer, kind, ranking.of(kind))
    ]
    moved = gathered([job for _, job in pairs])
    return dict(layer) | dict(zip([name for name, _ in pairs], moved, strict=True))


def permuted(decoder: Decoder, ranking: Sequence[LayerRanking]) -> Decoder:
    """The same model with every layer's units in ranking order; layers that stream are permuted when they arrive."""
    return decoder.changed(lambda index, layer: permute_layer(decoder.names(index), layer, ranking[index]))


def take_permuted(holder: list[Decoder], ranking: Sequence[LayerRanking]) -> Decoder:
    """The same for the resident decoder in ``holder``, which is emptied: if nobody else holds it, only one layer at a
    time exists twice."""
    decoder = holder.pop()
    layers, decoder = list(decoder.layers), replace(decoder, layers=())
    for index, order in enumerate(ranking):
        layers[index] = permute_layer(decoder.names(index), layers[index], order)
    return replace(decoder, layers=tuple(layers))


def identity(decoder: Decoder) -> list[LayerRanking]:
    """The ranking that leaves every unit where it is."""
    s = decoder.structure
    return [LayerRanking(torch.arange(a.units), torch.arange(f.units)) for a, f in zip(s.attention, s.ffn, strict=True)]

"""What the methods share that look at one layer at a time: its matrices, and shares that mean the same where layers
differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...model.decoder import Decoder
from ...model.structure import Structure


def projections(decoder: Decoder, index: int) -> Iterator[tuple[str, str, Tensor]]:
    """Kind of sub-layer, name in the layer and weight [out, in] of every projection of layer ``index``, inputs first;
    a fused projection is one matrix."""
    for kind, part in decoder.family.parts.items():
        if decoder.structure.of(kind)[index].units:
            for name in part.projections:
                yield kind, name, decoder.layers[index][f"{name}.weight"]


def layer_costs(structure: Structure) -> Tensor:
    """Parameters of all units of every layer, fp64 [L]."""
    pairs = zip(structure.attention, structure.ffn, strict=True)
    return torch.tensor([a.units * a.cost + f.units * f.cost for a, f in pairs], dtype=torch.float64)


def mean_over_layers(values: Tensor, structure: Structure) -> Tensor:
    """Mean of ``values`` [L], fp64, every layer weighted by its parameters: the plain one where layers are alike."""
    costs = layer_costs(structure)
    return (values * costs).sum() / costs.sum()


def positions(values: Sequence[float | None]) -> Tensor:
    """Where every value lies between the least and the greatest, fp64 [L] from 0 to 1; 0 for a layer that has none."""
    known = [value for value in values if value is not None]
    low, spread = min(known), max(max(known) - min(known), 1e-30)
    return torch.tensor([0.0 if v is None else (v - low) / spread for v in values], dtype=torch.float64)

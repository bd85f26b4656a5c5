"""One decoder layer's weights by name, and what a family's declaration makes of them: permuted, cut, or as views.

A layer is a mapping from names inside the layer (``self_attn.o_proj.weight``) to tensors, as nn.Linear stores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import Family
from .structure import Structure

Layer = Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerRanking:
    """Units of one layer by falling importance: int64 permutations of the kv-groups [G] and of the channels [C]."""

    attention: Tensor
    ffn: Tensor

    def of(self, kind: str) -> Tensor:
        return getattr(self, kind)


def expand_units(order: Tensor, size: int) -> Tensor:
    """Channel indices int64 [len(order)·size] of units that span ``size`` consecutive channels each."""
    return (order[:, None] * size + torch.arange(size, device=order.device)).flatten()


@dataclass(frozen=True)
class UnitTensor:
    """A tensor of a layer of which units have rows (``dim`` 0) or columns (1): ``segments`` of ``block`` entries a
    unit each, one after the other."""

    kind: str
    name: str
    dim: int
    segments: tuple[tuple[str, int], ...]

    def index(self, order: Tensor, units: int) -> Tensor:
        """Entries int64 along ``dim`` that the units ``order`` of ``units`` have, in that order."""
        parts, start = [], 0
        for _, block in self.segments:
            parts.append(start + expand_units(order, block))
            start += units * block
        return torch.cat(parts)


class LayerMap:
    """What the tensors of layer ``index`` of a family's model mean."""

    def __init__(self, family: Family, structure: Structure, index: int):
        self.family, self.structure, self.index = family, structure, index

    def units(self, kind: str) -> int:
        return self.structure.of(kind)[self.index].units

    def unit_tensors(self, layer: Layer, kind: str) -> Iterator[UnitTensor]:
        """The tensors of a sub-layer that units have a part in; the output projection comes last."""
        part = self.family.parts[kind]
        for name, roles in part.rows.items():
            segments = tuple((role, self.structure.block(kind, self.index, role)) for role in roles)
            for suffix in ("weight", "bias"):
                full = f"{part.module}.{name}.{suffix}"
                if full in layer:
                    yield UnitTensor(kind, full, 0, segments)
        if (output := f"{part.output_name}.weight") in layer:
            yield UnitTensor(kind, output, 1, (("output", self.structure.of(kind)[self.index].columns),))

    def outputs(self, layer: Layer) -> dict[str, Tensor]:
        """The output projections [hidden, n] that the layer has, by kind."""
        named = {kind: f"{part.output_name}.weight" for kind, part in self.family.parts.items()}
        return {kind: layer[name] for kind, name in named.items() if self.units(kind) and name in layer}

    def prefix(self, layer: Layer, kind: str, width: int, output: Tensor | None = None) -> dict[str, Tensor]:
        """All tensors of a sub-layer that keeps its first ``width`` units: views, but copies where a projection is
        fused. ``output`` replaces the output projection's weight, cut already. Width 0 is no tensors."""
        if not width:
            return {}
        part = self.family.parts[kind]
        kept = {name: tensor for name, tensor in layer.items() if part.owns(name)}
        for unit in self.unit_tensors(layer, kind):
            kept[unit.name] = _cut(layer[unit.name], unit, width, self.units(kind))
        if output is not None:
            kept[f"{part.output_name}.weight"] = output
        return kept

    def role(self, layer: Layer, kind: str, role: str, suffix: str, width: int) -> Tensor | None:
        """The first ``width`` units' rows of one role, a view; None if there is no such tensor."""
        units = self.units(kind)
        for unit in self.unit_tensors(layer, kind):
            start = 0
            for name, block in unit.segments:
                if name == role and unit.name.endswith(suffix):
                    return layer[unit.name].narrow(0, start, width * block)
                start += units * block
        return None


def _cut(tensor: Tensor, unit: UnitTensor, width: int, units: int) -> Tensor:
    parts, start = [], 0
    for _, block in unit.segments:
        parts.append(tensor.narrow(unit.dim, start, width * block))
        start += units * block
    return parts[0] if len(parts) == 1 else torch.cat(parts, unit.dim)

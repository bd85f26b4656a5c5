"""The prunable geometry of a model: for every layer and kind of sub-layer, how many units there are and what one costs.

Layers may differ in the dense model already. Made from a configuration by :func:`ppf.model.geometry.structure_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any

from ..families import KINDS


@dataclass(frozen=True)
class SubLayer:
    """One sub-layer of one layer; a unit is what is removed: a kv-group, or an FFN channel.

    ``units``: how many there are, 0 if the sub-layer is absent. ``cost``: parameters of a unit, rows with their biases
    and columns of the output projection; norms and the output's bias belong to no unit and are left out of every ratio.
    ``columns``: columns of the output projection a unit has. ``step``: units that only go together.
    """

    units: int
    cost: int
    columns: int
    step: int = 1

    @property
    def width(self) -> int:
        """Columns of the whole output projection."""
        return self.units * self.columns


@dataclass(frozen=True)
class Structure:
    """The sub-layers of L layers, by kind; sizes that are never pruned beside them."""

    hidden: int
    head_dim: int
    attention: tuple[SubLayer, ...]
    ffn: tuple[SubLayer, ...]

    @property
    def layers(self) -> int:
        """L."""
        return len(self.attention)

    def of(self, kind: str) -> tuple[SubLayer, ...]:
        """The sub-layers of one kind, one a layer."""
        return getattr(self, kind)

    @cached_property
    def sublayers(self) -> tuple[SubLayer, ...]:
        """All sub-layers as grids number them: every attention, then every FFN."""
        return tuple(sublayer for kind in KINDS for sublayer in self.of(kind))

    @cached_property
    def decoder_parameters(self) -> int:
        """Parameters of all units of all layers: the denominator of every ratio."""
        return sum(sublayer.units * sublayer.cost for sublayer in self.sublayers)

    def block(self, kind: str, layer: int, role: str) -> int:
        """Rows that a unit of this sub-layer has in the rows of ``role``."""
        if role in ("key", "value"):
            return self.head_dim
        return self.of(kind)[layer].columns

    def to_dict(self) -> dict[str, Any]:
        """For JSON: sizes, and [units, cost, columns, step] of every sub-layer."""
        rows = {kind: [[s.units, s.cost, s.columns, s.step] for s in self.of(kind)] for kind in KINDS}
        return {"hidden": self.hidden, "head_dim": self.head_dim} | rows

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Structure:
        """Inverse of :meth:`to_dict`. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        rows = {kind: tuple(SubLayer(*map(index, row)) for row in data[kind]) for kind in KINDS}
        if len({len(layers) for layers in rows.values()}) != 1:
            raise ValueError("its kinds of sub-layer differ in their number of layers")
        return cls(index(data["hidden"]), index(data["head_dim"]), **rows)

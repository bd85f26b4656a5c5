"""Selections: which units of every layer a model keeps, as another tool says it.

A policy says how many, a selection says which. As a ranking with the kept units first, it is the prefix of a policy, so
that the masked evaluation scores it as it scores any policy: one channel gather, no surgery.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..families import KINDS
from ..fast.permute import permuted
from ..model.decoder import Decoder
from ..model.grid import Grid
from ..model.layer import LayerRanking
from ..model.policy import Policy
from ..model.structure import Structure
from ..storage.schemas import read_as
from .evaluation import Evaluator

FORMAT = 1
_REMEDY = (
    f'Write {{"format": {FORMAT}, "kept": {{"attention": [[kv-groups that layer 0 keeps], …], '
    '"ffn": [[channels that layer 0 keeps], …]}}'
)


@dataclass(frozen=True)
class Selection:
    """Indices of the kv-groups and of the channels that every layer keeps, as the model numbers them, in any order. A
    sub-layer that keeps none is absent, with its biases and norms."""

    attention: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]

    def of(self, kind: str) -> tuple[tuple[int, ...], ...]:
        """The kept units of one kind of sub-layer, by layer."""
        return getattr(self, kind)

    @property
    def policy(self) -> Policy:
        """How many units are kept."""
        return Policy(**{kind: [len(kept) for kept in self.of(kind)] for kind in KINDS})

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "kept": {kind: [list(kept) for kept in self.of(kind)] for kind in KINDS}}

    @classmethod
    def from_dict(cls, data: Any) -> Selection:
        """Inverse of :meth:`to_dict`. Raises ``InputError`` for anything else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            given = data.get("format", "(none)") if isinstance(data, dict) else type(data).__name__
            raise InputError("selection.format", given, "is not a format this PPF reads", _REMEDY)
        kept = data.get("kept")
        if not isinstance(kept, dict) or set(kept) != set(KINDS):
            given = sorted(kept) if isinstance(kept, dict) else type(kept).__name__
            raise InputError("selection.kept", given, f"is not a map with the kinds {', '.join(KINDS)}", _REMEDY)
        return cls(**{kind: tuple(_units(kind, layers)) for kind, layers in kept.items()})

    @classmethod
    def read(cls, path: str | Path) -> Selection:
        """The selection in a JSON file. Raises ``InputError`` for anything else."""
        return cls.from_dict(read_as(Any, "selection", path, _REMEDY))

    def check(self, structure: Structure) -> None:
        """Raise ``InputError`` unless a model of ``structure`` can keep these units."""
        for kind in KINDS:
            layers = self.of(kind)
            if len(layers) != structure.layers:
                remedy = f"Give one list for each layer: {structure.layers}"
                raise InputError(f"selection.{kind}", f"{len(layers)} lists", "are not as many as layers", remedy)
            for index, kept in enumerate(layers):
                _check_units(f"selection.{kind}[{index}]", kept, structure.of(kind)[index].units)
                _check_number(kind, index, len(kept), structure)

    def ranking(self, structure: Structure) -> list[LayerRanking]:
        """Every layer's kept units first, the others behind them; both as they stand in the model."""
        return [
            LayerRanking(**{kind: _kept_first(self.of(kind)[i], structure.of(kind)[i].units) for kind in KINDS})
            for i in range(structure.layers)
        ]


def selection_evaluator(decoder: Decoder, selection: Selection, sequences: Tensor) -> Evaluator:
    """An evaluator whose policy ``selection.policy`` keeps just these units of ``decoder``, which stands in checkpoint
    order; int64 ``sequences`` [N, T]. Raises ``InputError`` for units that the model cannot keep."""
    selection.check(decoder.structure)
    ranked = permuted(decoder, selection.ranking(decoder.structure))
    return Evaluator(ranked, Grid(decoder.structure, 1), sequences)


def _units(kind: str, layers: Any) -> Iterator[tuple[int, ...]]:
    if not isinstance(layers, list):
        raise InputError(f"selection.kept.{kind}", type(layers).__name__, "is not a list of lists", _REMEDY)
    for index, kept in enumerate(layers):
        if not isinstance(kept, list) or any(type(unit) is not int for unit in kept):
            raise InputError(f"selection.kept.{kind}[{index}]", kept, "is not a list of whole numbers", _REMEDY)
        yield tuple(kept)


def _check_units(field: str, kept: tuple[int, ...], units: int) -> None:
    seen: set[int] = set()
    for unit in kept:
        if not 0 <= unit < units:
            remedy = f"Use numbers from 0 to {units - 1}" if units else "The model has none here: leave it empty"
            raise InputError(field, unit, f"is not one of the {units} units of this sub-layer", remedy)
        if unit in seen:
            raise InputError(field, unit, "stands there twice", "Name every unit once")
        seen.add(unit)


def _check_number(kind: str, index: int, kept: int, structure: Structure) -> None:
    field, step = f"selection.{kind}[{index}]", structure.of(kind)[index].step
    if (kind, index) == ("attention", 0) and not kept:
        raise InputError(field, "[]", "is empty, and layer 0 must keep some attention", "Keep at least one kv-group")
    if kept % step:
        problem = "are some of the units of a sub-layer whose units only go together"
        raise InputError(field, f"{kept} units", problem, f"Keep all {step} of them, or none")


def _kept_first(kept: tuple[int, ...], units: int) -> Tensor:
    stays = torch.zeros(units, dtype=torch.bool)
    stays[torch.tensor(kept, dtype=torch.int64)] = True
    return torch.cat((stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]))

"""The tensors of a sub-layer by what they do, whatever the family calls them: what fast paths compute with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor

from ..families import Family
from .layer import Layer, LayerMap


class _Tensors:
    def tensors(self) -> Iterator[Tensor]:
        """All tensors that there are."""
        found = (getattr(self, f.name) for f in fields(self))
        return (value for value in found if isinstance(value, Tensor))


@dataclass(frozen=True)
class Attention(_Tensors):
    """G kv-groups of g query heads of d numbers each; H is the hidden size. What a family has not is None."""

    norm: Tensor | None  # [H]
    q: Tensor  # [G·g·d, H]
    k: Tensor  # [G·d, H]
    v: Tensor  # [G·d, H]
    o: Tensor  # [H, G·g·d]
    q_bias: Tensor | None = None  # [G·g·d]
    k_bias: Tensor | None = None  # [G·d]
    v_bias: Tensor | None = None  # [G·d]
    o_bias: Tensor | None = None  # [H]
    q_norm: Tensor | None = None  # [d]
    k_norm: Tensor | None = None  # [d]
    after: Tensor | None = None  # [H]
    head_dim: int = 0  # d

    def prefix(self, groups: int, output: Tensor | None = None) -> Attention:
        """Views of the first ``groups`` kv-groups; ``output`` [H, groups·g·d] replaces the output projection."""
        d = self.head_dim
        rows, keys = groups * (self.q.shape[0] // self.k.shape[0]) * d, groups * d
        return Attention(
            self.norm, self.q[:rows], self.k[:keys], self.v[:keys], self.o[:, :rows] if output is None else output,
            _first(self.q_bias, rows), _first(self.k_bias, keys), _first(self.v_bias, keys), self.o_bias,
            self.q_norm, self.k_norm, self.after, d,
        )  # fmt: skip


@dataclass(frozen=True)
class FeedForward(_Tensors):
    """C channels."""

    norm: Tensor | None  # [H]
    gate: Tensor  # [C, H]
    up: Tensor  # [C, H]
    down: Tensor  # [H, C]
    gate_bias: Tensor | None = None  # [C]
    up_bias: Tensor | None = None  # [C]
    down_bias: Tensor | None = None  # [H]
    after: Tensor | None = None  # [H]

    def prefix(self, width: int, output: Tensor | None = None) -> FeedForward:
        """Views of the first ``width`` channels; ``output`` [H, width] replaces the output projection."""
        down = self.down[:, :width] if output is None else output
        biases = _first(self.gate_bias, width), _first(self.up_bias, width), self.down_bias
        return FeedForward(self.norm, self.gate[:width], self.up[:width], down, *biases, self.after)


def _first(vector: Tensor | None, count: int) -> Tensor | None:
    return None if vector is None else vector[:count]


def attention_of(family: Family, names: LayerMap, layer: Layer, width: int, output: Tensor | None = None) -> Attention:
    """Views of the first ``width`` kv-groups; ``output`` [H, width·g·d] replaces the output projection."""
    part, kind = family.attention, "attention"
    rows = {role: names.role(layer, kind, role, ".weight", width) for role in ("query", "key", "value")}
    biases = {role: names.role(layer, kind, role, ".bias", width) for role in ("query", "key", "value")}
    return Attention(
        _norm(layer, part.before), rows["query"], rows["key"], rows["value"],
        _output(names, layer, kind, width) if output is None else output,
        biases["query"], biases["key"], biases["value"], layer.get(f"{part.output_name}.bias"),
        *(layer.get(f"{part.module}.{part.head_norms.get(role)}.weight") for role in ("query", "key")),
        _norm(layer, part.after), names.structure.head_dim,
    )  # fmt: skip


def ffn_of(family: Family, names: LayerMap, layer: Layer, width: int, output: Tensor | None = None) -> FeedForward:
    """Views of the first ``width`` channels; ``output`` [H, width] replaces the output projection."""
    part, kind = family.ffn, "ffn"
    gate, up = (names.role(layer, kind, role, ".weight", width) for role in ("gate", "up"))
    biases = (names.role(layer, kind, role, ".bias", width) for role in ("gate", "up"))
    down = _output(names, layer, kind, width) if output is None else output
    down_bias = layer.get(f"{part.output_name}.bias")
    return FeedForward(_norm(layer, part.before), gate, up, down, *biases, down_bias, _norm(layer, part.after))


def _norm(layer: Layer, name: str | None) -> Tensor | None:
    return layer.get(f"{name}.weight") if name else None


def _output(names: LayerMap, layer: Layer, kind: str, width: int) -> Tensor:
    weight = layer[f"{names.family.parts[kind].output_name}.weight"]
    return weight[:, : width * names.structure.of(kind)[names.index].columns]

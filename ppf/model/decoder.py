"""A whole model as plain tensors: layers by name, what lies outside them, and the family that says what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import InputError
from ..families import Family, family_of
from ..families.traits import traits_of
from .build import LAYERS, TIED
from .frame import Frame
from .geometry import structure_of
from .layer import Layer, LayerMap
from .reference import Reference
from .stream import Change, Stream
from .structure import Structure
from .views import Attention, FeedForward, attention_of, ffn_of


@dataclass(frozen=True)
class Decoder:
    """The weights of a language model. Names in ``layers`` are those inside a layer, in ``outer`` full.

    ``layers`` are a tuple where they are resident, else a :class:`ppf.model.stream.Stream`: go through them in order.
    """

    family: Family
    config: PreTrainedConfig
    structure: Structure
    layers: Sequence[Layer]
    outer: Mapping[str, Tensor]

    @classmethod
    def of_state(cls, config: PreTrainedConfig, state: Mapping[str, Tensor]) -> Decoder:
        """From a state dict under the model's own names."""
        layers: list[dict[str, Tensor]] = [{} for _ in range(config.num_hidden_layers)]
        outer = {}
        for name, tensor in state.items():
            if name.startswith(LAYERS):
                index, inside = name.removeprefix(LAYERS).split(".", 1)
                layers[int(index)][inside] = tensor.detach()
            elif name != TIED[0] or not config.tie_word_embeddings:
                outer[name] = tensor.detach()
        return cls.of_layers(config, tuple(layers), outer)

    @classmethod
    def of_layers(cls, config: PreTrainedConfig, layers: Sequence[Layer], outer: Mapping[str, Tensor]) -> Decoder:
        """From layers and what lies outside them; a tied head is not among that."""
        family = family_of(config.model_type)
        return cls(family, config, structure_of(family, config), layers, outer)

    @classmethod
    def of_model(cls, model: Any) -> Decoder:
        """The weights of a transformers model of a known family, by reference."""
        return cls.of_state(model.config, model.state_dict())

    @property
    def resident(self) -> bool:
        """True if all layers are in the device's memory."""
        return not isinstance(self.layers, Stream)

    def require_resident(self, what: str) -> None:
        """Raise ``InputError`` if layers stream, for ``what`` needs all of them at once."""
        if not self.resident:
            remedy = "Choose another, or a device with more memory (--weights gpu insists)"
            raise InputError("weights", "host or disk", f"is not possible with {what}", remedy)

    @property
    def token_bytes(self) -> int:
        """What a token's activations inside a layer take at most, in bytes: some vectors of the hidden size, queries,
        keys and values with their rotated copies, four of the FFN's."""
        s = self.structure
        attention, ffn = (max(part.width for part in parts) for parts in (s.attention, s.ffn))
        return (6 * s.hidden + 6 * attention + 4 * ffn) * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        return self.outer[TIED[1]].device

    @property
    def dtype(self) -> torch.dtype:
        return self.outer[TIED[1]].dtype

    @cached_property
    def traits(self) -> frozenset[str]:
        """What the arithmetic has beyond a plain Llama's."""
        return traits_of(self.family, self.config)

    @cached_property
    def frame(self) -> Frame:
        """What is around the layers."""
        return Frame(self.family, self.config, self.outer)

    @cached_property
    def reference(self) -> Reference:
        """transformers' own layers, at any widths."""
        return Reference(self.family, self.config, self.structure, self.frame.attention)

    def names(self, index: int) -> LayerMap:
        """What the tensors of layer ``index`` mean."""
        return LayerMap(self.family, self.structure, index)

    def output(self, index: int, kind: str) -> Tensor:
        """The output projection [hidden, n] of a sub-layer."""
        return self.layers[index][f"{self.family.parts[kind].output_name}.weight"]

    def attention(self, index: int, width: int, output: Tensor | None = None) -> Attention:
        """Views of the first ``width`` kv-groups of a layer; ``output`` replaces the output projection."""
        return attention_of(self.family, self.names(index), self.layers[index], width, output)

    def ffn(self, index: int, width: int, output: Tensor | None = None) -> FeedForward:
        """Views of the first ``width`` channels of a layer; ``output`` replaces the output projection."""
        return ffn_of(self.family, self.names(index), self.layers[index], width, output)

    def to(self, dtype: torch.dtype) -> Decoder:
        """The same weights in ``dtype``; no copy if they have it already."""
        if dtype is self.dtype:
            return self
        outer = {name: tensor.to(dtype) for name, tensor in self.outer.items()}
        return replace(self.changed(lambda _, layer: {n: t.to(dtype) for n, t in layer.items()}), outer=outer)

    def changed(self, change: Change) -> Decoder:
        """The model with every layer after ``change(index, layer)``; of layers that stream, when they are read."""
        if isinstance(self.layers, Stream):
            return replace(self, layers=self.layers.map(change))
        return replace(self, layers=tuple(change(index, layer) for index, layer in enumerate(self.layers)))

    def state(self) -> dict[str, Tensor]:
        """The state dict under the model's own names."""
        inside = {f"{LAYERS}{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.items()}
        return inside | dict(self.outer)

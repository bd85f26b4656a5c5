"""A whole model as plain tensors: layers by name, what lies outside them, and the family that says what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..families import Family, family_of
from ..families.traits import traits_of
from .build import LAYERS, TIED
from .frame import Frame
from .geometry import structure_of
from .layer import Layer, LayerMap
from .reference import Reference
from .structure import Structure
from .views import Attention, FeedForward, attention_of, ffn_of


@dataclass(frozen=True)
class Decoder:
    """The weights of a language model. Nothing is copied; names in ``layers`` are those inside a layer, in ``outer``
    full."""

    family: Family
    config: PreTrainedConfig
    structure: Structure
    layers: tuple[Layer, ...]
    outer: Mapping[str, Tensor]

    @classmethod
    def of_state(cls, config: PreTrainedConfig, state: Mapping[str, Tensor]) -> Decoder:
        """From a state dict under the model's own names."""
        family = family_of(config.model_type)
        layers: list[dict[str, Tensor]] = [{} for _ in range(config.num_hidden_layers)]
        outer = {}
        for name, tensor in state.items():
            if name.startswith(LAYERS):
                index, inside = name.removeprefix(LAYERS).split(".", 1)
                layers[int(index)][inside] = tensor.detach()
            elif name != TIED[0] or not config.tie_word_embeddings:
                outer[name] = tensor.detach()
        return cls(family, config, structure_of(family, config), tuple(layers), outer)

    @classmethod
    def of_model(cls, model: Any) -> Decoder:
        """The weights of a transformers model of a known family, by reference."""
        return cls.of_state(model.config, model.state_dict())

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
        layers = tuple({name: tensor.to(dtype) for name, tensor in layer.items()} for layer in self.layers)
        return replace(self, layers=layers, outer={name: tensor.to(dtype) for name, tensor in self.outer.items()})

    def state(self) -> dict[str, Tensor]:
        """The state dict under the model's own names."""
        inside = {f"{LAYERS}{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.items()}
        return inside | dict(self.outer)

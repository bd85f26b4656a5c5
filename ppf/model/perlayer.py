"""A family's own transformers classes, built with widths of their own in every layer. Absent sub-layers do not exist.

One mechanism for all families: the model is the family's, made without layers; then every layer is the family's own
decoder layer, made from the configuration as that layer sees it. What a layer lacks is taken out of it again, and
contributes exactly zero. So forward passes, rotary embeddings, masks and caches are transformers' own.

This file needs nothing but torch and transformers: exports for readers without PPF carry it as it is.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationConfig


class LayerConfig:
    """A model's configuration as one layer sees it: its own widths, and everything else as the model has it now."""

    def __init__(self, config: Any, own: dict[str, int]):
        self.__dict__.update(own, _shared=config)

    def __getattr__(self, name: str) -> Any:
        if name == "_shared":
            raise AttributeError(name)
        return getattr(self._shared, name)


class Absent(nn.Module):
    """In the place of a sub-layer that a layer lacks: no parameters, and a result of exactly zero."""

    def __init__(self, results: int):
        super().__init__()
        self.results = results

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        zero = hidden_states.new_zeros(())
        return zero if self.results == 1 else (zero,) + (None,) * (self.results - 1)


class PerLayerConfig:
    """Mixed into a family's configuration: ``per_layer_config`` maps a layer to the width fields that differ there.

    The global fields hold the dense geometry. Zeros in all width fields of a sub-layer mean that it is absent. Reading
    a field that differs between layers raises transformers' ``AmbiguousGlobalPerLayerAttributeError``; use
    ``config.per_layer_config[i]`` or :meth:`layer_widths`. Raises ``ValueError`` for widths that no layer can have.
    """

    # Layers differ in their number of kv heads, so no single tensor-parallel split fits all of them.
    base_model_tp_plan = None
    # No code comes with the weights. TRL asks this of every configuration whose model is not one of transformers' own.
    auto_map = {}

    def layer_widths(self) -> list[tuple[int, int, int]]:
        """(query heads, kv heads, FFN channels) of every layer, length L."""
        fields = [field for part in self.ppf_parts for field in part["fields"]]
        return [tuple(getattr(layer, field) for field in fields) for layer in self.per_layer_config]

    def validate_architecture(self) -> None:
        """Instead of the family's check, which may refuse head counts that do not divide the hidden size."""
        fields = {field for part in self.ppf_parts for field in part["fields"]}
        if self.is_heterogeneous:
            for index, override in self._heterogeneity_spec.per_layer_overrides.items():
                if unknown := sorted(set(override) - fields):
                    raise ValueError(f"per_layer_config[{index}] overrides {unknown}; only {sorted(fields)} may differ")
        for index, widths in enumerate(self.layer_widths()):
            _validate_layer(index, *widths)

    def validate_rope(self) -> None:
        """The family's check, on the dense geometry: it may read head counts."""
        super(PerLayerConfig, without_layers(self)).validate_rope()


def _validate_layer(index: int, heads: Any, kv_heads: Any, channels: Any) -> None:
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (heads, kv_heads, channels)):
        raise ValueError(f"layer {index}: widths {(heads, kv_heads, channels)} are not integers of at least 0")
    if (heads == 0) != (kv_heads == 0) or (kv_heads and heads % kv_heads):
        raise ValueError(f"layer {index}: {heads} attention heads are no multiple of {kv_heads} key/value heads")
    # The cache and the causal mask take the sequence length from layer 0.
    if index == 0 and heads == 0:
        raise ValueError("layer 0 has no attention; it must keep at least one key/value head")


class PerLayerModel:
    """Mixed into a family's model: its embeddings, last norm and rotary embeddings, and layers of their own widths."""

    def __init__(self, config: Any):
        super().__init__(without_layers(config))
        _adopt(self, config)
        self.layers = nn.ModuleList(
            decoder_layer(self.ppf_layer_class, config, config.ppf_parts, index)
            for index in range(config.num_hidden_layers)
        )
        self.post_init()


class PerLayerForCausalLM:
    """Mixed into a family's language model: its head over a :class:`PerLayerModel`. Weights have the family's names.

    All caches of ``generate()`` work; only assisted and prompt-lookup decoding need transformers > 5.17, whose caches
    cannot crop a layer without attention.
    """

    def __init__(self, config: Any):
        super().__init__(without_layers(config))
        _adopt(self, config)
        self.model = self.ppf_model_class(config)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

    def _get_static_cache_init_shape(self) -> tuple[list[int], int] | None:
        """Shapes for generate()'s eager cache; transformers 5.17 reads one global head count, which does not exist."""
        if len(set(getattr(self, "hf_device_map", {}).values())) > 1:
            return None
        return [kv_heads for _, kv_heads, _ in self.config.layer_widths()], self.config.head_dim


def _adopt(model: Any, config: Any) -> None:
    """Give a model that was made from a copy its own configuration, with what transformers decided on the way."""
    config._attn_implementation = model.config._attn_implementation
    model.config = config


def without_layers(config: Any) -> Any:
    """A configuration with the model's dense widths and no layers: what everything but the layers is made from."""
    shell = copy.copy(config)
    shell.__dict__.pop("_heterogeneity_spec", None)
    shell.num_hidden_layers = 0
    return shell


def decoder_layer(layer_class: type, config: Any, parts: tuple[dict[str, Any], ...], index: int) -> nn.Module:
    """The family's decoder layer ``index`` with its own widths; what is absent there is taken out.

    ``parts`` has for each kind of sub-layer its "module", the "norms" that go with it, its width "fields", and the
    number of "results" that the module gives.
    """
    layer = config.per_layer_config[index]
    widths = {field: getattr(layer, field) for part in parts for field in part["fields"]}
    # An absent sub-layer is made as small as can be, and thrown away.
    module = layer_class(LayerConfig(config, {field: width or 1 for field, width in widths.items()}), index)
    for part in parts:
        if not all(widths[field] for field in part["fields"]):
            setattr(module, part["module"], Absent(part["results"]))
            for norm in part["norms"]:
                setattr(module, norm, nn.Identity())
    return module


def make_classes(
    name: str, model_type: str, stock: dict[str, type], parts: tuple[dict[str, Any], ...], home: str
) -> dict[str, type]:
    """The "Config", "Model" and "ForCausalLM" classes of a family's results, called ``name`` + those, of module
    ``home``.

    ``stock`` has the family's own classes under the same keys, and its "DecoderLayer".
    """
    of_home = {"__module__": home}
    config = strict(
        type(
            f"{name}Config", (PerLayerConfig, stock["Config"]), of_home | {"model_type": model_type, "ppf_parts": parts}
        )
    )
    fields = of_home | {"config_class": config}
    model = type(f"{name}Model", (PerLayerModel, stock["Model"]), fields | {"ppf_layer_class": stock["DecoderLayer"]})
    causal = type(
        f"{name}ForCausalLM", (PerLayerForCausalLM, stock["ForCausalLM"]), fields | {"ppf_model_class": model}
    )
    made = {"Config": config, "Model": model, "ForCausalLM": causal}
    for made_class in made.values():
        setattr(sys.modules[home], made_class.__name__, made_class)
    return made

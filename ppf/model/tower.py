"""Multimodal models whose text tower has layers of their own widths: transformers' own classes around a result of PPF.

transformers' configuration of a wrapper such as Gemma 3 insists on its own configuration of the tower. Ours takes the
one that the tower's ``model_type`` names. Everything else is the wrapper's; its model builds the tower with AutoModel.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from huggingface_hub.dataclasses import strict

from ..families import families, tower_of
from .classes import classes_of

PREFIX = "ppf_"


class _AnyTower:
    """Mixed into a wrapper's configuration: ``text_config`` is of the class that its own ``model_type`` names."""

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            self.text_config = classes_of(fields.get("model_type"))["Config"](**fields)
        super().__post_init__(**kwargs)


class _Wrapper:
    """Mixed into a wrapper's model."""

    def _get_static_cache_init_shape(self) -> tuple[list[int], int] | None:
        """As the tower's own: transformers 5.17 reads one global head count, which does not exist."""
        if len(set(getattr(self, "hf_device_map", {}).values())) > 1:
            return None
        text = self.config.text_config
        return [kv_heads for _, kv_heads, _ in text.layer_widths()], text.head_dim


def wrapper_model(model_type: str) -> type:
    """transformers' own class of the whole model of a multimodal ``model_type``."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[model_type]]


@cache
def tower_type(model_type: str) -> str:
    """The ``model_type`` of the text tower of a multimodal ``model_type`` whose configuration does not state it."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]().text_config.model_type


@cache
def wrapper_classes(model_type: str) -> dict[str, type]:
    """The "Config" and "ForConditionalGeneration" of wrappers around results, for the wrapper's own ``model_type``;
    known to the Auto classes from now on as ``ppf_`` + that."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM
    from transformers import conversion_mapping as conversion

    stock, ours, name = wrapper_model(model_type), f"{PREFIX}{model_type}", config_name(model_type)
    of_home = {"__module__": __name__}
    config = strict(type(name, (_AnyTower, CONFIG_MAPPING[model_type]), of_home | {"model_type": ours}))
    model = type(f"PPF{stock.__name__}", (_Wrapper, stock), of_home | {"config_class": config})
    AutoConfig.register(ours, config, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(config, model, exist_ok=True)
    # How names on disk and names in the model differ goes by the model type.
    mapping = conversion.get_checkpoint_conversion_mapping(model_type)
    if mapping is not None:
        conversion.register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)
    made = {"Config": config, "ForConditionalGeneration": model}
    for made_class in made.values():  # where pickle looks for them
        setattr(sys.modules[__name__], made_class.__name__, made_class)
    return made


def config_name(model_type: str) -> str:
    """Name of the configuration class of wrappers around results, for the wrapper's own ``model_type``."""
    return f"PPF{model_type.title().replace('_', '')}WrapperConfig"


def announced_classes(model_type: str) -> dict[str, type]:
    """The classes of a model type of ours, be it a language model's or a wrapper's."""
    wrapped = model_type.removeprefix(PREFIX)
    return wrapper_classes(wrapped) if tower_of(wrapped) else classes_of(model_type)


def __getattr__(name: str) -> type:
    """Classes by name, made when first asked for: unpickling asks."""
    if name.startswith("PPF"):
        for model_type in {model_type for family in families() for model_type in family.towers}:
            for made in wrapper_classes(model_type).values():
                if made.__name__ == name:
                    return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

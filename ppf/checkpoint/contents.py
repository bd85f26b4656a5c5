"""What a checkpoint folder holds: config.json made a configuration, headers sorted by what they are for."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import InputError, shown
from ..families import Family, family_of
from ..model.build import TIED
from ..model.classes import classes_of
from ..model.tower import PREFIX, wrapper_model
from .blame import attempt
from .bounds import Held, require_ids, require_plain, require_rotation, require_sizes
from .headers import SETTINGS_BYTES, StoredTensor, read_headers, read_json, require_weights
from .weights import read_tensors
from .wrapper import Wrapper, wrapper_of

# Computed from the configuration, but stored by older versions of transformers; it ignores them, wherever they lie.
_ROTARY = r"rotary_emb\.inv_freq"
# Which code runs is decided where the model is loaded, never by a file.
_CODE = "attn_implementation", "experts_implementation", "auto_map"
# What makes transformers give plain weights of quantised ones.
_UNDONE = {
    "fp8": "quantization_config=FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "quantization_config=Mxfp4Config(dequantize=True)",
    "bitsandbytes": "model.dequantize()",
}
# Names that transformers' configurations take although they are properties of theirs.
_TAKEN = "rope_scaling", "torch_dtype", "per_layer_config"


@dataclass(frozen=True)
class Contents:
    """``stored``: the language model's tensors under the names of a text-only model. ``passengers``: all others, under
    their names on disk; only a wrapper has any. ``data``: the language model's part of config.json. ``notes``: what
    was not taken as the files say."""

    config: PreTrainedConfig
    family: Family
    stored: dict[str, StoredTensor]
    passengers: dict[str, StoredTensor]
    wrapper: Wrapper | None
    data: Mapping[str, Any]
    notes: tuple[str, ...]


def read_contents(folder: Path) -> Contents:
    """Read ``config.json`` and the headers of ``folder``, an existing one.

    Raises ``InputError`` naming field, value and remedy for a model type that PPF does not know, and for fields that
    the headers contradict or that transformers refuses. Reads no weights, unless a head is stored beside the embedding
    that it is tied to: these are compared.
    """
    file = folder / "config.json"
    require_weights(folder)
    data = read_json(file, SETTINGS_BYTES)
    require_plain(file, data)
    if data.get("quantization_config"):
        raise _quantised(file, data["quantization_config"])
    wrapper_type = _require_known(file, data)
    found = read_headers(folder)
    wrapper = wrapper_of(file, data, found) if wrapper_type else None
    text = wrapper.text if wrapper else data
    family = family_of(text["model_type"], file)
    config_class, model_class = _classes(family, text)
    _require_architecture(file, data, wrapper, family)
    stored, passengers = _sort(found, wrapper, model_class)
    ours = config_class.model_type != family.model_type
    require_sizes(file, text, family, Held.of(folder, stored), ours)
    config = attempt(file, text, partial(make_config, config_class))
    config._name_or_path = str(folder)
    require_ids(file, config)
    require_rotation(file, config)
    notes = _settle_head(folder, config, stored)
    return Contents(config, family, stored, passengers, wrapper, text, notes)


def _quantised(file: Path, said: Any) -> InputError:
    method = str(said.get("quant_method", "unknown") if isinstance(said, dict) else said)
    remedy = "Use the model that it was made from"
    if _UNDONE.get(method):
        remedy += f", or open it in transformers with {_UNDONE[method]} and save_pretrained(FOLDER), and use that"
    problem = f"the weights are quantised ({file}), and PPF prunes float32, float16 and bfloat16"
    return InputError("quantization_config", method[:80], problem, remedy)


def make_config(config_class: type[PreTrainedConfig], data: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of ``data`` without what is no field, but would overwrite something of the class, or choose
    code to run."""
    own = {field.name for field in fields(config_class)}
    usable = {
        name: copy.deepcopy(value)
        for name, value in data.items()
        if name in own or name in _TAKEN or not (name.startswith("_") or name in _CODE or hasattr(config_class, name))
    }
    return config_class.from_dict(usable)


def _require_known(file: Path, data: Mapping[str, Any]) -> bool:
    """Whether ``data`` is of a multimodal model. Raises ``InputError`` for model types that nobody registered."""
    from ..families import tower_of

    model_type = data.get("model_type")
    if isinstance(model_type, str) and tower_of(model_type.removeprefix(PREFIX)):
        return True
    family_of(model_type, file)
    return False


def _classes(family: Family, data: Mapping[str, Any]) -> tuple[type, type]:
    """The configuration and model class: PPF's if layers have widths of their own, whatever the model type says."""
    model_type = family.result_type if data.get("per_layer_config") is not None else data["model_type"]
    made = classes_of(model_type)
    return made["Config"], made["ForCausalLM"]


def _require_architecture(file: Path, data: Mapping[str, Any], wrapper: Wrapper | None, family: Family) -> None:
    names, model_type = data.get("architectures"), data["model_type"]
    stock = wrapper_model(wrapper.model_type) if wrapper else classes_of(family.model_type)["ForCausalLM"]
    expected = f"PPF{stock.__name__}" if model_type.startswith(PREFIX) else stock.__name__
    # Case aside: the first conversions of Llama wrote LLaMAForCausalLM.
    if names and not (isinstance(names, list) and [str(name).lower() for name in names] == [expected.lower()]):
        problem = f"{file} is not of the class that PPF prunes for {model_type}"
        raise InputError("architectures", names, problem, f"Supported: {expected}")


def _sort(
    found: Mapping[str, StoredTensor], wrapper: Wrapper | None, model_class: type
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The language model's tensors and the passengers; without what transformers ignores in a language model."""
    patterns = [_ROTARY, *(model_class._keys_to_ignore_on_load_unexpected or ())]
    ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
    stored, passengers = {}, {}
    for name, tensor in found.items():
        inside = wrapper.inside(name) if wrapper else name
        if inside is None:
            passengers[name] = tensor
        elif not ignored.search(inside):
            stored[inside] = tensor
    return stored, passengers


def _settle_head(folder: Path, config: PreTrainedConfig, stored: dict[str, StoredTensor]) -> tuple[str, ...]:
    """Forget a stored head that equals the embedding it is tied to; untie one that does not, as transformers does."""
    head, embedding = TIED
    if not config.tie_word_embeddings or head not in stored:
        return ()
    if _same(stored[head], stored[embedding]):
        del stored[head]
        return ()
    config.tie_word_embeddings = False
    said = f"config.json ties {head} to the embedding, but the weights hold another one; taken as not tied"
    note = f"{shown(folder)}: {said}"
    warnings.warn(f"ppf: {note}", stacklevel=4)
    return (note,)


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(tensor for _, tensor in read_tensors({"one": one, "other": other})))

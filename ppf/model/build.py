"""From a configuration and tensors to a transformers model, and from a dense configuration and a policy to a result's.

A uniform policy gives the family's stock class, any other the family's own class with ``per_layer_config``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..errors import InputError
from ..families import KINDS, Family, family_of
from ..families.traits import traits_of
from .classes import classes_of
from .geometry import head_dim_of, structure_of
from .perlayer import without_layers
from .policy import Policy
from .structure import Structure

TIED = "lm_head.weight", "model.embed_tokens.weight"
LAYERS = "model.layers."
# Fields that belong to one config class or one saved file, not to the model's computation.
_NOT_CARRIED = ("model_type", "architectures", "transformers_version", "per_layer_config", "auto_map")


def pruned_config(dense: PreTrainedConfig, policy: Policy) -> PreTrainedConfig:
    """The config of ``dense`` pruned to ``policy``.

    A uniform policy without zeros gives the family's stock config (for Llama a Mistral's where Llama's refuses the head
    count, the same computation), all others its ``per_layer_config`` form. Raises ``InputError`` for widths that
    ``dense`` cannot have.
    """
    family = family_of(dense.model_type)
    structure = structure_of(family, dense)
    _check_widths(structure, policy)
    common = {key: value for key, value in dense.to_dict().items() if key not in (*_NOT_CARRIED, *family.width_fields)}
    common["head_dim"] = structure.head_dim
    layers = [
        {k: v for kind in KINDS for k, v in family.fields(kind, policy[kind][i], _heads(structure, kind, i)).items()}
        for i in range(structure.layers)
    ]
    alike = all(layer == layers[0] for layer in layers)
    if alike and all(layers[0].values()):
        found = _uniform(family, dense, common | layers[0])
        if found is not None:
            return found
    if common.get("layer_types"):
        common["layer_types"] = _types(common["layer_types"], policy)
    dense_fields = _dense_fields(family, dense)
    return classes_of(family.result_type)["Config"](**common, **dense_fields, per_layer_config=dict(enumerate(layers)))


def policy_of(config: PreTrainedConfig) -> Policy:
    """The widths of a dense, uniform or non-uniform model; inverse of :func:`pruned_config`."""
    family = family_of(config.model_type)
    layers = [family.widths(config.per_layer_config[index]) for index in range(config.num_hidden_layers)]
    return Policy(**{kind: [layer[kind][0] for layer in layers] for kind in KINDS})


def dense_structure(config: PreTrainedConfig) -> Structure:
    """The structure before pruning of ``config``'s model, as its configuration still tells it: the global fields of one
    whose layers have widths of their own. Of a uniform result nothing but its own sizes is left."""
    family = family_of(config.model_type)
    if config.model_type != family.result_type:
        return structure_of(family, config)
    common = {key: value for key, value in config.to_dict().items() if key not in (*_NOT_CARRIED, *family.width_fields)}
    common["head_dim"] = head_dim_of(config)
    dense = classes_of(family.model_type)["Config"](**common, **_dense_fields(family, config))
    return structure_of(family, dense)


def expected_tensors(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Name and shape of every weight of ``config``'s model; a tied head is not listed."""
    shapes = {name: tensor.shape for name, tensor in _on_meta(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(TIED[0])
    return shapes


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """``config``'s model without weights: its parameters, in ``dtype``, have shapes only."""
    model = _on_meta(config).to(dtype)
    model.config.dtype = dtype
    return model


def build(
    config: PreTrainedConfig,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype,
    generation_config: GenerationConfig | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """The model of ``config`` holding ``state_dict``, in eval mode, on the tensors' device.

    Tensors that already have ``dtype`` are taken over without a copy. Nothing is initialised at random: missing,
    unexpected and misshapen tensors raise ``InputError``. With tied embeddings ``lm_head.weight`` may be left out.
    ``generation_config`` (say the dense model's) is carried over; ``model_class`` replaces the class of ``config``.
    """
    model = _on_meta(config, model_class)
    state_dict = _complete(model, config, state_dict)
    cast = {name: tensor.detach().to(dtype) for name, tensor in state_dict.items()}
    model.load_state_dict(cast, strict=True, assign=True)
    model.tie_weights()
    _compute_buffers(model, config, cast[TIED[1]].device)
    model.config.dtype = dtype
    if "score cap" in traits_of(family_of(config.model_type), config):
        model.set_attn_implementation("eager")  # the others leave the cap out
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model.eval()


def check_shapes(field: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ``InputError`` about ``field`` unless both name the same tensors with the same shapes."""
    remedy = "Weights and config do not belong together: get both from the same source"
    for name in expected:
        if name not in found:
            raise InputError(field, name, "this tensor of the config's model is missing", remedy)
        if tuple(found[name]) != tuple(expected[name]):
            shapes = f"has shape {list(found[name])}, the config needs {list(expected[name])}"
            raise InputError(field, name, shapes, remedy)
    for name in found:
        if name not in expected:
            raise InputError(field, name, "the config's model has no such tensor", remedy)


def _heads(structure: Structure, kind: str, layer: int) -> int:
    """Query heads of a kv-group; 1 for kinds that have none."""
    return structure.of(kind)[layer].columns // structure.head_dim if kind == "attention" else 1


def _types(layer_types: list[str], policy: Policy) -> list[str]:
    """The layers' types, of those without attention that of layer 0: transformers takes the length of a type's mask
    from the cache of the first layer of that type, which must have one."""
    return [t if width else layer_types[0] for t, width in zip(layer_types, policy.attention, strict=True)]


def _dense_fields(family: Family, dense: PreTrainedConfig) -> dict[str, int]:
    """The dense geometry as global fields, from a configuration whose layers may differ already."""
    get = dense._getattr_without_heterogeneous_validation
    fields = {name: get(name) for name in family.width_fields}
    return {name: fields["num_attention_heads"] if value is None else value for name, value in fields.items()}


def _uniform(family: Family, dense: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedConfig | None:
    """A stock config with ``fields``, or None if no stock class takes them and computes what is meant."""
    for model_type in (family.model_type, *family.uniform):
        config_class = classes_of(model_type)["Config"]
        known = fields if model_type == family.model_type else _known(config_class, fields)
        try:
            found = config_class(**known)
        except Exception:  # transformers' validators raise many kinds; what one class refuses another may take
            continue
        other = family_of(model_type)
        if traits_of(other, found) == traits_of(family, dense) and not _has_bias(fields, known):
            return found
    return None


def _known(config_class: type, fields: dict[str, Any]) -> dict[str, Any]:
    """Of another family's ``fields`` those that ``config_class`` has, and no window, which it would have by default."""
    own = vars(config_class())
    return {name: value for name, value in fields.items() if name in own} | {"sliding_window": None}


def _has_bias(fields: dict[str, Any], known: dict[str, Any]) -> bool:
    return any(value and name.endswith("_bias") and name not in known for name, value in fields.items())


def _check_widths(structure: Structure, policy: Policy) -> None:
    for kind in KINDS:
        widths, sublayers = policy[kind], structure.of(kind)
        if len(widths) != structure.layers:
            remedy = f"Give one per layer: {structure.layers}"
            raise InputError(f"policy.{kind}", list(widths), f"has {len(widths)} widths", remedy)
        for layer, (width, sublayer) in enumerate(zip(widths, sublayers, strict=True)):
            low = 1 if (kind, layer) == ("attention", 0) else 0
            if not low <= width <= sublayer.units or width % sublayer.step:
                remedy = f"Use a multiple of {sublayer.step} from {low} to {sublayer.units}"
                raise InputError(f"policy.{kind}[{layer}]", width, "the model cannot have this width", remedy)


def _on_meta(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    with torch.device("meta"):
        return (model_class or classes_of(config.model_type)["ForCausalLM"])(config)


def _complete(model: PreTrainedModel, config: PreTrainedConfig, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``given`` with the tied head added, after checking names and shapes."""
    state_dict = dict(given)
    head, embedding = TIED
    if config.tie_word_embeddings and embedding in state_dict:
        if head in state_dict and not _same(state_dict[head], state_dict[embedding]):
            remedy = "Set tie_word_embeddings to false, or leave the head out"
            raise InputError("state_dict", head, "differs from the embedding it is tied to", remedy)
        state_dict[head] = state_dict[embedding]
    check_shapes(
        "state_dict",
        {name: tensor.shape for name, tensor in model.state_dict().items()},
        {name: tensor.shape for name, tensor in state_dict.items()},
    )
    return state_dict


def _compute_buffers(model: PreTrainedModel, config: PreTrainedConfig, device: torch.device) -> None:
    """Give the model what is computed, not loaded: rotary frequencies, embedding scales. transformers computes it, in a
    model without layers and with a vocabulary of one token."""
    small = without_layers(config)
    small.vocab_size, small.pad_token_id, small.head_dim = 1, None, head_dim_of(config)
    stock = classes_of(family_of(config.model_type).model_type)["Model"](small).eval()
    for name, child in stock.named_children():
        if isinstance(child, nn.ModuleList):
            continue
        if not any(True for _ in child.parameters()):
            setattr(model.model, name, child.to(device))
            continue
        for buffer_name, buffer in child.named_buffers():
            owner = getattr(model.model, name).get_submodule(buffer_name.rpartition(".")[0])
            setattr(owner, buffer_name.rpartition(".")[2], buffer.to(device))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))

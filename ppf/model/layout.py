"""Which Hugging Face model holds a policy's weights: uniform policies an ordinary one, all others ``PPFLlama``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..errors import InputError
from .configuration import LAYER_FIELDS, PPFLlamaConfig
from .modeling import PPFLlamaForCausalLM
from .policy import Policy
from .structure import Structure

MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "ppf_llama": PPFLlamaForCausalLM,
}
"""Model class of every ``model_type`` that PPF writes and reads."""

TIED = "lm_head.weight", "model.embed_tokens.weight"

# Fields that belong to one config class or one saved file, not to the model's computation.
_NOT_CARRIED = ("model_type", "architectures", "transformers_version", "per_layer_config", *LAYER_FIELDS)
# Fields of LlamaConfig that MistralConfig does not know; require_supported() has checked that they say nothing.
_NOT_MISTRAL = ("attention_bias", "mlp_bias", "pretraining_tp")


def require_supported(config: PreTrainedConfig) -> None:
    """Raise ``InputError`` if ``config`` uses a feature of Llama that PPF does not prune."""
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False):
            raise InputError(field, True, "biases are not supported yet", f"Use a model with {field} = false")
    if config.hidden_act != "silu":
        raise InputError("hidden_act", config.hidden_act, "only SwiGLU FFNs are supported", "Use a model with silu")


def pruned_config(dense: LlamaConfig, policy: Policy) -> PreTrainedConfig:
    """The config of ``dense`` pruned to ``policy``.

    A uniform policy without zeros gives a ``LlamaConfig``, or a ``MistralConfig`` with ``sliding_window=None`` where
    ``LlamaConfig`` refuses the head count because it does not divide the hidden size (the same computation). All
    other policies give a ``PPFLlamaConfig``. Raises ``InputError`` for widths that ``dense`` cannot have, or if it is
    no Llama.
    """
    if dense.model_type != LlamaConfig.model_type:
        raise InputError("model_type", dense.model_type, "is no dense Llama", "Prune the LlamaForCausalLM it came from")
    require_supported(dense)
    structure = Structure.from_config(dense)
    _check_widths(structure, policy)
    common = {key: value for key, value in dense.to_dict().items() if key not in _NOT_CARRIED}
    common["head_dim"] = structure.head_dim
    if not policy.is_uniform or 0 in policy.attention + policy.ffn:
        return _heterogeneous_config(common, structure, policy)
    widths = _layer_fields(structure, policy.attention[0], policy.ffn[0])
    if structure.hidden % widths["num_attention_heads"] == 0:
        return LlamaConfig(**common, **widths)
    common = {key: value for key, value in common.items() if key not in _NOT_MISTRAL}
    return MistralConfig(**common, **widths, sliding_window=None)


def policy_of(config: PreTrainedConfig) -> Policy:
    """The widths of a dense, uniform or non-uniform model; inverse of :func:`pruned_config`."""
    if isinstance(config, PPFLlamaConfig):
        widths = config.layer_widths()
        return Policy([kv_heads for _, kv_heads, _ in widths], [channels for _, _, channels in widths])
    structure = Structure.from_config(config)
    return Policy([structure.kv_groups] * structure.layers, [structure.channels] * structure.layers)


def expected_tensors(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Name and shape of every weight of ``config``'s model; a tied head is not listed."""
    shapes = {name: tensor.shape for name, tensor in _on_meta(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(TIED[0])
    return shapes


def build(
    config: PreTrainedConfig,
    state_dict: dict[str, Tensor],
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
    # The rotary buffers are no weights: they are still on meta, and are computed here as transformers computes them.
    rotary = type(model.model.rotary_emb)(config=model.config)
    model.model.rotary_emb = rotary.to(cast[TIED[1]].device)
    model.config.dtype = dtype
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model.eval()


def _on_meta(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    with torch.device("meta"):
        return (model_class or MODEL_CLASSES[config.model_type])(config)


def _complete(model: PreTrainedModel, config: PreTrainedConfig, given: dict[str, Tensor]) -> dict[str, Tensor]:
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


def check_shapes(field: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
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


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def _heterogeneous_config(common: dict[str, Any], structure: Structure, policy: Policy) -> PPFLlamaConfig:
    layers = {
        index: _layer_fields(structure, groups, channels)
        for index, (groups, channels) in enumerate(zip(policy.attention, policy.ffn, strict=True))
    }
    dense = _layer_fields(structure, structure.kv_groups, structure.channels)
    return PPFLlamaConfig(**common, **dense, per_layer_config=layers)


def _layer_fields(structure: Structure, groups: int, channels: int) -> dict[str, int]:
    return dict(zip(LAYER_FIELDS, (groups * structure.heads_per_group, groups, channels), strict=True))


def _check_widths(structure: Structure, policy: Policy) -> None:
    limits = ("attention", policy.attention, structure.kv_groups), ("ffn", policy.ffn, structure.channels)
    for name, widths, high in limits:
        if len(widths) != structure.layers:
            remedy = f"Give one per layer: {structure.layers}"
            raise InputError(f"policy.{name}", list(widths), f"has {len(widths)} widths", remedy)
        for layer, width in enumerate(widths):
            low = 1 if (name, layer) == ("attention", 0) else 0
            if not low <= width <= high:
                remedy = f"Use a width from {low} to {high}"
                raise InputError(f"policy.{name}[{layer}]", width, "the model cannot have this width", remedy)

"""The Nemotron-NAS form (DeciLM): one ``block_configs`` entry a layer, for readers that know it.

It can leave sub-layers out and vary FFN widths, but has one number of query heads for the whole model, and its readers
take hidden size over query heads for the head size. So attention must be whole or absent in every layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError
from ...families.traits import unserved
from ...model.grid import PORTABLE_MULTIPLE
from .hf import write_copy
from .source import Source, check_destination

_CONFIGURATION = Path(__file__).with_name("configuration_decilm.py")
_FAMILIES = "llama", "mistral"
_PORTABLE = "Fit and prune with --portable, or export to hf or gguf, which keep every layer's own widths"


def to_deci(source: Source, output: str | Path, force: bool = False) -> dict[str, Any]:
    """Write ``source`` as a DeciLM folder; returns what ``ppf.json`` says about the export.

    Weights and tokenizer stay as they are. Raises ``InputError``, before anything is written, for families and
    arithmetic other than a plain Llama's, and where layers have different numbers of query heads, or fewer than hidden
    size / head size, or an FFN width that is no multiple of 256.
    """
    check_destination(source, output, force)
    code = {_CONFIGURATION.name: _CONFIGURATION.read_text(encoding="utf-8")}
    return write_copy(source, output, {"format": "deci"}, force, deci_config(source), code)


def deci_config(source: Source) -> dict[str, Any]:
    """The fields of config.json that differ from Llama's; None removes one."""
    config = source.config
    _require_llama(source)
    heads = config.hidden_size // source.head_dim
    _require_global_heads(source, heads)
    _require_multiples(source)
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "num_attention_heads": heads,
        "num_key_value_heads": max(kv_heads for _, kv_heads, _ in source.widths),
        "intermediate_size": max(channels for _, _, channels in source.widths) or PORTABLE_MULTIPLE,
        "block_configs": [_block(*widths, hidden=config.hidden_size) for widths in source.widths],
        "per_layer_config": None,
        # Beside rope_parameters, for readers older than transformers 5.
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else rope,
    }


def _block(heads: int, kv_heads: int, channels: int, hidden: int) -> dict[str, Any]:
    """Readers compute the width as 2·ffn_mult·hidden/3, rounded up to a multiple of 256, and kv heads as heads over
    n_heads_in_group."""
    attention = {"no_op": not heads, "n_heads_in_group": heads // kv_heads if heads else None}
    ffn = {"no_op": not channels, "ffn_mult": 3 * channels / (2 * hidden) if channels else None}
    return {
        "attention": attention | {"replace_with_linear": False, "sparsify": None, "window_length": None},
        "ffn": ffn | {"replace_with_linear": False, "sparsify": None},
    }


def _require_llama(source: Source) -> None:
    """DeciLM's layers are Llama's. A Mistral without a window is one too."""
    if source.is_tower or source.family.model_type not in _FAMILIES:
        raise _unlike(source, f"DeciLM has the layers of {' and '.join(_FAMILIES)} only")
    if reason := unserved(source.traits, ()):
        raise _unlike(source, f"DeciLM's readers cannot run it: {reason}")
    if source.biases:
        raise _unlike(source, f"PPF writes no biases for DeciLM, this model has: {', '.join(sorted(source.biases))}")


def _unlike(source: Source, problem: str) -> InputError:
    return InputError("architecture", source.config.model_type, problem, "Export to hf or gguf")


def _require_global_heads(source: Source, heads: int) -> None:
    for index, (own, _, _) in enumerate(source.widths):
        if own not in (0, heads):
            problem = f"DeciLM has one number of query heads for all layers with attention, {heads} in this model"
            raise InputError(f"query heads of layer {index}", own, problem, _PORTABLE)


def _require_multiples(source: Source) -> None:
    for index, (_, _, channels) in enumerate(source.widths):
        if channels % PORTABLE_MULTIPLE:
            problem = f"DeciLM's readers round FFN widths up to a multiple of {PORTABLE_MULTIPLE}"
            raise InputError(f"FFN channels of layer {index}", channels, problem, _PORTABLE)

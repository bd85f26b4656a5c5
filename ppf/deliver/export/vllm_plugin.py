"""The ``vllm.general_plugins`` entry point: vLLM calls :func:`register` in every process it starts.

vLLM (up to 0.27 at least) reads head counts off the global config, which a heterogeneous config of transformers refuses
to answer. So in vLLM's processes our results get configurations of their own: global fields hold the largest layer's
values, which is what vLLM plans with, and ``block_configs`` holds every layer's, in the form of vLLM's own DeciLM.

Written against vLLM's public interfaces and tested against stand-ins for them; it has not been run in a real vLLM.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig

# Named, not imported: importing a model class may initialise CUDA, and vLLM forks afterwards.
MODEL_CLASS = "ppf.deliver.export.vllm_model:PPFLlamaForCausalLM"
_COUNTS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class Block(dict):
    """A JSON object whose fields are attributes too: vLLM's models read it, its hashes serialise it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@strict
class ServedConfig(LlamaConfig):
    """``ppf_llama`` as vLLM sees it."""

    model_type = "ppf_llama"
    block_configs: list | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict(_served(config_dict), **kwargs)

    def validate_architecture(self) -> None:
        """Instead of Llama's check that the heads divide the hidden size: pruned ones need not."""


@strict
class ServedMistralConfig(ServedConfig):
    """``ppf_mistral``, of models without a window."""

    model_type = "ppf_mistral"


@strict
class ServedQwen2Config(ServedConfig):
    """``ppf_qwen2``."""

    model_type = "ppf_qwen2"
    qkv_bias: bool = True


SERVED = ServedConfig, ServedMistralConfig, ServedQwen2Config


def register() -> None:
    """Make vLLM know results of PPF: their configurations and, under their names, the model class."""
    from vllm import ModelRegistry

    from ...model.classes import classes_of

    for config in SERVED:
        # PPF's own registration first, which the next line replaces.
        architecture = classes_of(config.model_type)["ForCausalLM"].__name__
        AutoConfig.register(config.model_type, config, exist_ok=True)
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, MODEL_CLASS)


def _served(fields: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config.json with ``block_configs`` for ``per_layer_config``; global values are the largest."""
    fields = dict(fields)
    layers = {int(index): layer for index, layer in (fields.pop("per_layer_config", None) or {}).items()}
    blocks = fields.get("block_configs") or [
        _block({name: layers.get(index, {}).get(name, fields[name]) for name in _COUNTS})
        for index in range(fields["num_hidden_layers"])
    ]
    fields["block_configs"] = [Block({name: Block(part) for name, part in block.items()}) for block in blocks]
    for section, names in (("attention", _COUNTS[:2]), ("ffn", _COUNTS[2:])):
        for name in names:
            fields[name] = max(block[section][name] for block in fields["block_configs"])
    return fields


def _block(counts: dict[str, int]) -> dict[str, dict[str, Any]]:
    heads, kv_heads, channels = (counts[name] for name in _COUNTS)
    group = heads // kv_heads if kv_heads else None
    attention = {"no_op": not heads, "n_heads_in_group": group, _COUNTS[0]: heads, _COUNTS[1]: kv_heads}
    return {"attention": attention, "ffn": {"no_op": not channels, _COUNTS[2]: channels}}

"""``PPFLlamaConfig``: a Llama whose layers differ, on disk in transformers' own ``per_layer_config`` field."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

# What a layer may override. head_dim and the hidden size are never pruned.
LAYER_FIELDS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@strict  # on this class too: LlamaConfig's own @strict would go on calling its validate_architecture
class PPFLlamaConfig(LlamaConfig):
    """Configuration of :class:`PPFLlamaForCausalLM`.

    The global fields hold the dense geometry; ``per_layer_config`` maps a layer index to the fields of
    ``LAYER_FIELDS`` that differ there. Zero heads (both fields) or a zero ``intermediate_size`` mean that the
    sub-layer is absent. Reading a field that differs between layers from the global config raises transformers'
    ``AmbiguousGlobalPerLayerAttributeError``; use ``config.per_layer_config[i]`` or :meth:`layer_widths`.

    Raises ``ValueError`` (through transformers' strict validation) for overrides that no pruned Llama has.
    """

    # A model_type of our own: stock Llama code ignores absent sub-layers and initialises their weights at random.
    model_type = "ppf_llama"
    # Layers differ in their number of kv heads, so no single tensor-parallel split fits all of them.
    base_model_tp_plan = None

    def layer_widths(self) -> list[tuple[int, int, int]]:
        """(query heads, kv heads, FFN channels) of every layer, length L."""
        return [tuple(getattr(layer, field) for field in LAYER_FIELDS) for layer in self.per_layer_config]

    def validate_architecture(self) -> None:
        """Instead of Llama's check, which refuses head counts that do not divide the hidden size: here normal."""
        self._validate_overrides()
        for index, (heads, kv_heads, channels) in enumerate(self.layer_widths()):
            _validate_layer(index, heads, kv_heads, channels)

    def _validate_overrides(self) -> None:
        if not self.is_heterogeneous:
            return
        for index, override in self._heterogeneity_spec.per_layer_overrides.items():
            unknown = sorted(set(override) - set(LAYER_FIELDS))
            if unknown:
                raise ValueError(f"per_layer_config[{index}] overrides {unknown}; only {list(LAYER_FIELDS)} may differ")


def _validate_layer(index: int, heads: Any, kv_heads: Any, channels: Any) -> None:
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (heads, kv_heads, channels)):
        raise ValueError(f"layer {index}: widths {(heads, kv_heads, channels)} are not integers of at least 0")
    if (heads == 0) != (kv_heads == 0) or (kv_heads and heads % kv_heads):
        raise ValueError(f"layer {index}: {heads} attention heads are no multiple of {kv_heads} key/value heads")
    # The cache and the causal mask take the sequence length from layer 0.
    if index == 0 and heads == 0:
        raise ValueError("layer 0 has no attention; it must keep at least one key/value head")

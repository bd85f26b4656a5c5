"""``PPFLlamaForCausalLM``: Llama with its own widths in every layer. Sub-layers of width 0 do not exist.

Everything but the layers is transformers' Llama (forward passes, rotary embedding, attention interface, caches), so a
dense configuration computes bit-identical logits to ``LlamaForCausalLM``, whichever transformers is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from .configuration import PPFLlamaConfig


class PPFLlamaAttention(LlamaAttention):
    """Llama's attention with one layer's own head counts; heads · head_dim need not equal the hidden size."""

    def __init__(self, config: PPFLlamaConfig, layer_idx: int):
        super().__init__(config.per_layer_config[layer_idx], layer_idx)
        # The layer's config is a copy; the model's own follows a later set_attn_implementation().
        self.config = config


class PPFLlamaDecoderLayer(GradientCheckpointingLayer):
    """Residual layer with optional attention and optional FFN; with neither it is the identity."""

    def __init__(self, config: PPFLlamaConfig, layer_idx: int):
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.has_attention = layer.num_attention_heads > 0
        self.has_ffn = layer.intermediate_size > 0
        if self.has_attention:
            self.self_attn = PPFLlamaAttention(config, layer_idx)
        if self.has_ffn:
            self.mlp = LlamaMLP(layer)
        if self.has_attention:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.has_ffn:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[batch, tokens, hidden] to the same shape and dtype; ``kwargs`` are those of ``LlamaAttention.forward``."""
        if self.has_attention:
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
        if self.has_ffn:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class PPFLlamaPreTrainedModel(LlamaPreTrainedModel):
    """Base of the two model classes: configuration class, weight initialisation, what can be recorded."""

    config_class = PPFLlamaConfig
    _no_split_modules = ["PPFLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": PPFLlamaDecoderLayer, "attentions": PPFLlamaAttention}


class PPFLlamaModel(PPFLlamaPreTrainedModel, LlamaModel):
    """The decoder without its head; ``forward`` is ``LlamaModel.forward``."""

    def __init__(self, config: PPFLlamaConfig):
        # Past LlamaModel.__init__, which would build dense layers.
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(PPFLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class PPFLlamaForCausalLM(PPFLlamaPreTrainedModel, LlamaForCausalLM):
    """A non-uniformly pruned Llama with language-model head; ``forward`` is ``LlamaForCausalLM.forward``.

    Weights have Llama's names; an absent sub-layer has no weights and no norm. All caches of ``generate()`` work; only
    assisted and prompt-lookup decoding need transformers > 5.17, whose caches cannot crop a layer without attention.
    """

    def __init__(self, config: PPFLlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = PPFLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``; on a GPU through the fast runtime wherever that can serve the request."""
        from ..fast.runtime.generation import generate

        return generate(self, *args, **kwargs)

    def _get_static_cache_init_shape(self) -> tuple[list[int], int] | None:
        """Shapes for generate()'s eager cache; transformers 5.17 reads one global head count, which does not exist."""
        if len(set(getattr(self, "hf_device_map", {}).values())) > 1:
            return None
        return [kv_heads for _, kv_heads, _ in self.config.layer_widths()], self.config.head_dim

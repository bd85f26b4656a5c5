"""Results of PPF for vLLM: Llamas, and Mistrals and Qwen2s, which vLLM's Llama computes too.

Imported by vLLM only, by name, when it serves such a checkpoint. vLLM's DeciLM has all that a Llama with absent
sub-layers needs: forward pass, weight names, pipeline parallelism, LoRA, layers without attention. What it lacks is a
number of query heads per layer; that is all this adds.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.nemotron_nas import (
    DeciLMAttention,
    DeciLMDecoderLayer,
    DeciLMForCausalLM,
    DeciModel,
)

from .vllm_plugin import ServedConfig


class PPFLlamaDecoderLayer(DeciLMDecoderLayer):
    """One layer with its own query heads, kv heads and FFN width; ``forward`` is DeciLM's."""

    def __init__(
        self,
        config: ServedConfig,
        layer_idx: int,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        # Past DeciLMDecoderLayer.__init__, which would give every layer the global number of query heads.
        nn.Module.__init__(self)
        attention, ffn = config.block_configs[layer_idx].attention, config.block_configs[layer_idx].ffn
        self._is_no_op_attention, self._is_no_op_ffn = attention.no_op, ffn.no_op
        self.hidden_size = config.hidden_size
        # Said, or vLLM passes over biases that a checkpoint has.
        attention_bias = getattr(config, "attention_bias", False)
        if not attention.no_op:
            self.self_attn = DeciLMAttention(
                config=config,
                hidden_size=config.hidden_size,
                num_heads=attention.num_attention_heads,
                num_kv_heads=attention.num_key_value_heads,
                max_position_embeddings=config.max_position_embeddings,
                quant_config=quant_config,
                bias=getattr(config, "qkv_bias", attention_bias),
                bias_o_proj=attention_bias,
                cache_config=cache_config,
                prefix=f"{prefix}.self_attn",
            )
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not ffn.no_op:
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=ffn.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=quant_config,
                bias=getattr(config, "mlp_bias", False),
                prefix=f"{prefix}.mlp",
            )
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class PPFLlamaForCausalLM(DeciLMForCausalLM):
    """DeciLM with PPF's layers. Weights have Llama's names, as in the checkpoint."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "") -> Any:
        return DeciModel(vllm_config=vllm_config, prefix=prefix, layer_type=PPFLlamaDecoderLayer)

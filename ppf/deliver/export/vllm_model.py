"""Results of PPF for vLLM: Llamas, and Mistrals and Qwen2s, which vLLM's Llama computes too.

Imported by vLLM only, by name, when it serves such a checkpoint. vLLM's DeciLM has all that a Llama with absent
sub-layers needs: forward pass, weight names, pipeline parallelism, LoRA, layers without attention. What it lacks are
layers that read their widths off transformers' ``per_layer_config``; that is all this adds.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig
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


class PPFLlamaDecoderLayer(DeciLMDecoderLayer):
    """One layer with its own query heads, kv heads and FFN width; ``forward`` is DeciLM's."""

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        # Past DeciLMDecoderLayer.__init__, which reads widths where Nemotron keeps them.
        nn.Module.__init__(self)
        own = config.per_layer_config[layer_idx]
        self._is_no_op_attention, self._is_no_op_ffn = not own.num_attention_heads, not own.intermediate_size
        self.hidden_size = config.hidden_size
        if not self._is_no_op_attention:
            bias = _biases(config)
            self.self_attn = DeciLMAttention(
                config=own,
                hidden_size=config.hidden_size,
                num_heads=own.num_attention_heads,
                num_kv_heads=own.num_key_value_heads,
                max_position_embeddings=config.max_position_embeddings,
                quant_config=quant_config,
                bias=bias[0],
                bias_o_proj=bias[1],
                cache_config=cache_config,
                prefix=f"{prefix}.self_attn",
            )
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not self._is_no_op_ffn:
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=own.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=quant_config,
                bias=getattr(config, "mlp_bias", False),
                prefix=f"{prefix}.mlp",
            )
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class PPFLlamaForCausalLM(DeciLMForCausalLM):
    """DeciLM with PPF's layers. Weights have Llama's names, as in the checkpoint."""

    # vLLM counts layers without attention off the configuration itself, not off Nemotron's blocks.
    has_noops = False

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "") -> Any:
        return DeciModel(vllm_config=vllm_config, prefix=prefix, layer_type=PPFLlamaDecoderLayer)


def _biases(config: PreTrainedConfig) -> tuple[bool, bool]:
    """Of q, k and v, and of o. Said, or vLLM passes over biases that a checkpoint has; no field says Qwen2's."""
    if config.model_type == "ppf_qwen2":
        return True, False
    given = bool(getattr(config, "attention_bias", False))
    return given, given

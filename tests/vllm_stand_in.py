"""Stand-ins for the parts of vLLM that PPF's plugin touches, on one device, in plain PyTorch.

They keep vLLM's names, signatures and division of labour (fused qkv and gate-up weights loaded in parts, residuals
passed along unadded, the norm adding them), so that a wrong width, name or argument of ours shows. They are not vLLM.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

_PARTS = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_PARTS |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


class ModelRegistry:
    """vLLM's, as far as a plugin uses it."""

    models: dict[str, str] = {}

    @classmethod
    def get_supported_archs(cls) -> set[str]:
        return set(cls.models)

    @classmethod
    def register_model(cls, name: str, model: str) -> None:
        assert isinstance(model, str) and model.count(":") == 1  # lazily: nothing is imported yet
        cls.models[name] = model


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(hidden_size)), eps

    def forward(self, x: Tensor, residual: Tensor | None = None):
        summed = x if residual is None else x + residual
        y = summed * torch.rsqrt(summed.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return y if residual is None else (y, summed)


class LlamaMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, quant_config=None,
                 bias: bool = False, prefix: str = ""):  # fmt: skip
        super().__init__()
        assert hidden_act == "silu" and prefix.endswith(".mlp")
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class DeciLMAttention(nn.Module):
    def __init__(self, config, hidden_size: int, num_heads: int, num_kv_heads: int, max_position_embeddings: int,
                 quant_config=None, bias: bool = False, bias_o_proj: bool = False, cache_config=None,
                 prefix: str = ""):  # fmt: skip
        super().__init__()
        assert prefix.endswith(".self_attn") and max_position_embeddings == config.max_position_embeddings
        self.head_dim, self.sizes = config.head_dim, [n * config.head_dim for n in (num_heads, num_kv_heads)]
        self.qkv_proj = nn.Linear(hidden_size, self.sizes[0] + 2 * self.sizes[1], bias=bias)
        self.o_proj = nn.Linear(self.sizes[0], hidden_size, bias=bias_o_proj)
        self.rotary = LlamaRotaryEmbedding(config=config)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        parts = self.qkv_proj(hidden_states).split([self.sizes[0], *self.sizes[1:] * 2], -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)[None] for part in parts)
        q, k = apply_rotary_pos_emb(q, k, *self.rotary(v, positions[None]))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0]
        return self.o_proj(y.transpose(0, 1).flatten(1))


class DeciLMDecoderLayer(nn.Module):
    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None):
        if not self._is_no_op_attention:
            if residual is None:
                residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
            else:
                hidden_states, residual = self.input_layernorm(hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if not self._is_no_op_ffn:
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class DeciModel(nn.Module):
    def __init__(self, *, vllm_config, prefix: str = "", layer_type=DeciLMDecoderLayer):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (
            layer_type(config, i, vllm_config.cache_config, quant_config=None, prefix=f"{prefix}.layers.{i}")
            for i in range(config.num_hidden_layers)
        )
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        hidden, residual = self.embed_tokens(ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self.norm(hidden, residual)[0]


class DeciLMForCausalLM(nn.Module):
    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.model = self._init_model(vllm_config=vllm_config, prefix="model")
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.lm_head(self.model(ids, positions))

    def load_weights(self, weights) -> set[str]:
        """Fused weights are filled part by part, in any order; every row must be filled."""
        parameters, filled = dict(self.named_parameters()), {}
        for name, weight in weights:
            *_, part, _ = name.split(".")
            target, rows = name.replace(part, _PARTS.get(part, part)), len(weight)
            if target.endswith(".bias") and target not in parameters:
                continue  # as vLLM does: a bias that the model does not have is passed over
            # From the front: gate and q. From the back: up and v, and k before v.
            start = {"k_proj": -2 * rows, "v_proj": -rows, "up_proj": -rows}.get(part, 0)
            parameters[target].data[start:][:rows] = weight
            filled[target] = filled.get(target, 0) + rows
        assert filled == {name: len(parameter) for name, parameter in parameters.items()}
        return set(filled)


def install(patch: pytest.MonkeyPatch) -> None:
    """Make ``import vllm`` and the modules the plugin names find these."""
    contents = {
        "vllm": {"ModelRegistry": ModelRegistry},
        "vllm.config": {"CacheConfig": object, "VllmConfig": object},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.layernorm": {"RMSNorm": RMSNorm},
        "vllm.model_executor.layers.quantization": {"QuantizationConfig": object},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.llama": {"LlamaMLP": LlamaMLP},
        "vllm.model_executor.models.nemotron_nas": {
            kind.__name__: kind for kind in (DeciLMAttention, DeciLMDecoderLayer, DeciLMForCausalLM, DeciModel)
        },
    }
    for name, names in contents.items():
        module = ModuleType(name)
        module.__dict__.update(names)
        patch.setitem(sys.modules, name, module)
    patch.setattr(ModelRegistry, "models", {})


def vllm_config(hf_config) -> SimpleNamespace:
    """What vLLM hands to a model."""
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config), cache_config=None, quant_config=None)

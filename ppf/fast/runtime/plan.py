"""What the runtime computes with: every layer's weights as plain tensors, of any Llama that transformers holds.

Nothing is copied. Layers may differ in their widths and lack either sub-layer; weights may be prefix views of wider
matrices (an elastic model's), as long as their last stride is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rotary embeddings whose frequencies do not depend on the length of the sequence at hand.
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Attention:
    """One layer's attention: G kv-groups of g query heads, head size d."""

    norm: Tensor  # [H]
    q: Tensor  # [G·g·d, H]
    k: Tensor  # [G·d, H]
    v: Tensor  # [G·d, H]
    o: Tensor  # [H, G·g·d]


@dataclass(frozen=True)
class FeedForward:
    """One layer's FFN of C channels."""

    norm: Tensor  # [H]
    gate: Tensor  # [C, H]
    up: Tensor  # [C, H]
    down: Tensor  # [H, C]


@dataclass(frozen=True)
class Layer:
    """One decoder layer; a sub-layer of width 0 is None."""

    attention: Attention | None
    ffn: FeedForward | None


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole model. ``rotary(x, position_ids)`` gives cos and sin, each [1, T, d], in the dtype of x."""

    layers: tuple[Layer, ...]
    embedding: Tensor  # [V, H]
    norm: Tensor  # [H]
    head: Tensor  # [V, H]
    head_dim: int
    epsilon: float
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def groups(self) -> tuple[int, ...]:
        """kv-groups of every layer."""
        return tuple(
            0 if a is None else a.k.shape[0] // self.head_dim for a in (layer.attention for layer in self.layers)
        )

    @property
    def query_heads(self) -> int:
        """Query heads of a kv-group, the same in all layers."""
        attention = next(layer.attention for layer in self.layers if layer.attention is not None)
        return attention.q.shape[0] // attention.k.shape[0]

    def read_bytes(self) -> int:
        """Bytes of weights that one decode step reads: all layers, norms and the head."""
        tensors = [self.norm, self.head]
        for layer in self.layers:
            for part in (layer.attention, layer.ffn):
                tensors += [] if part is None else vars(part).values()
        return sum(t.numel() * t.element_size() for t in tensors)


def plan_of(model: Any) -> Plan:
    """The weights of a ``LlamaForCausalLM``, ``MistralForCausalLM`` or ``PPFLlamaForCausalLM``, by reference."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Plan(
        layers=tuple(_layer(layer) for layer in model.model.layers),
        embedding=model.model.embed_tokens.weight.detach(),
        norm=model.model.norm.weight.detach(),
        head=model.lm_head.weight.detach(),
        head_dim=head_dim,
        epsilon=config.rms_norm_eps,
        rotary=model.model.rotary_emb,
    )


def _layer(layer: Any) -> Layer:
    attention = ffn = None
    if getattr(layer, "has_attention", True):
        a = layer.self_attn
        modules = layer.input_layernorm, a.q_proj, a.k_proj, a.v_proj, a.o_proj
        attention = Attention(*(m.weight.detach() for m in modules))
    if getattr(layer, "has_ffn", True):
        f = layer.mlp
        modules = layer.post_attention_layernorm, f.gate_proj, f.up_proj, f.down_proj
        ffn = FeedForward(*(m.weight.detach() for m in modules))
    return Layer(attention, ffn)


def unsupported(model: Any) -> str | None:
    """Why the runtime cannot serve ``model``, as the end of a sentence about it; None if it can."""
    config = model.config
    if config.model_type not in ("llama", "mistral", "ppf_llama"):
        return f"it is a {config.model_type}, not a Llama"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "it has biases"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if getattr(config, "sliding_window", None) is not None:
        return "it has a sliding window"
    if config.rope_parameters["rope_type"] not in _FIXED_ROTARY:
        return f"its rotary embedding ({config.rope_parameters['rope_type']}) depends on the length"
    parameters = list(model.parameters())
    if len({(p.device, p.dtype) for p in parameters}) > 1:
        return "its weights are on several devices or in several dtypes"
    if parameters[0].dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its weights are {parameters[0].dtype}"
    return None

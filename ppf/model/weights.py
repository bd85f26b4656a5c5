"""A Llama's weights as plain tensors, in the order that makes every policy a prefix.

The evaluator, the calibration and the surgery all work on this view; only this file reads Hugging Face modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..fast.ops.gather import gather_columns, gather_rows
from .structure import Structure


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; matrices as nn.Linear stores them, [out, in]."""

    attention_norm: Tensor  # [hidden]
    q: Tensor  # [G·g·d, hidden]
    k: Tensor  # [G·d, hidden]
    v: Tensor  # [G·d, hidden]
    o: Tensor  # [hidden, G·g·d]
    ffn_norm: Tensor  # [hidden]
    gate: Tensor  # [C, hidden]
    up: Tensor  # [C, hidden]
    down: Tensor  # [hidden, C]


@dataclass(frozen=True)
class LayerRanking:
    """Units of one layer by falling importance: int64 permutations of the kv-groups [G] and of the channels [C]."""

    attention: Tensor
    ffn: Tensor


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a Llama. ``rotary(x, position_ids)`` gives cos and sin, each [1, T, head_dim]."""

    structure: Structure
    embedding: Tensor  # [vocabulary, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocabulary, hidden]
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    epsilon: float

    @classmethod
    def from_model(cls, model: Any) -> DecoderWeights:
        """The weights of a dense ``LlamaForCausalLM``, by reference (nothing is copied)."""
        return cls(
            structure=Structure.from_config(model.config),
            embedding=model.model.embed_tokens.weight.detach(),
            layers=tuple(_layer(layer) for layer in model.model.layers),
            norm=model.model.norm.weight.detach(),
            head=model.lm_head.weight.detach(),
            rotary=model.model.rotary_emb,
            epsilon=model.config.rms_norm_eps,
        )

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def to(self, dtype: torch.dtype) -> DecoderWeights:
        """The same weights in ``dtype``; no copy if they have it already."""
        layers = tuple(
            LayerWeights(**{f.name: getattr(layer, f.name).to(dtype) for f in fields(layer)}) for layer in self.layers
        )
        parts = {name: getattr(self, name).to(dtype) for name in ("embedding", "norm", "head")}
        return replace(self, layers=layers, **parts)

    def permuted(self, ranking: list[LayerRanking]) -> DecoderWeights:
        """The same model with every layer's units in ranking order: one gather, after which policies are prefixes."""
        layers = (permute_layer(w, r, self.structure) for w, r in zip(self.layers, ranking, strict=True))
        return replace(self, layers=tuple(layers))


def _layer(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        *(
            module.weight.detach()
            for module in (
                layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
            )
        )
    )  # fmt: skip


def expand_units(order: Tensor, size: int) -> Tensor:
    """Channel indices int64 [len(order)·size] of units that span ``size`` consecutive channels each."""
    return (order[:, None] * size + torch.arange(size)).flatten()


def permute_layer(layer: LayerWeights, ranking: LayerRanking, structure: Structure) -> LayerWeights:
    """One layer's weights with its units in ranking order."""
    query = expand_units(ranking.attention, structure.group_rows)
    key = expand_units(ranking.attention, structure.head_dim)
    return replace(
        layer,
        q=gather_rows(layer.q, query),
        k=gather_rows(layer.k, key),
        v=gather_rows(layer.v, key),
        o=gather_columns(layer.o, query),
        gate=gather_rows(layer.gate, ranking.ffn),
        up=gather_rows(layer.up, ranking.ffn),
        down=gather_columns(layer.down, ranking.ffn),
    )

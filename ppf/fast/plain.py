"""The masked model written plainly, in differentiable operations, and with biases where a method adds some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.grid import Grid
from ..model.structure import Structure
from ..model.weights import DecoderWeights, LayerWeights
from .forward import rope


def masked_losses(
    weights: DecoderWeights,
    grid: Grid,
    levels: Sequence[int],
    tokens: Tensor,
    biases: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Negative log-likelihoods in nats, fp32 [B, T-1], of tokens [B, T] at ``levels`` [S], with the dense o and down
    cut to the width; ``biases`` by sub-layer, [hidden] each, are added to the output projections' results."""
    s, biases = weights.structure, biases or {}
    cos_sin = rope(weights, tokens.shape[1])
    x = F.embedding(tokens, weights.embedding)
    for index, layer in enumerate(weights.layers):
        if groups := levels[index]:
            inner = _attention(_norm(x, layer.attention_norm, weights), layer, s, cos_sin, groups)
            x = x + F.linear(inner, layer.o[:, : groups * s.group_rows])
        x = x + biases[index] if index in biases else x
        if width := levels[s.layers + index] * grid.ffn_multiple:
            normed = _norm(x, layer.ffn_norm, weights)
            inner = F.silu(F.linear(normed, layer.gate[:width])) * F.linear(normed, layer.up[:width])
            x = x + F.linear(inner, layer.down[:, :width])
        x = x + biases[s.layers + index] if s.layers + index in biases else x
    logits = F.linear(_norm(x, weights.norm, weights), weights.head)[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def _norm(x: Tensor, weight: Tensor, weights: DecoderWeights) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, weights.epsilon)


def _attention(x: Tensor, layer: LayerWeights, s: Structure, cos_sin: tuple[Tensor, Tensor], groups: int) -> Tensor:
    """Input of o [B, T, groups·g·d] from normalised x [B, T, hidden]."""

    def heads(matrix: Tensor, count: int) -> Tensor:
        return F.linear(x, matrix[: count * s.head_dim]).unflatten(-1, (count, s.head_dim)).transpose(1, 2)

    q = _rotated(heads(layer.q, groups * s.heads_per_group), *cos_sin)
    k = _rotated(heads(layer.k, groups), *cos_sin).repeat_interleave(s.heads_per_group, 1)
    v = heads(layer.v, groups).repeat_interleave(s.heads_per_group, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin

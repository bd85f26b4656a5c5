"""The masked model written plainly: differentiable, and with biases where a method adds some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from ..forward import attention_inner, ffn_inner, norm, rope
from ..grid import Grid
from ..weights import DecoderWeights


def masked_hidden(
    weights: DecoderWeights,
    grid: Grid,
    levels: Sequence[int],
    tokens: Tensor,
    biases: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Final hidden states [B, T, hidden] before the last norm at ``levels`` [S], with the dense o and down cut to the
    width; ``biases`` by sub-layer, [hidden] each, are added to the output projections' results."""
    s, biases = weights.structure, biases or {}
    cos_sin = rope(weights, tokens.shape[1])
    x = F.embedding(tokens, weights.embedding)
    for index, layer in enumerate(weights.layers):
        if groups := levels[index]:
            inner = attention_inner(norm(x, layer.attention_norm, weights.epsilon), layer, s, cos_sin, groups)
            x = x + F.linear(inner, layer.o[:, : groups * s.group_rows])
        x = x + biases[index] if index in biases else x
        if width := levels[s.layers + index] * grid.ffn_multiple:
            inner = ffn_inner(norm(x, layer.ffn_norm, weights.epsilon), layer, width)
            x = x + F.linear(inner, layer.down[:, :width])
        x = x + biases[s.layers + index] if s.layers + index in biases else x
    return x

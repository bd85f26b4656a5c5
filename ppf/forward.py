"""The arithmetic of a Llama decoder on plain tensors, each sub-layer stopping at a given width.

Weights stand in ranking order, so a width is a prefix: rows [0, w) of q/k/v/gate/up are views, nothing is copied, and
cuBLAS runs on them as fast as on physically shrunk matrices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .structure import Structure
from .weights import DecoderWeights, LayerWeights

# Logits in fp32 held at once: 1 GB is 2,048 tokens of a vocabulary of 128k, or 65,536 of one of 4k.
_LOGIT_BYTES = 1 << 30


def rope(weights: DecoderWeights, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [1, 1, T, head_dim] for positions 0…T-1 in the model's dtype."""
    position = torch.arange(length, device=weights.device)[None]
    cos, sin = weights.rotary(weights.embedding, position)
    return cos[:, None], sin[:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention_inner(
    x: Tensor, layer: LayerWeights, structure: Structure, cos_sin: tuple[Tensor, Tensor], width: int
) -> Tensor:
    """Input of o_proj, [B, T, width·g·d], from normalised x [B, T, hidden] and the first ``width`` kv-groups."""
    batch, length, _ = x.shape
    d, rows = structure.head_dim, structure.group_rows
    q = F.linear(x, layer.q[: width * rows]).view(batch, length, -1, d).transpose(1, 2)
    k = F.linear(x, layer.k[: width * d]).view(batch, length, width, d).transpose(1, 2)
    v = F.linear(x, layer.v[: width * d]).view(batch, length, width, d).transpose(1, 2)
    q, k = _rotate(q, *cos_sin), _rotate(k, *cos_sin)
    if structure.heads_per_group > 1:
        k, v = (t.repeat_interleave(structure.heads_per_group, dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).reshape(batch, length, width * rows)


def ffn_inner(x: Tensor, layer: LayerWeights, width: int) -> Tensor:
    """Input of down_proj, [B, T, width], from normalised x [B, T, hidden] and the first ``width`` channels."""
    return F.silu(F.linear(x, layer.gate[:width])) * F.linear(x, layer.up[:width])


def accumulate(x: Tensor, inner: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, hidden] + inner [B, T, n] · weightᵀ, weight [hidden, n]. On a GPU x itself takes the sum."""
    if not x.is_cuda:
        return x + F.linear(inner, weight)
    x.view(-1, x.shape[-1]).addmm_(inner.reshape(-1, inner.shape[-1]), weight.t())
    return x


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension, computed in fp32 inside."""
    return F.rms_norm(x, (x.shape[-1],), weight, epsilon)


def token_losses(weights: DecoderWeights, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, fp32 [B, T-1], of tokens [B, T] given final hidden states [B, T, hidden]."""
    return head_losses(norm(hidden, weights.norm, weights.epsilon), weights.head, tokens)


def head_losses(normed: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    """The same for hidden states that are normalised already, and a head [vocabulary, hidden]."""
    x, targets = normed[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    block = max(1, _LOGIT_BYTES // (4 * len(head)))
    losses = [
        F.cross_entropy(F.linear(part, head).float(), target, reduction="none")
        for part, target in zip(x.split(block), targets.split(block), strict=True)
    ]
    return torch.cat(losses).view(len(tokens), -1)

"""The arithmetic of a Llama decoder on plain tensors, each sub-layer stopping at a given width.

Weights stand in ranking order, so a width is a prefix: rows [0, w) of q/k/v/gate/up are views, nothing is copied, and
cuBLAS runs on them as fast as on physically shrunk matrices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.structure import Structure
from ..model.weights import DecoderWeights, LayerWeights
from .ops import elementwise  # noqa: F401  (defines the ops)

# Logits in fp32 held at once. A GPU wants large products: 1 GB is 2,048 tokens of a vocabulary of 128k, or 65,536 of
# one of 4k. A CPU wants them to stay in cache: twice as fast.
_LOGIT_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}


def rope(weights: DecoderWeights, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, head_dim] for positions 0…T-1 in the model's dtype."""
    position = torch.arange(length, device=weights.device)[None]
    cos, sin = weights.rotary(weights.embedding, position)
    return cos[0].contiguous(), sin[0].contiguous()


def attention_inner(
    x: Tensor, layer: LayerWeights, structure: Structure, cos_sin: tuple[Tensor, Tensor], width: int
) -> Tensor:
    """Input of o_proj, [B, T, width·g·d], from normalised x [B, T, hidden] and the first ``width`` kv-groups."""
    batch, length, _ = x.shape
    d, rows = structure.head_dim, structure.group_rows
    parts = (F.linear(x, w) for w in (layer.q[: width * rows], layer.k[: width * d], layer.v[: width * d]))
    q, k, v = (part.view(batch, length, -1, d) for part in parts)
    turned = (torch.ops.ppf.rotate(part, *cos_sin) for part in (q, k))
    q, k, v = (part.transpose(1, 2) for part in (*turned, v))
    if structure.heads_per_group > 1 and not x.is_cuda:  # on a CPU the grouped form is the slow one
        k, v = (t.repeat_interleave(structure.heads_per_group, dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2).reshape(batch, length, width * rows)


def ffn_inner(x: Tensor, layer: LayerWeights, width: int) -> Tensor:
    """Input of down_proj, [B, T, width], from normalised x [B, T, hidden] and the first ``width`` channels."""
    return torch.ops.ppf.silu_mul(F.linear(x, layer.gate[:width]), F.linear(x, layer.up[:width]))


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
    block = logit_block(head)
    losses = [
        torch.ops.ppf.row_losses(F.linear(part, head), target)
        for part, target in zip(x.split(block), targets.split(block), strict=True)
    ]
    return torch.cat(losses).view(len(tokens), -1)


def logit_block(head: Tensor) -> int:
    """How many tokens to make logits of at once."""
    return max(1, _LOGIT_BYTES[head.device.type] // (4 * len(head)))

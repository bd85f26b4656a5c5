"""What peers want to know about the dense model's activations: one pass over a little text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...fast.forward import attention_inner, ffn_inner, norm, rope
from ...model.weights import DecoderWeights, LayerWeights
from ...text import batches


@dataclass(frozen=True)
class LayerActivations:
    """One layer over all tokens of a text, fp64 on the CPU.

    ``cosine`` is the mean of cos(x_in, x_out) between the residual stream before and after the layer, ``angle`` the
    mean of arccos(cos)/π; ``attention_input`` and ``ffn_input`` [hidden] are the second moments E[x_j²] of what q, k, v
    and what gate, up read.
    """

    cosine: float
    angle: float
    attention_input: Tensor
    ffn_input: Tensor


class _Sums:
    """Running sums of one layer."""

    def __init__(self, hidden: int, device: torch.device):
        self.inputs = torch.zeros(2, hidden, dtype=torch.float64, device=device)
        self.similarity = torch.zeros(2, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, before: Tensor, after: Tensor, *inputs: Tensor) -> None:
        cosine = F.cosine_similarity(before.float(), after.float(), dim=-1).double().clamp(-1, 1)
        self.similarity += torch.stack((cosine.sum(), cosine.arccos().sum() / math.pi))
        self.inputs += torch.stack([x.float().square().flatten(0, -2).sum(0).double() for x in inputs])
        self.tokens += cosine.numel()

    def finish(self) -> LayerActivations:
        cosine, angle = (self.similarity / self.tokens).tolist()
        return LayerActivations(cosine, angle, *(self.inputs / self.tokens).cpu())


@torch.no_grad()
def observe(weights: DecoderWeights, sequences: Tensor) -> list[LayerActivations]:
    """Activations of every layer of the dense model, in any unit order, over int64 ``sequences`` [N, T]."""
    cos_sin = rope(weights, sequences.shape[1])
    sums = [_Sums(weights.structure.hidden, weights.device) for _ in weights.layers]
    for tokens in batches(sequences.to(weights.device), weights.device):
        x = F.embedding(tokens, weights.embedding)
        for layer, total in zip(weights.layers, sums, strict=True):
            x = _advance(weights, layer, x, cos_sin, total)
    return [total.finish() for total in sums]


def _advance(
    weights: DecoderWeights, layer: LayerWeights, x: Tensor, cos_sin: tuple[Tensor, Tensor], sums: _Sums
) -> Tensor:
    s = weights.structure
    read = norm(x, layer.attention_norm, weights.epsilon)
    middle = x + F.linear(attention_inner(read, layer, s, cos_sin, s.kv_groups), layer.o)
    read_by_ffn = norm(middle, layer.ffn_norm, weights.epsilon)
    after = middle + F.linear(ffn_inner(read_by_ffn, layer, s.channels), layer.down)
    sums.add(x, after, read, read_by_ffn)
    return after

"""Calibration: one pass of the dense model over text, and what the inputs of o_proj and down_proj look like.

The pass goes layer by layer over all sequences, so that only one layer's Gram matrices are in memory at any time: the
caller stores (or uses) what each step yields and lets it go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fast.forward import attention_inner, ffn_inner, norm, rope
from ..model.weights import DecoderWeights, LayerWeights
from ..text import batches


@dataclass(frozen=True)
class Statistics:
    """Second moments of one output projection's input X [tokens, n], all fp32.

    ``gram`` is XᵀX / tokens [n, n]; ``mean`` and ``variance`` are per channel [n].
    """

    gram: Tensor
    mean: Tensor
    variance: Tensor

    @property
    def second_moment(self) -> Tensor:
        """E[x_j²], fp32 [n]."""
        return self.gram.diagonal()


@dataclass(frozen=True)
class Moments:
    """What a run keeps of :class:`Statistics`: mean and variance of every channel, fp32 [n]."""

    mean: Tensor
    variance: Tensor

    @property
    def second_moment(self) -> Tensor:
        """E[x_j²], fp32 [n]."""
        return self.variance + self.mean.square()

    def ordered(self, order: Tensor) -> Moments:
        """The same with the channels in ``order``, int64 [n]."""
        return Moments(self.mean[order], self.variance[order])

    def to(self, device: torch.device) -> Moments:
        """The same on ``device``."""
        return Moments(self.mean.to(device), self.variance.to(device))


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's o_proj input (n = G·g·d) and down_proj input (n = C)."""

    attention: Statistics
    ffn: Statistics


class _Accumulator:
    """Streams batches of X into the sums that :class:`Statistics` needs."""

    def __init__(self, size: int, device: torch.device):
        self.gram = torch.zeros(size, size, device=device)
        self.total = torch.zeros(size, device=device)
        self.tokens = 0

    def add(self, inner: Tensor) -> None:
        x = inner.flatten(0, -2)
        self.total += x.sum(0, dtype=torch.float32)
        self.tokens += len(x)
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            # Products of 16-bit numbers are exact in fp32, so that the matrix units lose nothing but the order of sums.
            self.gram += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            x = x.float()
            self.gram.addmm_(x.T, x)

    def finish(self) -> Statistics:
        gram, mean = self.gram.div_(self.tokens), self.total / self.tokens
        return Statistics(gram, mean, (gram.diagonal() - mean.square()).clamp_min(0))


def calibrate(weights: DecoderWeights, sequences: Tensor) -> Iterator[LayerStatistics]:
    """Yield every layer's statistics in order, from one dense pass over int64 ``sequences`` [N, T].

    ``weights`` are the dense model's, in any unit order; the statistics' channels stand in that same order. Nothing
    here keeps what was yielded: a caller that lets it go has one layer's Grams in memory at a time.
    """
    cos_sin = rope(weights, sequences.shape[1])
    hidden = [F.embedding(batch.to(weights.device), weights.embedding) for batch in batches(sequences, weights.device)]
    for layer in weights.layers:
        # No name for the result, and no decorator around the generator: either would hold it during the next layer.
        yield _advance(weights, layer, hidden, cos_sin)


@torch.no_grad()
def _advance(
    weights: DecoderWeights, layer: LayerWeights, hidden: list[Tensor], cos_sin: tuple[Tensor, Tensor]
) -> LayerStatistics:
    """Statistics of one layer over all batches of ``hidden`` [B, T, hidden], which then hold the layer's output."""
    s = weights.structure
    attention = _Accumulator(s.kv_groups * s.group_rows, weights.device)
    ffn = _Accumulator(s.channels, weights.device)
    for x in hidden:
        inner = attention_inner(norm(x, layer.attention_norm, weights.epsilon), layer, s, cos_sin, s.kv_groups)
        attention.add(inner)
        x += F.linear(inner, layer.o)
        inner = ffn_inner(norm(x, layer.ffn_norm, weights.epsilon), layer, s.channels)
        ffn.add(inner)
        x += F.linear(inner, layer.down)
    return LayerStatistics(attention.finish(), ffn.finish())

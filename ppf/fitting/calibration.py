"""Calibration: one pass of the dense model over text, and what the inputs of the output projections look like.

The pass goes layer by layer over all sequences, so that only one layer's Gram matrices are in memory at any time: the
caller stores (or uses) what each step yields and lets it go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import KINDS
from ..model.decoder import Decoder
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
    """Statistics of the inputs of one layer's output projections: n = G·g·d for attention, C for the FFN. None where
    the layer has no such sub-layer."""

    attention: Statistics | Moments | None
    ffn: Statistics | Moments | None

    def of(self, kind: str) -> Statistics | Moments | None:
        return getattr(self, kind)


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


def calibrate(decoder: Decoder, sequences: Tensor) -> Iterator[LayerStatistics]:
    """Yield every layer's statistics in order, from one dense pass over int64 ``sequences`` [N, T].

    ``decoder`` is the dense model, in any unit order; the statistics' channels stand in that same order. The layers
    are transformers' own, with a hook on the output projections. Nothing here keeps what was yielded: a caller that
    lets it go has one layer's Grams in memory at a time.
    """
    hidden = [decoder.frame.begin(batch.to(decoder.device)) for batch in batches(sequences, decoder.device)]
    for index in range(decoder.structure.layers):
        # No name for the result, and no decorator around the generator: either would hold it during the next layer.
        yield _advance(decoder, index, hidden)


@torch.no_grad()
def _advance(decoder: Decoder, index: int, hidden: list[Tensor]) -> LayerStatistics:
    """Statistics of one layer over all batches of ``hidden`` [B, T, hidden], which then hold the layer's output."""
    sublayers = {kind: decoder.structure.of(kind)[index] for kind in KINDS}
    widths = {kind: sublayer.units for kind, sublayer in sublayers.items()}
    watched = {decoder.family.parts[kind].output_name: kind for kind in KINDS if widths[kind]}
    sums = {kind: _Accumulator(sublayers[kind].width, decoder.device) for kind in watched.values()}
    for at, x in enumerate(hidden):
        told = decoder.frame.context(*x.shape[:2])[index]
        hidden[at] = decoder.reference(
            index, widths, decoder.layers[index], x, told, lambda name, x: sums[watched[name]].add(x), tuple(watched)
        )
    return LayerStatistics(**{kind: sums[kind].finish() if kind in sums else None for kind in KINDS})

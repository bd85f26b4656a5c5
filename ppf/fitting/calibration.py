"""Calibration: one pass of the dense model over text, and what the inputs of the output projections look like.

The pass goes layer by layer over all sequences, so that only one layer's Gram matrices are in memory at any time: the
caller stores (or uses) what each step yields and lets it go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import memory, ranks
from ..families import KINDS
from ..model.decoder import Decoder
from ..model.layer import Layer
from ..text import batches, predicting
from ..timings import timed

# Parts of the text that are summed on their own, at least.
_SHARDS = 4
# Share of a GPU's memory for the activations inside a layer; transformers keeps more of them than our own paths.
_INNER_SHARE = 0.15
# Rows of a Gram that are computed at once.
_ROWS = 4_096


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

    def add(self, inner: Tensor, counted: Tensor | None = None) -> None:
        """Take in ``inner`` [B, T, n], or of its B·T positions those ``counted``, int64 [k]."""
        x = inner.flatten(0, -2)
        x = x if counted is None else x[counted]
        self.total += x.sum(0, dtype=torch.float32)
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            # Products of 16-bit numbers are exact in fp32, so that the matrix units lose nothing but the order of sums.
            # A block of rows at a time: the product has to stand somewhere before it is added.
            for rows, columns in zip(self.gram.split(_ROWS), x.split(_ROWS, 1), strict=True):
                rows += torch.mm(columns.T, x, out_dtype=torch.float32)
        else:
            x = x.float()
            self.gram.addmm_(x.T, x)

    def merge(self, other: _Accumulator) -> _Accumulator:
        """Take in the sums of ``other``."""
        self.gram += other.gram
        self.total += other.total
        return self

    def finish(self, spans: list[range], tokens: int) -> Statistics:
        """The statistics over ``tokens`` tokens, those of all processes, whose parts of the text are ``spans``."""
        gram, mean = ranks.tree_sum(self.gram, spans).div_(tokens), ranks.tree_sum(self.total, spans) / tokens
        return Statistics(gram, mean, (gram.diagonal() - mean.square()).clamp_min(0))


@dataclass
class _Shard:
    """A part of the text: the residual stream of its batches [B, T, hidden], and of each batch the positions of its
    B·T that count, None for all of them."""

    hidden: list[Tensor]
    counted: list[Tensor | None]


def calibrate(decoder: Decoder, sequences: Tensor, scored: Tensor | None = None) -> Iterator[LayerStatistics]:
    """Yield every layer's statistics in order, from one dense pass over int64 ``sequences`` [N, T].

    If only some tokens are ``scored``, bool [N, T], the statistics are over the positions that predict these: what
    happens at the others is never used to say something. What they attend to is there all the same.

    ``decoder`` is the dense model, in any unit order; the statistics' channels stand in that same order. The layers
    are transformers' own, with a hook on the output projections. Nothing here keeps what was yielded: a caller that
    lets it go has one layer's Grams in memory at a time, and up to three while they are summed.

    The text is cut into shards, whose sums are added as a tree. Several processes take a branch each, and all of them
    get all statistics: the same bits on one to four processes, and on five to eight, and so on.
    """
    shards = sequences.tensor_split(min(_shards(ranks.world()), len(sequences)))
    spans = ranks.subtrees(len(shards), ranks.world())
    most = memory.tokens_at_once(decoder.device, _INNER_SHARE, decoder.token_bytes)
    masks = [None] * len(shards) if scored is None else predicting(scored).tensor_split(len(shards))
    parts = {shard: _begun(decoder, shards[shard], masks[shard], most) for shard in spans[ranks.rank()]}
    tokens = sequences.numel() if scored is None else int(predicting(scored).sum())
    for index in range(decoder.structure.layers):
        # No name for the result, and no decorator around the generator: either would hold it during the next layer.
        yield _advance(decoder, index, parts, spans, tokens)


def _begun(decoder: Decoder, sequences: Tensor, counts: Tensor | None, most: int | None) -> _Shard:
    """The shard of some sequences [N, T], of whose positions those that ``counts`` [N, T] says, or all."""
    device = decoder.device
    hidden = [decoder.frame.begin(batch.to(device)) for batch in batches(sequences, device, most)]
    if counts is None:
        return _Shard(hidden, [None] * len(hidden))
    masks = batches(counts, device, most)
    return _Shard(hidden, [mask.flatten().nonzero().squeeze(1).to(device) for mask in masks])


def _shards(processes: int) -> int:
    """Four, or the next power of two for more processes."""
    return max(_SHARDS, 1 << (processes - 1).bit_length())


@timed("calibrating")
@torch.no_grad()
def _advance(
    decoder: Decoder, index: int, parts: dict[int, _Shard], spans: list[range], tokens: int
) -> LayerStatistics:
    """Statistics of one layer over all shards of all processes, ``tokens`` in all. ``parts`` are this process's, whose
    batches then hold the layer's output."""
    sublayers = {kind: part for kind in KINDS if (part := decoder.structure.of(kind)[index]).units}
    layer = decoder.layers[index]

    def sums_of(shards: range) -> dict[str, _Accumulator]:
        sums = {kind: _Accumulator(part.width, decoder.device) for kind, part in sublayers.items()}
        for shard in shards:
            _pass(decoder, index, layer, parts[shard], sums)
        return sums

    found = _tree(spans[ranks.rank()], sums_of)
    # One kind after the other, the same order everywhere: processes meet in the sums.
    return LayerStatistics(**{kind: found.pop(kind).finish(spans, tokens) if kind in found else None for kind in KINDS})


def _tree(span: range, sums_of: Callable[[range], dict[str, _Accumulator]]) -> dict[str, _Accumulator]:
    """Sums over the shards ``span``, of at most one shard each from ``sums_of``, added as the tree has it."""
    if len(span) < 2:
        return sums_of(span)
    left, right = (_tree(half, sums_of) for half in ranks.halves(span))
    return {kind: part.merge(right.pop(kind)) for kind, part in left.items()}


def _pass(decoder: Decoder, index: int, layer: Layer, part: _Shard, sums: dict[str, _Accumulator]) -> None:
    """Add one shard's batches to ``sums``, and put the layer's output in their place."""
    widths = {kind: decoder.structure.of(kind)[index].units for kind in KINDS}
    watched = {decoder.family.parts[kind].output_name: kind for kind in sums}
    for at, (x, counted) in enumerate(zip(part.hidden, part.counted, strict=True)):
        told = decoder.frame.context(*x.shape[:2])[index]
        part.hidden[at] = decoder.reference(
            index, widths, layer, x, told, lambda name, x, c=counted: sums[watched[name]].add(x, c), tuple(watched)
        )

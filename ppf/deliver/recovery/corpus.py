"""The text of a recovery training: what is trained on, what is kept for measuring, and in which order it comes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...text import take_tokens

_HELD_OUT_SHARE = 0.05
_HELD_OUT_TOKENS = 16_384


@dataclass(frozen=True)
class Corpus:
    """Disjoint token sequences int64 [N, T] of one text: its beginning is trained on, its end is ``held_out``."""

    training: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, sequences: Tensor) -> Corpus:
        """Split int64 [N, T]. Raises ``InputError`` for fewer than two sequences."""
        if len(sequences) < 2:
            remedy = "Give a longer text or a smaller --sequence-length"
            raise InputError(
                "text", f"{len(sequences)} sequence(s)", "is too short to keep a part for measuring", remedy
            )
        kept = max(1, round(len(sequences) * _HELD_OUT_SHARE))
        return cls(sequences[:-kept], take_tokens(sequences[-kept:], _HELD_OUT_TOKENS))

    @staticmethod
    def needed(training: int) -> int:
        """How many sequences a text must have for ``training`` different ones to be trained on."""
        return math.ceil(training / (1 - _HELD_OUT_SHARE)) + 1

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """The ``size`` sequences int64 [size, T] of one step.

        Every epoch goes through all sequences once, in an order that follows from ``seed`` and its number alone: a
        resumed training sees what an uninterrupted one sees.
        """
        places = torch.arange(step * size, (step + 1) * size)
        epochs = places // len(self.training)
        orders = {int(epoch): self._order(int(epoch), seed) for epoch in epochs.unique()}
        indices = [int(orders[int(e)][p]) for e, p in zip(epochs, places % len(self.training), strict=True)]
        return self.training[indices]

    def _order(self, epoch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(len(self.training), generator=generator)

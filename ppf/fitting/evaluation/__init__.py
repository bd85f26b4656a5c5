"""Evaluation: a policy's true log-perplexity on text, without surgery."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...fast import batched, together
from ...fast.batched import Batched
from ...fast.layer_major import LayerMajor, Stepper
from ...fast.losses import logits
from ...fast.one_by_one import OneByOne
from ...fast.plan import executed
from ...fast.together import Together
from ...model.decoder import Decoder
from ...model.grid import Grid
from ...model.policy import Policy
from ...text import take_tokens
from ..library import Library

# Policies worth handing over at once: enough to share work, few enough that a kill loses seconds.
_CHUNK = {"cuda": 32, "cpu": 4}
# Largest hidden size at which the grouped kernels beat cuBLAS on prefix views. Measured: dev/LOG.md, 2026-11-28.
_LARGEST_TOGETHER = 1024
# Where layers stream, a wave must compute for longer than a layer's copy takes.
_STREAMED_CHUNK = 64


class Evaluator:
    """Runs a model in ranking order at any policy's widths.

    ``decoder`` stands in ranking order; ``library`` gives the refitted output projections of each level, or is None for
    plain masking (the dense ones, cut to the width). ``sequences`` is int64 [N, T]; each sequence is scored on its own,
    from its second token on, or only its tokens that are ``scored``, bool [N, T]. A policy's result does not depend on
    those it is evaluated with.
    """

    def __init__(
        self, decoder: Decoder, grid: Grid, sequences: Tensor, library: Library | None = None,
        scored: Tensor | None = None,
    ):  # fmt: skip
        self.decoder, self.grid, self.library = decoder, grid, library
        self.sequences = sequences.to(decoder.device)
        self.scored = None if scored is None else scored.to(decoder.device)
        self._engines: dict[int, LayerMajor | Batched] = {}  # by number of sequences

    @property
    def tokens(self) -> int:
        """Number of tokens in the evaluation text."""
        return self.sequences.numel()

    @property
    def chunk(self) -> int:
        """How many policies to evaluate at once if there are many."""
        return _CHUNK[self.decoder.device.type] if self.decoder.resident else _STREAMED_CHUNK

    @cached_property
    def _prepared(self) -> list[batched.PreparedLayer]:
        return batched.prepare(self.decoder, self.grid, self.library)

    def log_perplexity(self, policy: Policy, tokens: int | None = None) -> float:
        """Mean negative log-likelihood per predicted token, in nats; ``tokens`` as in :meth:`log_perplexities`."""
        return self.log_perplexities([policy], tokens)[0]

    def log_perplexities(self, policies: Sequence[Policy], tokens: int | None = None) -> list[float]:
        """The log-perplexity of every policy, in order; policies that begin alike share the work.

        ``tokens`` asks for about so many, in whole sequences spread evenly over the text, instead of all: a cheap first
        look. Raises ``InputError`` for a policy off the grid and for ``tokens`` < 1.
        """
        if not policies:
            return []
        sequences = take_tokens(self.sequences, tokens)
        scored = None if self.scored is None else take_tokens(self.scored, tokens)
        count = sequences[:, 1:].numel() if scored is None else int(scored[:, 1:].sum())
        return (self._engine(sequences, scored).losses(self._levels(policies)) / count).tolist()

    @torch.no_grad()
    def logits(self, policy: Policy, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of int64 ``tokens`` [B, T]."""
        hidden = self._layer_major(tokens.to(self.decoder.device)).hidden(self._levels([policy])[0])
        frame = self.decoder.frame
        return logits(frame.norm(hidden), frame.head, frame.scale, frame.cap)

    def _levels(self, policies: Sequence[Policy]) -> list[list[int]]:
        """Levels in execution order."""
        return [executed(row) for row in self.grid.encode(policies).tolist()]

    def _engine(self, sequences: Tensor, scored: Tensor | None) -> LayerMajor | Batched:
        """The engine of a part of the text; kept, for it remembers dense activations."""
        if len(sequences) not in self._engines:
            self._engines[len(sequences)] = self._make_engine(sequences, scored)
        return self._engines[len(sequences)]

    def _make_engine(self, sequences: Tensor, scored: Tensor | None) -> LayerMajor | Batched:
        if scored is None and batched.applies(self.decoder):  # its kernel scores all tokens
            return Batched(self.decoder, self.grid, self._prepared, sequences)
        return self._layer_major(sequences, scored)

    def _layer_major(self, sequences: Tensor, scored: Tensor | None = None) -> LayerMajor:
        reserved = 0 if self.library is None else max(0, self.library.outstanding)
        return LayerMajor(self.decoder, self.grid, sequences, self._stepper, reserved, scored)

    @cached_property
    def _stepper(self) -> Stepper:
        """Many policies a launch where one alone leaves a GPU idle, else one after the other through cuBLAS."""
        small = self.decoder.structure.hidden <= _LARGEST_TOGETHER
        if self.decoder.resident and small and together.unserved_by(self.decoder) is None:
            return Together(self.decoder, self.grid, self.library)
        return OneByOne(self.decoder, self.grid, self.library)

"""Evaluation: a policy's true log-perplexity on text, without surgery."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ...fast import batched
from ...fast.batched import Batched
from ...fast.forward import norm
from ...fast.plan import executed
from ...model.grid import Grid
from ...model.policy import Policy
from ...model.weights import DecoderWeights
from ...text import take_tokens
from ..library import Library
from .divergence import Divergences
from .serial import Serial

# Policies worth handing over at once: enough to share work, few enough that a kill loses seconds.
_CHUNK = {"cuda": 32, "cpu": 4}


class Evaluator:
    """Runs a model in ranking order at any policy's widths.

    ``weights`` stand in ranking order; ``library`` gives the refitted o and down of each level, or is None for plain
    masking (the dense o and down, cut to the width). ``sequences`` is int64 [N, T]; each sequence is scored on its own,
    from its second token on. A policy's result does not depend on those it is evaluated with.
    """

    def __init__(self, weights: DecoderWeights, grid: Grid, sequences: Tensor, library: Library | None = None):
        self.weights, self.grid, self.library = weights, grid, library
        self.sequences = sequences.to(weights.device)
        self._engines: dict[int, Serial | Batched] = {}  # by number of sequences
        self._dense: dict[int, Divergences] = {}

    @property
    def tokens(self) -> int:
        """Number of tokens in the evaluation text."""
        return self.sequences.numel()

    @property
    def chunk(self) -> int:
        """How many policies to evaluate at once if there are many."""
        return _CHUNK[self.weights.device.type]

    @cached_property
    def _prepared(self) -> list[batched.PreparedLayer]:
        return batched.prepare(self.weights, self.grid, self.library)

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
        count, length = sequences.shape
        return (self._engine(sequences).losses(self._levels(policies)) / (count * (length - 1))).tolist()

    def sequences_of(self, tokens: int | None) -> int:
        """How many sequences ``tokens`` asks for."""
        return len(take_tokens(self.sequences, tokens))

    def divergences(self, policies: Sequence[Policy], tokens: int | None = None) -> list[float]:
        """KL(dense ‖ policy) per predicted token in nats, in order, from the dense model's 64 likeliest tokens and the
        rest as one: a lower bound. ``tokens`` as in :meth:`log_perplexities`."""
        if not policies:
            return []
        sequences = take_tokens(self.sequences, tokens)
        if len(sequences) not in self._dense:
            self._dense[len(sequences)] = Divergences(self._engine(sequences), self.weights, self.grid)
        return self._dense[len(sequences)].means(self._levels(policies)).tolist()

    @torch.no_grad()
    def logits(self, policy: Policy, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of int64 ``tokens`` [B, T]."""
        found: list[Tensor] = []
        engine = Serial(self.weights, self.grid, tokens.to(self.weights.device), self.library)
        engine.visit(self._levels([policy]), lambda _, __, hidden: found.append(hidden))
        return F.linear(norm(torch.cat(found), self.weights.norm, self.weights.epsilon), self.weights.head)

    def _levels(self, policies: Sequence[Policy]) -> list[list[int]]:
        """Levels in execution order."""
        return [executed(row) for row in self.grid.encode(policies).tolist()]

    def _engine(self, sequences: Tensor) -> Serial | Batched:
        """The engine of a part of the text; kept, for it remembers dense activations."""
        if len(sequences) not in self._engines:
            self._engines[len(sequences)] = self._make_engine(sequences)
        return self._engines[len(sequences)]

    def _make_engine(self, sequences: Tensor) -> Serial | Batched:
        if batched.applies(self.weights):
            return Batched(self.weights, self.grid, self._prepared, sequences)
        return Serial(self.weights, self.grid, sequences, self.library)

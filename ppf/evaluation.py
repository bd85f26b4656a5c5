"""Evaluation: a policy's true log-perplexity on text, without surgery."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .forward import attention_inner, ffn_inner, norm, rope, token_losses
from .grid import Grid
from .library import Library
from .policy import Policy
from .text import batches
from .weights import DecoderWeights


class Evaluator:
    """Runs a model in ranking order at any policy's widths.

    ``weights`` stand in ranking order; ``library`` gives the refitted o and down of each level, or is None for plain
    masking (the dense o and down, cut to the width). ``sequences`` is int64 [N, T]; each sequence is scored on its own,
    from its second token on.
    """

    def __init__(self, weights: DecoderWeights, grid: Grid, sequences: Tensor, library: Library | None = None):
        self.weights, self.grid, self.library = weights, grid, library
        self.sequences = sequences.to(weights.device)
        self._cos_sin = rope(weights, sequences.shape[1])

    @property
    def tokens(self) -> int:
        """Number of tokens in the evaluation text."""
        return self.sequences.numel()

    @torch.no_grad()
    def log_perplexity(self, policy: Policy) -> float:
        """Mean negative log-likelihood per predicted token, in nats."""
        levels = self.grid.encode([policy])[0].tolist()
        total = torch.zeros((), dtype=torch.float64, device=self.weights.device)
        for tokens in batches(self.sequences, self.weights.device):
            total += token_losses(self.weights, self._hidden(levels, tokens), tokens).double().sum()
        count, length = self.sequences.shape
        return float(total) / (count * (length - 1))

    @torch.no_grad()
    def logits(self, policy: Policy, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of int64 ``tokens`` [B, T]; T is the evaluation text's sequence length."""
        hidden = self._hidden(self.grid.encode([policy])[0].tolist(), tokens)
        return F.linear(norm(hidden, self.weights.norm, self.weights.epsilon), self.weights.head)

    def _hidden(self, levels: list[int], tokens: Tensor) -> Tensor:
        """Final hidden states [B, T, hidden] at one policy's levels (length S)."""
        w, s = self.weights, self.grid.structure
        x = F.embedding(tokens, w.embedding)
        for index, layer in enumerate(w.layers):
            if groups := levels[index]:
                normed = norm(x, layer.attention_norm, w.epsilon)
                inner = attention_inner(normed, layer, s, self._cos_sin, groups)
                x = x + F.linear(inner, self._output(index, groups, layer.o[:, : groups * s.group_rows]))
            if level := levels[s.layers + index]:
                width = level * self.grid.ffn_multiple
                inner = ffn_inner(norm(x, layer.ffn_norm, w.epsilon), layer, width)
                x = x + F.linear(inner, self._output(s.layers + index, level, layer.down[:, :width]))
        return x

    def _output(self, sublayer: int, level: int, dense_prefix: Tensor) -> Tensor:
        return dense_prefix if self.library is None else self.library.weight(sublayer, level)

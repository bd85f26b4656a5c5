"""What a fit has measured, as answers: its best policies near a budget, moved onto it.

An agent is one function for all sizes, and its training can end badly at some of them, where breeding has found good
policies meanwhile: a fit of SmolLM2-135M with 1,500 evaluations ended with an agent that was predicted at 1.5 nats
above the best measured ones from 48 % on, and right below (dev/LOG.md, 2026-11-28).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.grid import Grid

# So many policies of the least log-perplexity among those whose ratio is so near. Moving changes little there.
_BEST, _NEAR = 16, 0.03


class Measured:
    """Measured policies: ``levels`` int64 [P, S] and their ``log_perplexity`` fp64 [P], in nats."""

    def __init__(self, grid: Grid, levels: Tensor, log_perplexity: Tensor):
        self.kept_share = grid.kept(levels).double() / grid.structure.decoder_parameters
        self.fractions = levels / torch.tensor(grid.top)
        self.log_perplexity = log_perplexity

    def near(self, ratio: float) -> Tensor:
        """The share of every sub-layer that the best policies near ``ratio`` keep, fp32 [B, S] with at most 16 rows."""
        near = (1 - self.kept_share - ratio).abs() <= _NEAR
        best = self.log_perplexity[near].argsort(stable=True)[:_BEST]
        return self.fractions[near][best].float()

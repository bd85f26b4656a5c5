"""What every kind of predictor has in common: its interface and the scale on which it predicts.

Predictors predict log(log-perplexity − offset): errors grow with the damage, and on this scale they are about equal at
all ratios.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.grid import Grid

# Nats between the offset and the best measured log-perplexity. Smaller stresses the mild policies, larger the severe.
_HEADROOM = 1.0


@dataclass(frozen=True)
class Prediction:
    """Log-perplexity in nats and its standard uncertainty, fp32 [P] each."""

    mean: Tensor
    std: Tensor


def one_hot(levels: Tensor, grid: Grid) -> Tensor:
    """Level probabilities fp32 [P, S, K] of definite levels int64 [P, S]."""
    return F.one_hot(levels, grid.levels).float()


class Predictor(nn.Module, ABC):
    """Policy → log-perplexity. ``members`` plausible predictors live in each one; they differ where little is known."""

    kind: ClassVar[str]

    def __init__(self, grid: Grid, members: int):
        super().__init__()
        self.grid, self.members = grid, members
        # Buffers, because they are learnt from the data and belong to the saved state.
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("target_mean", torch.zeros(()))
        self.register_buffer("target_std", torch.ones(()))

    @abstractmethod
    def fit(self, levels: Tensor, log_perplexity: Tensor, seed: int, steps: int, fresh: bool) -> None:
        """See :func:`~ppf.choose.predictor.training.fit_predictor`; tensors are on the predictor's device."""

    @abstractmethod
    def relaxed(self, probabilities: Tensor) -> Tensor:
        """Members' log-perplexities [members, P] in nats for level probabilities [P, S, K]; differentiable."""

    @abstractmethod
    def forward(self, levels: Tensor) -> Prediction:
        """Predict for definite levels int64 [P, S]."""

    @property
    def device(self) -> torch.device:
        return self.offset.device

    def members_at(self, levels: Tensor) -> Tensor:
        """Members' log-perplexities [members, P] for definite levels int64 [P, S]."""
        return self.relaxed(one_hot(levels.to(self.device), self.grid).to(self.offset.dtype))

    def standardise(self, log_perplexity: Tensor) -> None:
        """Choose offset, mean and scale of the predicted quantity from the measured log-perplexities [N]."""
        self.offset.copy_(log_perplexity.min() - _HEADROOM)
        logarithm = (log_perplexity - self.offset).log()
        self.target_mean.copy_(logarithm.mean())
        self.target_std.copy_(logarithm.std().clamp_min(1e-6))

    def from_nats(self, log_perplexity: Tensor) -> Tensor:
        """Log-perplexities as they are predicted: centred, scaled logarithms of what exceeds the offset."""
        return ((log_perplexity - self.offset).log() - self.target_mean) / self.target_std

    def to_nats(self, standardised: Tensor) -> Tensor:
        """Inverse of :meth:`from_nats`."""
        return self.offset + (standardised * self.target_std + self.target_mean).exp()

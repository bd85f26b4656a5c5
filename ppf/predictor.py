"""The predictor: policy → log-perplexity with an uncertainty, batched and differentiable in relaxed policies.

An ensemble of small networks over a thermometer code of the levels: bit (s, l) says "sub-layer s keeps at least level
l". Compared with one-hot levels, neighbouring levels share most bits, so each measurement teaches about its neighbours;
the within-ratio rank correlation at 400 evaluations rises from 0.79 to 0.95 (dev/LOG.md). Each network adds a linear
part (every sub-layer's own damage) to a multi-layer perceptron (their interactions).

The networks predict log(log-perplexity − offset): errors grow with the damage, and on this scale they are about equal
at all ratios. Every row is hidden from two members, whose errors on it scale the ensemble's spread into an honest
uncertainty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grid import Grid


@dataclass(frozen=True)
class Prediction:
    """Log-perplexity in nats and its standard uncertainty, fp32 [P] each."""

    mean: Tensor
    std: Tensor


def one_hot(levels: Tensor, grid: Grid) -> Tensor:
    """Level probabilities fp32 [P, S, K] of definite levels int64 [P, S]."""
    return F.one_hot(levels, grid.levels).float()


class Predictor(nn.Module):
    """``members`` networks with ``hidden`` units a layer, held as batched matrices: one call evaluates all of them."""

    def __init__(self, grid: Grid, members: int = 8, hidden: int = 128):
        super().__init__()
        self.grid, self.members = grid, members
        level = torch.arange(1, grid.levels)
        self.register_buffer("used", (level <= torch.tensor(grid.maximum)[:, None]).flatten(), persistent=False)
        inputs = int(self.used.sum())
        self.additive = nn.Parameter(torch.zeros(members, inputs, 1))
        sizes = (inputs, hidden, hidden, 1)
        self.weights = nn.ParameterList(torch.empty(members, a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.biases = nn.ParameterList(torch.zeros(members, 1, b) for b in sizes[1:])
        # Buffers, because they are learnt from the data and belong to the saved state.
        self.register_buffer("center", torch.zeros(inputs))
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("target_mean", torch.zeros(()))
        self.register_buffer("target_std", torch.ones(()))
        self.register_buffer("spread_scale", torch.ones(()))
        self.register_buffer("residual", torch.zeros(()))

    def initialise(self, seed: int) -> None:
        """Draw fresh weights; the same seed gives the same predictor."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight, scale in zip(self.weights, (1.0, 1.0, 0.1), strict=True):
                draw = torch.randn(weight.shape, generator=generator) * scale / math.sqrt(weight.shape[1])
                weight.copy_(draw)
            for parameter in (self.additive, *self.biases):
                parameter.zero_()

    def encode(self, probabilities: Tensor) -> Tensor:
        """Thermometer code [P, bits] of (relaxed) level probabilities [P, S, K]: P(level ≥ l) for l = 1…maximum."""
        at_least = probabilities.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        return at_least.flatten(1)[:, self.used]

    def standardised(self, code: Tensor) -> Tensor:
        """Members' outputs [members, P] for codes [P, bits] or [members, P, bits], in units of ``target_std``."""
        x = (code - self.center).expand(self.members, *code.shape[-2:])
        hidden = x
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = F.silu(torch.baddbmm(bias, hidden, weight))
        return (torch.baddbmm(self.biases[-1], hidden, self.weights[-1]) + x @ self.additive).squeeze(-1)

    def relaxed(self, probabilities: Tensor) -> Tensor:
        """Members' log-perplexities [members, P] in nats for level probabilities [P, S, K]; differentiable."""
        return self.to_nats(self.standardised(self.encode(probabilities)))

    def from_nats(self, log_perplexity: Tensor) -> Tensor:
        """Log-perplexities as the networks predict them: centred, scaled logarithms of what exceeds the offset."""
        return ((log_perplexity - self.offset).log() - self.target_mean) / self.target_std

    def to_nats(self, standardised: Tensor) -> Tensor:
        """Inverse of :meth:`from_nats`."""
        return self.offset + (standardised * self.target_std + self.target_mean).exp()

    def members_at(self, levels: Tensor) -> Tensor:
        """Members' log-perplexities [members, P] for definite levels int64 [P, S]."""
        return self.relaxed(one_hot(levels.to(self.center.device), self.grid))

    @torch.no_grad()
    def forward(self, levels: Tensor) -> Prediction:
        """Predict for definite levels int64 [P, S]."""
        outputs = self.standardised(self.encode(one_hot(levels.to(self.center.device), self.grid)))
        mean = self.to_nats(outputs.mean(0))
        std = (outputs.var(0) * self.spread_scale.square() + self.residual.square()).sqrt()
        return Prediction(mean, std * self.target_std * (mean - self.offset))

    def calibrate_uncertainty(self, outputs: Tensor, held_out: Tensor, targets: Tensor) -> None:
        """Fit the uncertainty to out-of-fold errors: σ² = (scale · ensemble std)² + residual².

        ``outputs`` [members, N] and ``targets`` [N] are standardised; ``held_out`` bool [members, N] marks the members
        (two or more a row) that never saw a row. Members agree on what they have seen, so only the unseen rows tell
        how far they may be off.
        """
        unseen = torch.where(held_out, outputs, torch.nan)
        error = (unseen.nanmean(0) - targets).abs()
        spread = ((unseen - unseen.nanmean(0)).square().nansum(0) / (held_out.sum(0) - 1)).sqrt()
        # Quantiles, not means: the few policies near collapse err a hundred times as much as the rest.
        self.spread_scale.fill_(float(error.quantile(0.9) / spread.quantile(0.9).clamp_min(1e-9)))
        # A part of the error is common to all members and shows in no spread.
        self.residual.fill_(float(error.median()) / 2)

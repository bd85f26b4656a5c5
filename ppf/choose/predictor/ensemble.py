"""Ensembles of networks: each member never sees some of the rows, and its errors on those calibrate the uncertainty.

Every row is hidden from two members, whose errors on it scale the ensemble's spread into an honest uncertainty.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ...model.grid import Grid
from .base import Prediction, Predictor, one_hot

_BATCH = 256


class Ensemble(Predictor):
    """``members`` networks of one architecture, held as batched matrices: one call evaluates all of them."""

    def __init__(self, grid: Grid, members: int):
        super().__init__(grid, members)
        self.register_buffer("spread_scale", torch.ones(()))
        self.register_buffer("residual", torch.zeros(()))

    @abstractmethod
    def initialise(self, seed: int) -> None:
        """Draw fresh weights; the same seed gives the same predictor."""

    @abstractmethod
    def encode(self, probabilities: Tensor) -> Tensor:
        """The networks' inputs [P, ...] for (relaxed) level probabilities [P, S, K]."""

    @abstractmethod
    def standardised(self, code: Tensor) -> Tensor:
        """Members' outputs [members, P] for codes [P, ...] or [members, P, ...], in units of ``target_std``."""

    def centre(self, code: Tensor) -> None:
        """Learn the inputs' means from the codes [N, ...] of the training policies."""
        self.center.copy_(code.mean(0))

    def relaxed(self, probabilities: Tensor) -> Tensor:
        return self.to_nats(self.standardised(self.encode(probabilities)))

    @torch.no_grad()
    def forward(self, levels: Tensor) -> Prediction:
        outputs = self.standardised(self.encode(one_hot(levels.to(self.device), self.grid)))
        mean = self.to_nats(outputs.mean(0))
        std = (outputs.var(0) * self.spread_scale.square() + self.residual.square()).sqrt()
        return Prediction(mean, std * self.target_std * (mean - self.offset))

    def fit(self, levels: Tensor, log_perplexity: Tensor, seed: int, steps: int, fresh: bool) -> None:
        code = self.encode(one_hot(levels, self.grid))
        if fresh:
            self.initialise(seed)
            self.centre(code)
            self.standardise(log_perplexity)
        held_out = _folds(len(levels), self.members, seed).to(self.device)
        targets = self.from_nats(log_perplexity)
        _descend(self, code, targets, held_out, seed, steps)
        with torch.no_grad():
            self.calibrate_uncertainty(self.standardised(code), held_out, targets)

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


def _folds(rows: int, members: int, seed: int) -> Tensor:
    """Bool [members, rows]: the rows that each member must not see; every row is hidden from two members or three."""
    generator = torch.Generator().manual_seed(seed)
    folds = members // 2
    fold = torch.randperm(rows, generator=generator) % folds
    return fold == (torch.arange(members) % folds)[:, None]


def _descend(ensemble: Ensemble, code: Tensor, targets: Tensor, held_out: Tensor, seed: int, steps: int) -> None:
    """AdamW on mean squared error, every member on minibatches of its own rows."""
    generator = torch.Generator().manual_seed(seed + 1)
    seen = [torch.nonzero(~mask).squeeze(1) for mask in held_out]
    optimiser = torch.optim.AdamW(ensemble.parameters(), lr=3e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.1)
    batch = min(_BATCH, min(len(rows) for rows in seen))
    for _ in range(steps):
        draws = [torch.randint(len(rows), (batch,), generator=generator) for rows in seen]
        index = torch.stack([rows[draw.to(rows.device)] for rows, draw in zip(seen, draws, strict=True)])
        loss = (ensemble.standardised(code[index]) - targets[index]).square().mean(1).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()

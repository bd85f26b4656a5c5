"""``gp``: a Gaussian process over policies, exact in its data.

From a few hundred measurements it ranks policies as networks do from thousands, and it knows what it knows: its
uncertainty vanishes at measured policies and grows away from them (dev/LOG.md has the comparison). The posterior is
exact (Rasmussen & Williams, algorithm 2.1): n³ operations in fp64 for n measurements, seconds on a CPU for n = 4,000.

Its members are plausible functions: mean + std · ξ with smooth random functions ξ of variance 1, in pairs mirrored at
the mean. Each of them agrees with the measurements, and at any policy they spread as the uncertainty says. (Draws from
the posterior by random Fourier features were tried first; their spread was three times too small.)

What is saved are the data and the kernel's parameters; everything else follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import Grid
from .base import Prediction, Predictor
from .kernel import PolicyKernel
from .likelihood import maximise_likelihood
from .posterior import Embedded, Posterior, Waves

# One step on the kernel's parameters costs as much as several of a network's, and fewer are needed.
_STEPS_SHARE = 1 / 8
# Policies whose covariances with the data are held at once.
_CHUNK = 16_384
_START_NOISE = math.log(1e-2)
# 90 % of a normal distribution lie within so many standard deviations.
_NINETY = 1.645


class GaussianProcess(Predictor):
    """Posterior of the standardised log(log-perplexity − offset) under :class:`PolicyKernel` and equal noise."""

    kind = "gp"

    def __init__(self, grid: Grid, members: int = 8):
        super().__init__(grid, members)
        self.kernel = PolicyKernel(grid)
        self.log_noise = nn.Parameter(torch.tensor(_START_NOISE))
        self.register_buffer("levels", torch.zeros(0, grid.sublayers, dtype=torch.int16))
        self.register_buffer("targets", torch.zeros(0))
        self.register_buffer("spread_scale", torch.ones(()))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self._posterior: Posterior | None = None
        self.double()

    def fit(self, levels: Tensor, log_perplexity: Tensor, seed: int, steps: int, fresh: bool) -> None:
        values = log_perplexity.double()
        if fresh:
            self.kernel.reset()
            self.log_noise.data.fill_(_START_NOISE)
            self.standardise(values)
        targets = self.from_nats(values)
        maximise_likelihood(self.kernel, self.log_noise, levels, targets, seed, max(1, round(steps * _STEPS_SHARE)))
        self.levels, self.targets = levels.to(torch.int16), targets
        self.seed.fill_(seed)
        self._posterior = None
        self._calibrate_uncertainty()

    @property
    def posterior(self) -> Posterior:
        """The posterior of the present data and parameters, worked out when first asked for."""
        if self._posterior is None:
            with torch.no_grad():
                self._posterior = Posterior(self.kernel, self.log_noise, self.levels.long(), self.targets)
            self._waves = Waves(self.members // 2, self.grid.sublayers, int(self.seed), self.device)
        return self._posterior

    def _calibrate_uncertainty(self) -> None:
        """Widen the uncertainty if fewer than 90 % of the rows, each left out in turn, lie within their 90 % intervals.

        Never narrow it: the parameters were chosen to suit these rows, which flatters them.
        """
        self.spread_scale.copy_((self.posterior.left_out().abs().quantile(0.9) / _NINETY).clamp_min(1.0))

    def relaxed(self, probabilities: Tensor) -> Tensor:
        return self._members(self.kernel.embed(probabilities.to(self.offset.dtype)))

    def members_at(self, levels: Tensor) -> Tensor:
        chunks = levels.to(self.device).split(_CHUNK)
        return torch.cat([self._members(self.kernel.at(chunk)) for chunk in chunks], dim=1)

    def _members(self, embedded: Embedded) -> Tensor:
        mean, variance = self.posterior(embedded)
        away = self.spread_scale * variance.sqrt() * self._waves(embedded[0]).T
        return self.to_nats(torch.cat((mean + away, mean - away))).float()

    @torch.no_grad()
    def forward(self, levels: Tensor) -> Prediction:
        parts = [self.posterior(self.kernel.at(chunk)) for chunk in levels.to(self.device).split(_CHUNK)]
        mean, variance = (torch.cat(part) for part in zip(*parts, strict=True))
        mean, std = self.to_nats(mean), self.spread_scale * (variance + self.posterior.noise).sqrt()
        return Prediction(mean.float(), (std * self.target_std * (mean - self.offset)).float())

    def _apply(self, *arguments: Any, **named: Any) -> GaussianProcess:
        self._posterior = None  # it lives on the old device
        return super()._apply(*arguments, **named)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        """Buffers take the number of rows that the saved ones have."""
        self._posterior = None
        for name in ("levels", "targets"):
            saved = state.get(prefix + name)
            if saved is not None and saved.shape[1:] == getattr(self, name).shape[1:]:
                setattr(self, name, torch.empty_like(saved, device=self.device))
        super()._load_from_state_dict(state, prefix, *arguments)

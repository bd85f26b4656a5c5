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

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...model.grid import Grid
from .base import Prediction, Predictor
from .kernel import PolicyKernel
from .likelihood import maximise_likelihood
from .posterior import Posterior, Waves
from .spread import Spread

# One step on the kernel's parameters costs as much as several of a network's, and fewer are needed.
_STEPS_SHARE = 1 / 8
# Covariances of policies with the data that are held at once, fp64 and about five times: what a cache or a GPU holds.
_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
_START_NOISE = math.log(1e-2)
# Below so many measurements parts of them are predicted from the others to see how wide the uncertainty must be.
_FEW = 400
_VERY_FEW, _PARTS = 100, 6
# More are thinned out at random: the posterior of 10,000 takes 5 GB while it is worked out and, on two CPU cores, half
# a minute.
_LARGEST = 10_000


class GaussianProcess(Predictor):
    """Posterior of the standardised log(log-perplexity − offset) under :class:`PolicyKernel` and equal noise."""

    kind = "gp"

    def __init__(self, grid: Grid, energies: Tensor | None = None, members: int = 8):
        super().__init__(grid, members)
        self.kernel = PolicyKernel(grid, energies)
        self.log_noise = nn.Parameter(torch.tensor(_START_NOISE))
        self.register_buffer("levels", torch.zeros(0, grid.sublayers, dtype=torch.int16))
        self.register_buffer("targets", torch.zeros(0))
        self.spread = Spread()
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self._posterior: Posterior | None = None
        self.double()

    def fit(self, levels: Tensor, log_perplexity: Tensor, seed: int, steps: int, fresh: bool) -> None:
        values = log_perplexity.double()
        if len(levels) > _LARGEST:
            kept = torch.randperm(len(levels), generator=torch.Generator().manual_seed(seed))[:_LARGEST].sort().values
            levels, values = levels[kept.to(levels.device)], values[kept.to(levels.device)]
        if fresh:
            self.kernel.reset()
            self.log_noise.data.fill_(_START_NOISE)
            self.standardise(values)
        steps = max(1, round(steps * _STEPS_SHARE))
        self.levels, self.targets = levels.to(torch.int16), self.from_nats(values)
        maximise_likelihood(self.kernel, self.log_noise, levels, self.targets, seed, steps)
        self.seed.fill_(seed)
        self._posterior = None
        if fresh:  # a few more rows change little, and it costs another training
            self._calibrate_uncertainty(levels, seed, steps)

    @property
    def posterior(self) -> Posterior:
        """The posterior of the present data and parameters, worked out when first asked for."""
        if self._posterior is None:
            with torch.no_grad():
                self._posterior = Posterior(self.kernel, self.log_noise, self.levels.long(), self.targets)
            self._waves = Waves(self.members // 2, 3 * self.grid.sublayers, int(self.seed), self.device)
        return self._posterior

    def _calibrate_uncertainty(self, levels: Tensor, seed: int, steps: int) -> None:
        """Widen the uncertainty where rows that were kept out show it to be too small.

        Of few rows each part is predicted from the others, parameters included: chosen to suit all rows, they flatter
        the errors. Halves will do, but of very few: half of 24 rows teach so little that even the uncertainty is
        another one. Of more, the later ones are predicted from the first two fifths, as a search goes, and each row
        from all others.
        """
        count = len(levels)
        if count < _FEW:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(levels.device)
            parts = order.tensor_split(2 if count >= _VERY_FEW else _PARTS)
            others = [torch.cat([part for part in parts if part is not unseen]) for unseen in parts]
            trials = [self._trial(levels, *pair, seed, steps) for pair in zip(others, parts, strict=True)]
            later = left_out = tuple(torch.cat(part) for part in zip(*trials, strict=True))
        else:
            seen, unseen = torch.arange(count, device=levels.device).tensor_split([2 * count // 5])
            later, left_out = self._trial(levels, seen, unseen, seed, steps), self.posterior.left_out()
        self.spread.fit(later, left_out)

    def _trial(self, levels: Tensor, seen: Tensor, unseen: Tensor, seed: int, steps: int) -> tuple[Tensor, Tensor]:
        """Standardised errors of predicting rows ``unseen`` from rows ``seen`` with the latters' own parameters, and
        the standard deviations they are measured in."""
        kernel, log_noise = copy.deepcopy(self.kernel), nn.Parameter(self.log_noise.detach().clone())
        kernel.reset()
        log_noise.data.fill_(_START_NOISE)
        maximise_likelihood(kernel, log_noise, levels[seen], self.targets[seen], seed, steps)
        with torch.no_grad():
            posterior = Posterior(kernel, log_noise, levels[seen], self.targets[seen])
            mean, variance, _ = posterior.at(levels[unseen])
            std = (variance + posterior.noise).sqrt()
            return (mean - self.targets[unseen]) / std, std

    def relaxed(self, probabilities: Tensor) -> Tensor:
        return self._members(*self.posterior.relaxed(probabilities.to(self.offset.dtype)))

    def members_at(self, levels: Tensor) -> Tensor:
        return torch.cat([self._members(*self.posterior.at(chunk)) for chunk in self._chunks(levels)], dim=1)

    def _chunks(self, levels: Tensor) -> tuple[Tensor, ...]:
        return levels.to(self.device).split(max(64, _ELEMENTS[self.device.type] // max(1, len(self.targets))))

    def _members(self, mean: Tensor, variance: Tensor, coordinates: Tensor) -> Tensor:
        std = (variance + self.posterior.noise).sqrt()
        away = self.spread(std) * variance.sqrt() * self._waves(coordinates).T
        return self.to_nats(torch.cat((mean + away, mean - away))).float()

    @torch.no_grad()
    def forward(self, levels: Tensor) -> Prediction:
        parts = [self.posterior.at(chunk)[:2] for chunk in self._chunks(levels)]
        mean, variance = (torch.cat(part) for part in zip(*parts, strict=True))
        mean, std = self.to_nats(mean), (variance + self.posterior.noise).sqrt()
        return Prediction(mean.float(), (self.spread(std) * std * self.target_std * (mean - self.offset)).float())

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

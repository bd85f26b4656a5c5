"""Learning the kernel's parameters: what makes the measurements most probable."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernel import PolicyKernel

# Measurements a step looks at. A step costs the cube of it; 800 lower the error by 5 % at 4,000 (dev/LOG.md).
_BATCH = {"cpu": 400, "cuda": 800}
_RATE = 0.1
_FEW = 300


def maximise_likelihood(
    kernel: PolicyKernel, log_noise: Tensor, levels: Tensor, targets: Tensor, seed: int, steps: int
) -> None:
    """Adam on the negative log marginal likelihood of random subsets, plus the kernel's penalty; in place.

    ``levels`` int64 [N, S], ``targets`` fp64 [N]; the same seed gives the same parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [*kernel.parameters(), log_noise]
    optimiser = torch.optim.Adam(parameters, lr=_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share(step, steps))
    count = min(_BATCH[targets.device.type], len(targets))
    # With few measurements the likelihood flatters whatever parameters suit them: then the prior has more say.
    prior = (1 + _FEW / len(targets)) * count / len(targets)
    for _ in range(steps):
        rows = torch.randperm(len(targets), generator=generator)[:count].to(targets.device)
        loss = _surprise(kernel, log_noise, levels[rows], targets[rows]) + prior * kernel.penalty()
        optimiser.zero_grad(set_to_none=True)
        (loss / count).backward()
        optimiser.step()
        schedule.step()


def _share(step: int, steps: int) -> float:
    """The share of the rate at a step: up within a fifth of the steps, then down to nothing on a cosine."""
    return min(1.0, (step + 1) / (0.2 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def _surprise(kernel: PolicyKernel, log_noise: Tensor, levels: Tensor, targets: Tensor) -> Tensor:
    """Negative log marginal likelihood up to a constant (Rasmussen & Williams, eq. 2.30)."""
    embedded = kernel.at(levels)
    factor = torch.linalg.cholesky(noisy(kernel(embedded, embedded), log_noise))
    whitened = torch.linalg.solve_triangular(factor, targets[:, None], upper=False)
    return whitened.square().sum() / 2 + factor.diagonal().log().sum()


# Below this standard deviation (in standardised units) rounding errors of the Cholesky factor exceed the noise.
_SMALLEST_NOISE = 1e-3


def noise_variance(log_noise: Tensor) -> Tensor:
    return (2 * log_noise).exp() + _SMALLEST_NOISE**2


def noisy(covariance: Tensor, log_noise: Tensor) -> Tensor:
    """Covariance [N, N] of measurements: of the function, plus the noise on the diagonal."""
    return covariance + torch.diag(noise_variance(log_noise).expand(len(covariance)))

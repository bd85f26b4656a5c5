"""A Gaussian process after it has seen its data: mean, variance, and plausible functions around the mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernel import PolicyKernel
from .likelihood import noise_variance, noisy

Embedded = tuple[Tensor, Tensor]
_BLOCK = 512
# Measured: neighbours 0.05 apart have correlation 0.73 in what the data leave open, and 0.99 in the function itself.
_ROUGHNESS = 12.0
_WAVES = 64


class Posterior:
    """The posterior given ``levels`` int64 [N, S] and ``targets`` fp64 [N], for a kernel that no longer changes."""

    def __init__(self, kernel: PolicyKernel, log_noise: Tensor, levels: Tensor, targets: Tensor):
        self.kernel, self.noise = kernel, noise_variance(log_noise)
        self.data = kernel.at(levels)
        factor = torch.linalg.cholesky(noisy(kernel(self.data, self.data), log_noise))
        identity = torch.eye(len(targets), dtype=factor.dtype, device=factor.device)
        whitening = torch.linalg.solve_triangular(factor, identity, upper=False)  # L⁻¹ [N, N]
        self.coefficients = whitening.T @ (whitening @ targets)  # (K + σ²)⁻¹ y [N]
        self.precision = whitening.square().sum(0)  # diagonal of (K + σ²)⁻¹ [N]
        # Half the bytes to read for one policy, for 1 % of error in its uncertainty.
        self.whitening = whitening.float()

    def __call__(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """Mean and variance of the function, [P] each."""
        covariance = self.kernel(embedded, self.data)
        variance = self.kernel.variance(embedded) - self._explained(covariance.float())
        return covariance @ self.coefficients, variance.clamp_min(1e-8)

    def _explained(self, covariance: Tensor) -> Tensor:
        """Variance fp64 [P] that the data take away, |L⁻¹ k|²; blocks of rows spare most of the triangle's zeros."""
        total = torch.zeros(len(covariance), dtype=torch.float64, device=covariance.device)
        for start in range(0, len(self.whitening), _BLOCK):
            stop = min(start + _BLOCK, len(self.whitening))
            block = self.whitening[start:stop, :stop]
            total = total + (covariance[:, :stop] @ block.T).square().sum(-1)
        return total

    def left_out(self) -> Tensor:
        """Standardised errors [N] of predicting each row from all others (Rasmussen & Williams, eq. 5.12)."""
        return self.coefficients / self.precision.sqrt()


class Waves:
    """``count`` random functions of a policy's places with mean 0 and variance 1: sums of random cosines.

    Their frequencies are those of a Matérn 3/2 kernel (Student's t with 3 degrees of freedom), times a roughness: what
    the data leave open varies faster than the function itself.
    """

    def __init__(self, count: int, sublayers: int, seed: int, device: torch.device):
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(sublayers + 3, count * _WAVES, generator=generator, dtype=torch.float64)
        student = normal[3:] * (3 / normal[:3].square().sum(0)).sqrt()
        self.frequencies = (_ROUGHNESS * student).to(device)
        self.phases = (2 * math.pi * torch.rand(count * _WAVES, generator=generator, dtype=torch.float64)).to(device)
        self.count = count

    def __call__(self, places: Tensor) -> Tensor:
        """Values [P, count] at ``places`` u [P, S]."""
        waves = torch.cos(places @ self.frequencies + self.phases)
        return math.sqrt(2 / _WAVES) * waves.unflatten(-1, (self.count, _WAVES)).sum(-1)

"""A Gaussian process after it has seen its data: mean, variance, and plausible functions around the mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernel import Embedded, PolicyKernel
from .likelihood import noise_variance, noisy

_BLOCK = {"cpu": 512, "cuda": 1024}
# Measured: neighbours 0.05 apart have correlation 0.73 in what the data leave open, and 0.99 in the function itself.
_ROUGHNESS = 12.0
_WAVES = 64


class Posterior:
    """The posterior given ``levels`` int64 [N, S] and ``targets`` fp64 [N], for a kernel that no longer changes."""

    def __init__(self, kernel: PolicyKernel, log_noise: Tensor, levels: Tensor, targets: Tensor):
        self.kernel, self.noise = kernel, noise_variance(log_noise)
        self.tables = kernel.tables()
        self.data = kernel.at(levels, self.tables)
        self.covariance = noisy(kernel(self.data, self.data), log_noise)  # K + σ² [N, N]
        factor = torch.linalg.cholesky(self.covariance)
        identity = torch.eye(len(targets), dtype=factor.dtype, device=factor.device)
        whitening = torch.linalg.solve_triangular(factor, identity, upper=False)  # L⁻¹ [N, N]
        self.coefficients = whitening.T @ (whitening @ targets)  # (K + σ²)⁻¹ y [N]
        self.precision = whitening.square().sum(0)  # diagonal of (K + σ²)⁻¹ [N]
        # Half the bytes to read for one policy.
        self.whitening = whitening.float()

    def _moments(self, embedded: Embedded) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and coordinates. The variance is that of the prior less |L⁻¹ k|², for the covariances k with
        the data: a small difference of large numbers, lost in fp32. It is measured from the nearest row j of the data
        instead: k(x, x) + K̃ⱼⱼ − 2 kⱼ − |L⁻¹ (k − K̃ⱼ)|² with K̃ = K + σ² is the same number, and all its terms are
        small where the variance is (fp32 keeps four digits of it)."""
        covariance = self.kernel(embedded, self.data)
        own = self.covariance.diagonal()
        nearest = torch.add(own, covariance.detach(), alpha=-2).argmin(1)
        apart = self.kernel.variance(embedded) + own[nearest] - 2 * covariance.gather(1, nearest[:, None])[:, 0]
        variance = apart - self._explained((covariance - self.covariance[nearest]).float())
        return covariance @ self.coefficients, variance.clamp_min(1e-8), embedded.matern

    def _explained(self, covariance: Tensor) -> Tensor:
        """|L⁻¹ k|² fp64 [P] of fp32 rows k [P, N]; blocks of L⁻¹'s rows spare most of the triangle's zeros."""
        block = _BLOCK[covariance.device.type]
        total = torch.zeros(len(covariance), dtype=torch.float64, device=covariance.device)
        for start in range(0, len(self.whitening), block):
            stop = min(start + block, len(self.whitening))
            rows = self.whitening[start:stop, :stop]
            total = total + (covariance[:, :stop] @ rows.T).square().sum(-1)
        return total

    def at(self, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance [P] at definite policies, levels int64 [P, S], and their coordinates [P, 3S]."""
        return self._moments(self.kernel.at(levels, self.tables))

    def relaxed(self, probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same at level probabilities fp64 [P, S, K]."""
        return self._moments(self.kernel.embed(probabilities, self.tables))

    def left_out(self) -> tuple[Tensor, Tensor]:
        """Standardised errors [N] of predicting each row from all others, and the standard deviations they are
        measured in (Rasmussen & Williams, eq. 5.12)."""
        std = self.precision.rsqrt()
        return self.coefficients * std, std


class Waves:
    """``count`` random functions of a policy's coordinates with mean 0 and variance 1: sums of random cosines.

    Their frequencies are those of a Matérn 3/2 kernel (Student's t with 3 degrees of freedom), times a roughness: what
    the data leave open varies faster than the function itself.
    """

    def __init__(self, count: int, dimensions: int, seed: int, device: torch.device):
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(dimensions + 3, count * _WAVES, generator=generator, dtype=torch.float64)
        student = normal[3:] * (3 / normal[:3].square().sum(0)).sqrt()
        self.frequencies = (_ROUGHNESS * student).to(device)
        self.phases = (2 * math.pi * torch.rand(count * _WAVES, generator=generator, dtype=torch.float64)).to(device)
        self.count = count

    def __call__(self, coordinates: Tensor) -> Tensor:
        """Values [P, count] at ``coordinates`` [P, D]."""
        waves = torch.cos(coordinates @ self.frequencies + self.phases)
        return math.sqrt(2 / _WAVES) * waves.unflatten(-1, (self.count, _WAVES)).sum(-1)

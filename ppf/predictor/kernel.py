"""The covariance of two policies: a linear part (every sub-layer's own damage) and a Matérn part (their interactions).

Levels are first placed on a line per sub-layer, whose gaps are learnt and positive: a wide gap between two levels
says that the step between them matters. The squared distance of two policies is the sum over sub-layers, so
one matrix product gives all pairs, whatever the number of levels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import Grid

# Before any data, a sub-layer's levels span this distance in the Matérn part. See dev/LOG.md for what fits.
_SPAN = 0.5
# How far the logarithms of gaps and weights may stray from their sub-layer's (and all sub-layers') mean.
_GAP_FREEDOM, _WEIGHT_FREEDOM = 0.5, 1.0


class PolicyKernel(nn.Module):
    """k(x, x') = 1 + v·v' + a·(1 + √3 d)·exp(−√3 d) with d = |u − u'|: Matérn 3/2, Rasmussen & Williams eq. 4.17.

    u and v [S] are the policies' places on the sub-layers' lines in two scales; fp64 throughout.
    """

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid
        steps, top = grid.levels - 1, torch.tensor(grid.maximum, dtype=torch.float64)
        self.register_buffer("used", (torch.arange(steps) < top[:, None]).double(), persistent=False)
        self.register_buffer("start", torch.log(torch.expm1(1 / top))[:, None], persistent=False)
        self.gap = nn.Parameter(torch.zeros(grid.sublayers, steps, dtype=torch.float64))
        self.scale = nn.Parameter(torch.zeros(grid.sublayers, dtype=torch.float64))
        self.weight = nn.Parameter(torch.zeros(grid.sublayers, dtype=torch.float64))
        self.amplitude = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget what was learnt: even gaps, all sub-layers alike."""
        for parameter, value in zip(self.parameters(), (0.0, math.log(_SPAN), 0.0, 0.0), strict=True):
            parameter.fill_(value)

    def places(self) -> tuple[Tensor, Tensor]:
        """The lines: places u and v of every level, fp64 [S, K] each; level 0 of u and the dense level of v are 0."""
        line = F.pad((F.softplus(self.start + self.gap) * self.used).cumsum(1), (1, 0))
        return line * self.scale.exp()[:, None], (line - line[:, -1:]) * self.weight.exp()[:, None]

    def embed(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Expected places u and v [P, S] of (relaxed) policies, level probabilities fp64 [P, S, K]."""
        return tuple(torch.einsum("psk,sk->ps", probabilities, table) for table in self.places())

    def at(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Places u and v fp64 [P, S] of definite policies, levels int64 [P, S]."""
        sublayer = torch.arange(levels.shape[1], device=levels.device)
        return tuple(table[sublayer, levels] for table in self.places())

    def forward(self, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
        """Covariances [P, Q] of embedded policies."""
        (u, v), (other_u, other_v) = left, right
        square = u.square().sum(-1)[:, None] + other_u.square().sum(-1) - 2 * u @ other_u.T
        # The floor keeps the square root's gradient finite where two policies coincide.
        distance = (3 * square.clamp_min(1e-16)).sqrt()
        return 1 + v @ other_v.T + self.amplitude.exp() * (1 + distance) * torch.exp(-distance)

    def variance(self, embedded: tuple[Tensor, Tensor]) -> Tensor:
        """Prior variances [P] of embedded policies."""
        return 1 + embedded[1].square().sum(-1) + self.amplitude.exp()

    def penalty(self) -> Tensor:
        """Negative log prior of the parameters: gaps are alike within a sub-layer, scales and weights over all."""
        gaps = self.gap - (self.gap * self.used).sum(1, keepdim=True) / self.used.sum(1, keepdim=True)
        strays = (gaps.square() * self.used).sum() / _GAP_FREEDOM**2
        for parameter in (self.scale, self.weight):
            strays = strays + (parameter - parameter.mean()).square().sum() / _WEIGHT_FREEDOM**2
        return strays / 2

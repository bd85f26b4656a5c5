"""The covariance of two policies: what they share in each sub-layer's damage, and in how damages interact.

Every sub-layer's levels stand on a line, whose gaps are learnt and positive: a wide gap says that the step between two
levels matters. Before any data the gaps are those of the library's error energies, which know the shape of a
sub-layer's damage but not its size. From the lines come the coordinates of a policy:

* its places, one a sub-layer;
* absence, 1 for a sub-layer that is gone altogether: that is another thing than keeping very little of it;
* strain, the logarithm of 1 plus the damage accumulated down to each depth: what a layer can lose depends on what
  reaches it.

A linear part adds up every sub-layer's own damage, a Matérn 3/2 part over all coordinates the interactions, and an
exponential part over the places what is rough. Squared distances are sums over coordinates, so one matrix product
gives all pairs. What each of these is worth stands in dev/LOG.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.grid import Grid

# Values of the parameters before any data, as logarithms.
_START = {
    "gap": 0.0,
    "own_gap": 0.0,
    "scale": math.log(0.5),
    "weight": 0.0,
    "absence": math.log(0.1),
    "reach": math.log(0.05),
    "strain": math.log(0.3),
    "rough": math.log(0.3),
    "amplitude": 0.0,
    "rough_amplitude": -2.0,
}
# How far they may stray: gaps from their sub-layer's mean, the others from the mean of all sub-layers, strain from the
# depth before.
_FREEDOM = {
    "gap": 0.7, "own_gap": 0.7, "scale": 0.8, "weight": 0.8, "absence": 0.8, "reach": 0.7, "strain": 0.2, "rough": 0.8,
}  # fmt: skip
_SMALLEST_GAP = 2e-3


class Embedded(NamedTuple):
    """Coordinates fp64 of P policies, and the squared lengths of those that distances are taken of."""

    linear: Tensor  # [P, S]
    matern: Tensor  # [P, 3S]
    rough: Tensor  # [P, S]
    matern_square: Tensor  # [P]
    rough_square: Tensor  # [P]


class PolicyKernel(nn.Module):
    """k(x, x') = 1 + v·v' + a·(1 + √3 d)·exp(−√3 d) + b·exp(−d'), all fp64.

    d and d' are distances in the Matérn and the rough coordinates (Rasmussen & Williams, eq. 4.17 and 4.18).
    ``energies`` [S, K] are the library's error energies of every level; without them, gaps start out even.
    """

    def __init__(self, grid: Grid, energies: Tensor | None = None):
        super().__init__()
        self.grid = grid
        sublayers, steps, layers = grid.sublayers, grid.levels - 1, grid.structure.layers
        used = torch.arange(steps) < torch.tensor(grid.maximum)[:, None]
        self.register_buffer("used", used.double(), persistent=False)
        depth = torch.arange(sublayers).view(2, layers).T.flatten()  # attention 0, FFN 0, attention 1, …
        self.register_buffer("by_depth", depth, persistent=False)
        self.register_buffer("start", _start_gaps(grid, energies))
        for name in _START:
            shape = () if "amplitude" in name else (sublayers, steps) if "gap" in name else (sublayers,)
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=torch.float64)))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget what was learnt."""
        for name, value in _START.items():
            getattr(self, name).fill_(value)

    def tables(self) -> Tensor:
        """What every level of every sub-layer contributes, fp64 [5, S, K].

        The linear part's coordinate (0 for the dense level), place, absence, the rough part's place, damage.
        """
        line, own = self._line(self.gap), self._line(self.own_gap)
        absent = F.pad(self.absence.exp()[:, None], (0, line.shape[1] - 1))
        return torch.stack(
            (
                (own - own[:, -1:]) * self.weight.exp()[:, None],
                line * self.scale.exp()[:, None],
                absent,
                line * self.rough.exp()[:, None],
                (line[:, -1:] - line) * self.reach.exp()[:, None],
            )
        )

    def _line(self, gap: Tensor) -> Tensor:
        """Places [S, K] of every level: 0 for level 0, then the sums of the gaps."""
        return F.pad((F.softplus(self.start + gap) * self.used).cumsum(1), (1, 0))

    def at(self, levels: Tensor, tables: Tensor | None = None) -> Embedded:
        """Coordinates of definite policies, levels int64 [P, S]; ``tables`` if they are known already."""
        tables = self.tables() if tables is None else tables
        return self._coordinates(tables[:, torch.arange(levels.shape[1], device=levels.device), levels])

    def embed(self, probabilities: Tensor, tables: Tensor) -> Embedded:
        """Coordinates of (relaxed) policies, level probabilities fp64 [P, S, K]: of what is expected of each level."""
        return self._coordinates(torch.einsum("psk,tsk->tps", probabilities, tables))

    def _coordinates(self, found: Tensor) -> Embedded:
        linear, place, absent, rough, damage = found
        strain = torch.log1p(damage[:, self.by_depth].cumsum(-1)) * self.strain.exp()
        matern = torch.cat((place, absent, strain), dim=-1)
        return Embedded(linear, matern, rough, matern.square().sum(-1), rough.square().sum(-1))

    def forward(self, left: Embedded, right: Embedded) -> Tensor:
        """Covariances [P, Q]."""
        # Elementwise passes over [P, Q] are what takes the time: amplitudes go into the exponents.
        near = _distance(left.matern, right.matern, left.matern_square, right.matern_square, 3.0)
        smooth = (self.amplitude - near).exp()
        far = _distance(left.rough, right.rough, left.rough_square, right.rough_square)
        rough = (self.rough_amplitude - far).exp()
        linear = torch.addmm(rough, F.pad(left.linear, (0, 1), value=1.0), F.pad(right.linear, (0, 1), value=1.0).T)
        return linear + torch.addcmul(smooth, near, smooth)

    def variance(self, embedded: Embedded) -> Tensor:
        """Prior variances [P]."""
        return 1 + embedded.linear.square().sum(-1) + self.amplitude.exp() + self.rough_amplitude.exp()

    def penalty(self) -> Tensor:
        """Negative log prior of the parameters, up to a constant."""
        total = torch.zeros((), dtype=torch.float64, device=self.start.device)
        for name, freedom in _FREEDOM.items():
            value = getattr(self, name)
            if "gap" in name:
                steps = self.used.sum(1, keepdim=True).clamp_min(1)  # none where the model has no such sub-layer
                mean = (value * self.used).sum(1, keepdim=True) / steps
                strays = (value - mean) * self.used
            else:
                strays = value.diff() if name == "strain" else value - value.mean()
            total = total + (strays / freedom).square().sum() / 2
        return total


def _start_gaps(grid: Grid, energies: Tensor | None) -> Tensor:
    """What softplus turns into the gaps before any data, fp64 [S, K − 1]; every line is about 1 long."""
    top = torch.tensor(grid.top, dtype=torch.float64)[:, None]
    if energies is None:
        gaps = (1 / top).expand(-1, grid.levels - 1)
    else:
        gaps = (energies[:, :-1] - energies[:, 1:]).double().cpu()
    return torch.log(torch.expm1(gaps.clamp_min(_SMALLEST_GAP)))


def _distance(left: Tensor, right: Tensor, left_square: Tensor, right_square: Tensor, scale: float = 1.0) -> Tensor:
    """√scale times the distances [P, Q] of coordinates [P, D] and [Q, D] with squared lengths [P] and [Q]."""
    one = torch.ones_like(left_square)[:, None], torch.ones_like(right_square)[:, None]
    row = torch.cat((-2 * scale * left, scale * left_square[:, None], one[0]), 1)
    column = torch.cat((right, one[1], scale * right_square[:, None]), 1)
    # The floor keeps the square root's gradient finite where two policies coincide.
    return (row @ column.T).clamp_min(1e-16).sqrt()

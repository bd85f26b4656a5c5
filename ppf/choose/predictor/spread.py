"""How much wider than a model says its errors are, for policies that it thinks certain and for those it does not.

A posterior whose parameters suit its own data is too sure of itself, and not everywhere alike. Far from everything
measured, as random policies are, a row left out of the data shows by how much. Close to what a search visited it does
not: there every row has neighbours, and what is asked for next lies between and beyond them. So there the later rows
are predicted from the earlier ones, as the search that found them had to.

Quantiles are those of conformal prediction (Vovk et al., 2005): of n errors the ⌈0.9 (n + 1)⌉-th, which a further one
exceeds in at most a tenth of cases whatever their distribution. Where too few errors are near an anchor, all count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# 90 % of a normal distribution lie within so many standard deviations.
NINETY = 1.645
_WIDEST = 30.0
_SMALLEST_BIN = 15

Trial = tuple[Tensor, Tensor]
"""Errors fp64 [N] in standard deviations, and those standard deviations [N]."""


class Spread(nn.Module):
    """Factors [3] for the standard deviations ``anchors`` [3]; between them the logarithms are interpolated."""

    def __init__(self):
        super().__init__()
        self.register_buffer("anchors", torch.tensor([0.001, 0.01, 0.1], dtype=torch.float64))
        self.register_buffer("factors", torch.ones(3, dtype=torch.float64))

    def forward(self, std: Tensor) -> Tensor:
        """Factors [P] for standard deviations [P]."""
        anchors, factors = self.anchors.log(), self.factors.log()
        place = (std.log()[..., None] - anchors[:-1]) / anchors.diff()
        return (factors[0] + (place.clamp(0, 1) * factors.diff()).sum(-1)).exp()

    def fit(self, later: Trial, left_out: Trial) -> None:
        """Choose the factors, at least 1, so that 90 % of the errors lie in the 90 % intervals.

        ``left_out`` has each row predicted from all others, ``later`` the later rows from the earlier ones; the harder
        of the two counts, but among the largest standard deviations only ``left_out``: what is most uncertain among
        the later rows is so because little was known then.
        """
        low, high = left_out[1].quantile(torch.tensor([0.25, 0.9], dtype=torch.float64, device=self.anchors.device))
        high = torch.maximum(high, 1.1 * low)  # equal standard deviations have no two anchors
        self.anchors.copy_(torch.stack((low, (low * high).sqrt(), high)))
        for index in range(3):
            trials = (left_out, later) if index < 2 else (left_out,)
            self.factors[index] = max(1.0, *(self._needed(*trial, index) for trial in trials))

    def _needed(self, errors: Tensor, std: Tensor, index: int) -> float:
        """The factor that the errors nearest to an anchor ask for, or if these are too few, that all do."""
        edges = (self.anchors[:-1] * self.anchors[1:]).sqrt()
        near = errors[torch.bucketize(std, edges) == index]
        return _factor(near if len(near) >= _SMALLEST_BIN else errors)


def _factor(errors: Tensor) -> float:
    """What the standard deviations of ``errors`` must be multiplied by so that a further one is within them with 90 %
    probability."""
    rank = math.ceil(0.9 * (len(errors) + 1))
    if rank > len(errors):
        return _WIDEST
    return min(_WIDEST, float(errors.abs().kthvalue(rank).values) / NINETY)

"""How much wider than a model says its errors are, for policies that it thinks certain and for those it does not.

A posterior whose parameters suit its own data is too sure of itself, and not everywhere alike: visited policies stand
close together and hide it, policies between what was visited show it. So predictions of rows that were kept out are
compared with their standard deviations, apart for small and for large ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# 90 % of a normal distribution lie within so many standard deviations.
NINETY = 1.645
_WIDEST = 4.0
_SMALLEST_BIN = 15


class Spread(nn.Module):
    """Factors [2] for the standard deviations ``anchors`` [2]; between them the logarithms are interpolated."""

    def __init__(self):
        super().__init__()
        self.register_buffer("anchors", torch.tensor([0.01, 0.1], dtype=torch.float64))
        self.register_buffer("factors", torch.ones(2, dtype=torch.float64))

    def forward(self, std: Tensor) -> Tensor:
        """Factors [P] for standard deviations [P]."""
        low, high = self.anchors.log()
        place = ((std.log() - low) / (high - low)).clamp(0, 1)
        return torch.lerp(self.factors[0].log(), self.factors[1].log(), place).exp()

    def fit(self, trials: list[tuple[Tensor, Tensor]]) -> None:
        """Choose the factors so that 90 % of the errors lie in the 90 % intervals, in the hardest of the ``trials``.

        A trial is errors [N] in standard deviations, and those standard deviations [N]. Factors are at least 1.
        """
        everyone = torch.cat([std for _, std in trials])
        middle = everyone.median()
        self.anchors.copy_(everyone.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64, device=everyone.device)))
        # Equal standard deviations have no two anchors.
        self.anchors[1] = torch.maximum(self.anchors[1], 1.01 * self.anchors[0])
        for index, part in enumerate((lambda std: std <= middle, lambda std: std > middle)):
            needed = [self._needed(errors[part(std)]) for errors, std in trials]
            self.factors[index] = max(1.0, *needed)

    @staticmethod
    def _needed(errors: Tensor) -> float:
        """The factor that some errors ask for; none if they are too few to say."""
        if len(errors) < _SMALLEST_BIN:
            return 1.0
        return min(_WIDEST, float(errors.abs().quantile(0.9)) / NINETY)

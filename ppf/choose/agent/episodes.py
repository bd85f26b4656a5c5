"""What an episode starts from: the budgets that the agent is asked for in training."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..candidates.sampling import RATIO_RANGE


def stratified_ratios(count: int, generator: Generator) -> Tensor:
    """``count`` ascending ratios fp32, one drawn from each of ``count`` equal parts of the range that is learnt."""
    low, high = RATIO_RANGE
    place = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return low + (high - low) * place

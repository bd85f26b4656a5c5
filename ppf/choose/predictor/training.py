"""Training the predictor on experience."""

from __future__ import annotations

from torch import Tensor

from ...timings import timed
from .base import Predictor


@timed("learning predictor")
def fit_predictor(
    predictor: Predictor, levels: Tensor, log_perplexity: Tensor, seed: int, steps: int = 800, fresh: bool = True
) -> None:
    """Fit ``predictor`` in place to levels int64 [N, S] and their measured log-perplexities [N].

    With ``fresh`` it starts from nothing; otherwise from what it has learnt, which needs fewer ``steps``. 800 steps are
    a full training of every kind. Diverged measurements (NaN or infinite) must be left out by the caller.
    """
    device = predictor.device
    predictor.fit(levels.to(device), log_perplexity.float().to(device), seed, steps, fresh)

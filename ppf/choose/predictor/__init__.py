"""The predictor: policy → log-perplexity with an uncertainty, batched and differentiable in relaxed policies."""

from .base import Prediction, Predictor, one_hot
from .captured import CapturedPredictor
from .kinds import DEFAULT, KINDS, make_predictor, predictor_named

__all__ = [
    "DEFAULT", "KINDS", "CapturedPredictor", "Prediction", "Predictor", "make_predictor", "one_hot", "predictor_named",
]  # fmt: skip

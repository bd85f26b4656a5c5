"""A predictor on a GPU, few policies at a time: its small kernels as one replay of a CUDA graph."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ...errors import InputError
from ...fast.capture import record, warm_up
from .base import Prediction, Predictor


class CapturedPredictor:
    """Predictions of ``predictor``, a fitted one on a GPU, for ``count`` policies at a time.

    One policy takes 1.5 ms launched kernel by kernel and a fraction of one recorded (dev/LOG.md). The predictor is
    copied, so that later training changes nothing. Raises ``InputError`` if it is not on a GPU.
    """

    def __init__(self, predictor: Predictor, count: int = 1):
        device = predictor.device
        if device.type != "cuda":
            raise InputError("predictor", device, "is not on a GPU", "Call it as it is")
        self._predictor = copy.deepcopy(predictor).eval()  # the graph reads its tensors wherever they lie
        self._levels = torch.zeros(count, predictor.grid.sublayers, dtype=torch.int64, device=device)
        with torch.cuda.device(device), torch.no_grad():
            warm_up(lambda: self._predictor(self._levels), device)
            self._graph, self._prediction = record(lambda: self._predictor(self._levels))

    def __call__(self, levels: Tensor) -> Prediction:
        """Predict for levels int64 [count, S]; the next call overwrites what this one returned."""
        self._levels.copy_(levels)
        self._graph.replay()
        return self._prediction

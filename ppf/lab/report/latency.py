"""How long a prediction takes, beside a true evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ...choose.candidates.sampling import random_levels, random_ratios
from ...choose.predictor import CapturedPredictor, Predictor

_BATCH = {"cuda": 1 << 17, "cpu": 1 << 11}
_DRAWN = 1 << 10
_REPEATS = 20


def latency(predictor: Predictor, evaluation_seconds: float) -> dict[str, Any]:
    """Milliseconds for one policy with its uncertainty, policies a second in a batch, and the same for the mean of
    true evaluations; medians of many calls, levels on the predictor's device. On a GPU the one is a recorded call.
    """
    device = predictor.device
    generator = torch.Generator().manual_seed(0)
    count = _BATCH[device.type]
    # Drawing policies takes longer than predicting them, and repeated ones take as long as new ones.
    drawn = random_levels(predictor.grid, random_ratios(_DRAWN, generator), generator).to(device)
    levels = drawn.repeat(count // _DRAWN, 1)
    single = CapturedPredictor(predictor) if device.type == "cuda" else predictor
    one, batch = _median(lambda: single(levels[:1]), device), _median(lambda: predictor(levels), device)
    return {
        "milliseconds": 1000 * one,
        "batch": count,
        "per_second": count / batch,
        "evaluation_milliseconds": 1000 * evaluation_seconds,
        "times_faster": evaluation_seconds / one,
        "times_faster_in_batch": evaluation_seconds * count / batch,
    }


def _median(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, after two that do not count."""
    times = []
    for _ in range(_REPEATS + 2):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[_REPEATS // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

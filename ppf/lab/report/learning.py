"""The predictor and its rivals, trained on the run's measurements and scored on the held-out ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...choose.predictor import Predictor, make_predictor
from ...choose.predictor.training import fit_predictor
from ...model.grid import Grid
from ...progress import Progress
from . import baselines
from .heldout import HeldOut
from .metrics import by_ratio

CURVE = (250, 500, 1000, 2000, 4000)


@dataclass(frozen=True)
class Study:
    """What everything is trained on, levels int64 [N, S] and log-perplexities fp64 [N], and what it is scored on."""

    grid: Grid
    levels: Tensor
    values: Tensor
    held: dict[str, HeldOut]
    ratios: list[float]
    device: torch.device
    seed: int

    def score(self, predictor: Predictor) -> dict[str, list[dict[str, Any]]]:
        """The scores of a fitted predictor, by group, at every ratio."""
        found = {}
        for group, part in self.held.items():
            prediction = predictor(part.levels)
            mean, std = prediction.mean.cpu(), prediction.std.cpu()
            found[group] = by_ratio(mean, part.truth, part.ratio, self.ratios, std)
        return found

    def score_means(self, predict: Callable[[Tensor], Tensor]) -> dict[str, list[dict[str, Any]]]:
        """The same for a function from levels to log-perplexities without uncertainty."""
        return {
            group: by_ratio(predict(part.levels), part.truth, part.ratio, self.ratios)
            for group, part in self.held.items()
        }

    def fitted(self, kind: str, rows: Tensor | None = None) -> tuple[Predictor, float]:
        """A predictor newly trained on all measurements or some ``rows``, and the seconds it took."""
        levels, values = (self.levels, self.values) if rows is None else (self.levels[rows], self.values[rows])
        started = time.perf_counter()
        predictor = make_predictor(kind, self.grid).to(self.device)
        fit_predictor(predictor, levels, values, self.seed)
        predictor.eval()(levels[:1]).mean.cpu()  # all work is done when its answer is here
        return predictor, time.perf_counter() - started


def learning_curve(study: Study, kind: str, progress: Progress) -> list[dict[str, Any]]:
    """Scores after random shares of the measurements: at the sizes of ``CURVE`` that they reach, and at all of them."""
    count = len(study.levels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(study.seed))
    sizes = [size for size in CURVE if size < count] + [count]
    found = []
    for done, size in enumerate(sizes):
        progress("curve", done, len(sizes))
        predictor, seconds = study.fitted(kind, order[:size].sort().values)
        found.append({"evaluations": size, "seconds": seconds} | study.score(predictor))
    progress("curve", len(sizes), len(sizes))
    return found


def rivals(
    study: Study, kinds: list[str], table: Tensor, dense: float, scale: Predictor, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Scores of the baselines and of other ``kinds`` of predictor, by name; all learn from the same measurements.

    ``table`` and ``dense`` are :func:`ppf.lab.report.baselines.sensitivity`'s; ``scale`` gives the target of the linear
    and the tree model.
    """
    grid, train, values = study.grid, study.levels, study.values
    predict = {
        "parameters": lambda levels: baselines.parameters(grid, train, values, levels),
        "additive": lambda levels: baselines.additive(table, dense, levels),
        "ridge": lambda levels: baselines.ridge(grid, train, values, levels, scale),
    }
    if baselines.has_xgboost():
        predict["xgboost"] = lambda levels: baselines.xgboost(train, values, levels, scale, study.seed)
    found: dict[str, dict[str, Any]] = {}
    for name in [*predict, *kinds]:
        progress("rivals", len(found), len(predict) + len(kinds))
        found[name] = study.score_means(predict[name]) if name in predict else study.score(study.fitted(name)[0])
    progress("rivals", len(found), len(found))
    return found

"""What a predictor has to beat: simple predictions from the same measurements.

``parameters`` knows only how much is removed; ``additive`` sums what replacing one sub-layer alone costs, measured;
``ridge`` is linear in one-hot levels; ``xgboost`` is gradient-boosted trees on levels, if it is installed.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from ...choose.predictor import one_hot
from ...choose.predictor.base import Predictor
from ...model.grid import Grid
from ...model.policy import Policy

_PENALTIES = tuple(10.0**power for power in range(-3, 4))
# Levels of a sub-layer that are measured alone; those between are interpolated.
_LEVELS = 12


def single_levels(grid: Grid) -> list[list[int]]:
    """For every sub-layer the levels that are measured with all others dense, ascending; the dense one is not in it."""
    found = []
    for low, high in zip(grid.minimum, grid.maximum, strict=True):
        count = min(_LEVELS, high - low)
        found.append(sorted({low + round(index * (high - low) / count) for index in range(count)}))
    return found


def single_policies(grid: Grid) -> list[Policy]:
    """Dense but for one sub-layer at each of :func:`single_levels`, sub-layer by sub-layer; dense itself comes last."""
    dense = torch.tensor(grid.maximum)
    rows = []
    for sublayer, levels in enumerate(single_levels(grid)):
        for level in levels:
            row = dense.clone()
            row[sublayer] = level
            rows.append(row)
    return grid.decode(torch.stack([*rows, dense]))


def sensitivity(grid: Grid, values: list[float]) -> Tensor:
    """Log-perplexity that each level of each sub-layer alone adds, fp64 [S, K]; NaN for levels that are not allowed.

    ``values`` are the log-perplexities of :func:`single_policies`; unmeasured levels are interpolated.
    """
    table = torch.full((grid.sublayers, grid.levels), torch.nan, dtype=torch.float64)
    place = 0
    for sublayer, levels in enumerate(single_levels(grid)):
        low, high = grid.minimum[sublayer], grid.maximum[sublayer]
        added = [value - values[-1] for value in values[place : place + len(levels)]] + [0.0]
        every = np.interp(np.arange(low, high + 1), [*levels, high], added)
        table[sublayer, low : high + 1] = torch.from_numpy(every)
        place += len(levels)
    return table


def additive(table: Tensor, dense: float, levels: Tensor) -> Tensor:
    """The ``dense`` log-perplexity plus the sum of what each sub-layer's level adds alone, fp64 [P]."""
    return dense + table[torch.arange(table.shape[0]), levels].sum(-1)


def parameters(grid: Grid, train: Tensor, values: Tensor, levels: Tensor) -> Tensor:
    """A parabola in the share of parameters kept, least squares on log(log-perplexity), fp64 [P]."""

    def powers(rows: Tensor) -> Tensor:
        share = grid.kept(rows).double() / grid.structure.decoder_parameters
        return torch.stack((torch.ones_like(share), share, share.square()), dim=1)

    solution = torch.linalg.lstsq(powers(train), values.double().log()[:, None], driver="gelsd").solution
    return (powers(levels) @ solution).squeeze(1).exp()


def ridge(grid: Grid, train: Tensor, values: Tensor, levels: Tensor, scale: Predictor) -> Tensor:
    """Ridge regression on one-hot levels, on the predictor's own target ``scale``; fp64 [P].

    The penalty is the one of seven with the least leave-one-out error (generalised cross-validation).
    """
    code, targets = _centred(one_hot(train, grid).flatten(1).double()), scale.from_nats(values.double())
    left, singular, right = torch.linalg.svd(code, full_matrices=False)
    projected = left.T @ (targets - targets.mean())

    def fit(penalty: float) -> tuple[float, Tensor]:
        shrunk = singular.square() / (singular.square() + penalty)
        residual = targets - targets.mean() - left @ (shrunk * projected)
        freedom = 1 - (1 + float(shrunk.sum())) / len(targets)
        solution = right.T @ (projected * singular / (singular.square() + penalty))
        return float(residual.square().mean()) / max(freedom, 1e-6) ** 2, solution

    _, solution = min((fit(penalty) for penalty in _PENALTIES), key=lambda found: found[0])
    unseen = one_hot(levels, grid).flatten(1).double() - one_hot(train, grid).flatten(1).double().mean(0)
    return scale.to_nats(targets.mean() + unseen @ solution)


def _centred(code: Tensor) -> Tensor:
    return code - code.mean(0)


def has_xgboost() -> bool:
    """True if the optional package is installed."""
    return importlib.util.find_spec("xgboost") is not None


def xgboost(train: Tensor, values: Tensor, levels: Tensor, scale: Predictor, seed: int) -> Tensor:
    """Gradient-boosted trees on levels, fp64 [P]: more of them, each learning less, than the library's default."""
    import xgboost as library

    settings = {"eta": 0.03, "max_depth": 4, "subsample": 0.7, "colsample_bytree": 0.5, "seed": seed, "nthread": 2}
    data = library.DMatrix(train.numpy(), label=scale.from_nats(values.double()).numpy())
    model = library.train(settings, data, num_boost_round=1500)
    return scale.to_nats(torch.from_numpy(model.predict(library.DMatrix(levels.numpy()))).double())

"""What a portable run gives up: policies of the same size without the restriction, looked for with true evaluations.

A portable run has learnt nothing of other policies, so this is a plain evolution from its own answer, and what it finds
is a lower bound of the price. An ordinary run knows better: prune that with --portable.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..choose.candidates.sampling import mutate, random_levels
from ..fitting.evaluation import Evaluator
from ..fitting.session import Session
from ..model.grid import unrestricted
from ..progress import Progress, silent
from ..storage.locks import locked_folder
from ..storage.schemas import Count, Finite, Nonnegative

PRICES = "portable.json"
_RATIOS = (0.3, 0.5)
_SHARE = 0.1  # of the fit's evaluations, for each ratio
_PARENTS, _RANDOM = 4, 4


class _Price(msgspec.Struct):
    ratio: Nonnegative
    perplexity: Nonnegative
    unrestricted: Nonnegative
    evaluations: Count
    cost: Finite


class _Prices(msgspec.Struct):
    prices: list[_Price]


def portable_prices(session: Session, progress: Progress = silent) -> list[dict[str, Any]]:
    """Ratio, perplexity of the portable answer, the best found without the restriction, and ``cost``, their quotient
    less one, for each of a few ratios. Kept in the run, and measured once. Raises ``InputError`` for a damaged file.

    Perplexities are by masked evaluation on the run's evaluation text.
    """
    run = session.run
    if not run.files.exists(PRICES):
        with locked_folder(run.path, "run"):
            _measure_prices(session, progress)
    files = run.files.telling("Remove this file: prices are measured again")
    return msgspec.to_builtins(files.read_json(PRICES, _Prices).prices)


def _measure_prices(session: Session, progress: Progress) -> None:
    run = session.run
    if not run.files.exists(PRICES):  # another command may have, while it was waited for
        ratios = [ratio for ratio in _RATIOS if ratio < run.grid.maximum_ratio]
        count = max(2 * _PARENTS, round(_SHARE * run.settings.evaluations))
        free = _free(session)
        prices = []
        for index, ratio in enumerate(ratios):
            prices.append(_price(session, free, ratio, count))
            progress("price", index + 1, len(ratios))
        run.files.write_json(PRICES, {"prices": prices})


def _free(session: Session) -> Evaluator:
    """The session's evaluator on an unrestricted grid: its library's factors serve that too."""
    run, other = copy.copy(session.run), copy.copy(session)
    run.grid = unrestricted(run.grid)
    other.run = run
    other.__dict__.pop("library", None)  # of the run's own widths
    return other.evaluator()


def _price(session: Session, free: Evaluator, ratio: float, count: int) -> dict[str, Any]:
    answer, seed = session.run.policy(ratio), session.run.settings.seed
    portable = free.log_perplexities([answer.policy])[0]
    found = min(portable, _evolve(free, free.grid.encode([answer.policy]), answer.delivered_ratio, count, seed))
    return {
        "ratio": answer.delivered_ratio,
        "perplexity": math.exp(portable),
        "unrestricted": math.exp(found),
        "evaluations": count,
        "cost": math.exp(portable - found) - 1,
    }


def _evolve(free: Evaluator, start: Tensor, ratio: float, count: int, seed: int) -> float:
    """The lowest log-perplexity of ``count`` policies bred from ``start`` int64 [1, S] and a few random ones."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.cat((random_levels(free.grid, torch.full((_RANDOM,), ratio), generator), start))
    values, spent = _measured(free, pool), _RANDOM
    while spent < count:
        best = values.argsort()[:_PARENTS]
        pool, values = pool[best], values[best]
        children = mutate(pool.repeat_interleave(2, 0), free.grid, generator, ratio=ratio)[: count - spent]
        pool, values = torch.cat((pool, children)), torch.cat((values, _measured(free, children)))
        spent += len(children)
    return float(values.min())


def _measured(free: Evaluator, levels: Tensor) -> Tensor:
    values = torch.tensor(free.log_perplexities(free.grid.decode(levels)), dtype=torch.float64)
    return values.nan_to_num(torch.inf, torch.inf, torch.inf)

"""A policy that every reader accepts, from a run of all policies or of portable ones: chosen, and its price told."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..choose.budget import RatioBudget
from ..choose.budget.projection import projector_of
from ..choose.candidates.breeding import breed, cautious
from ..choose.candidates.sampling import random_levels
from ..errors import InputError
from ..fitting.evaluation.measurement import measure_many
from ..fitting.experience import SEARCH_ROUND
from ..fitting.run import Run
from ..fitting.session import Session
from ..model.grid import Grid, portable_multiple
from ..model.policy import Policy
from .results import Choice

_CAUTION = 1.0  # standard deviations: breeding goes where the predictor was never asked
_RANDOM, _KNOWN = 24, 24
_MEASURED = 8


def portable_grid(run: Run) -> Grid:
    """The portable policies among those of ``run``. Raises ``InputError`` if its own FFN widths do not hit them."""
    step = portable_multiple(run.structure)
    if run.grid.ffn_multiple % step == 0:
        step = run.grid.ffn_multiple
    if step % run.grid.ffn_multiple:
        problem = f"the run's FFN widths are multiples of {run.grid.ffn_multiple}, which do not hit those of {step}"
        raise InputError("portable", True, problem, "Fit the model with --portable")
    return Grid(run.structure, step, portable=True)


def choose_portable(session: Session, ratio: float) -> Choice:
    """A portable policy of ``ratio``, and what it costs beside the agent's own.

    Bred on the predictor among portable policies only; the most promising are measured truly, and so is the agent's
    policy of the size that the best one has. Their figures are the choice's ``portable``. Raises ``InputError`` for a
    ratio beyond what portable policies can give.
    """
    run = session.run
    grid = portable_grid(run)
    budget = RatioBudget(grid, ratio)
    candidates = grid.decode(_bred(run, grid, ratio)[:_MEASURED])
    measured = dict(zip(candidates, _measure(session, candidates), strict=True))
    best = min(candidates, key=measured.__getitem__)
    free = run.policy(run.grid.ratio(best)).policy  # widths go in steps: compare at the size it got, not the one asked
    cost = _cost(run, measured[best], _measure(session, [free])[0], free)
    return Choice(best, "portable", budget, portable=cost)


def _measure(session: Session, policies: list[Policy]) -> list[float]:
    return measure_many(session.evaluator(), session.run.experience, policies, SEARCH_ROUND, "search")


def _cost(run: Run, portable: float, free: float, policy: Policy) -> dict[str, Any]:
    """Perplexities by masked evaluation on the run's evaluation text; ``cost`` is their quotient less one."""
    return {
        "perplexity": math.exp(portable),
        "unrestricted": {
            "perplexity": math.exp(free),
            "delivered_ratio": run.grid.ratio(policy),
            "policy": policy.to_dict(),
        },
        "cost": math.exp(portable - free) - 1,
    }


def _bred(run: Run, grid: Grid, ratio: float) -> Tensor:
    """Levels int64 [P, S] on ``grid``, most promising first."""
    free = run.policy(ratio).policy
    generator = torch.Generator().manual_seed(run.settings.seed)
    near = sorted(run.experience.rows(), key=lambda row: row.log_perplexity + 100 * abs(row.ratio - ratio))
    known = run.grid.encode([free, *(row.policy for row in near[:_KNOWN])]) / torch.tensor(run.grid.top)
    moved = projector_of(grid, known.device).nearest(known, torch.full((len(known),), ratio))
    start = torch.cat((moved, random_levels(grid, torch.full((_RANDOM,), ratio), generator)))
    opinion = cautious(run.predictor, _CAUTION)
    scale = torch.tensor(grid.steps) // torch.tensor(run.grid.steps)
    return breed(start[None], torch.tensor([ratio]), lambda levels: opinion(levels * scale), grid, generator)[0]

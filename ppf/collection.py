"""The fit loop: sample where the agent goes, evaluate, refit, again.

Every round's proposals depend only on the rows of the rounds before it and on the seed. A loop that was killed
therefore proposes the same policies again, finds those already measured in the store, and ends with the same rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .agent import Agent, train_agent
from .errors import PPFError
from .evaluation import Evaluator
from .experience import Evaluation, Experience
from .exploration import initial_proposals, next_proposals
from .grid import Grid
from .policy import Policy
from .predictor import DEFAULT, Predictor, make_predictor
from .progress import Progress, silent
from .settings import MINIMUM_EVALUATIONS
from .training import fit_predictor

_INITIAL_SHARE = 0.3
_ROUNDS = 8
_SMALLEST_ROUND = 8


@dataclass(frozen=True)
class Fitted:
    """What the loop learns."""

    predictor: Predictor
    agent: Agent


def schedule(evaluations: int) -> list[int]:
    """Evaluations of each round, which sum to ``evaluations``: a first look, then rounds of equal size."""
    first = min(evaluations, max(MINIMUM_EVALUATIONS, round(_INITIAL_SHARE * evaluations)))
    rest = evaluations - first
    rounds = min(_ROUNDS, rest // _SMALLEST_ROUND)
    if not rounds:
        return [evaluations]
    return [first] + [rest // rounds + (index < rest % rounds) for index in range(rounds)]


def collect(
    evaluator: Evaluator,
    experience: Experience,
    evaluations: int,
    seed: int,
    progress: Progress = silent,
    kind: str = DEFAULT,
) -> None:
    """Run the loop until ``experience`` holds all rows of ``evaluations``; resumes what is half done."""
    done = 0
    for index, count in enumerate(schedule(evaluations)):
        before = experience.rows(before_round=index)
        complete = len(experience.rows(before_round=index + 1)) - len(before) >= count
        if not complete:
            for policy, source in _proposals(evaluator, before, index, count, seed, kind):
                measure(evaluator, experience, policy, index, source)
                progress("evaluate", len(experience), evaluations)
        done += count
        progress("evaluate", done, evaluations)


def learn(
    grid: Grid,
    rows: Sequence[Evaluation],
    seed: int,
    device: torch.device,
    effort: float = 1.0,
    kind: str = DEFAULT,
) -> Fitted:
    """A predictor of a ``kind`` and an agent, trained from scratch on ``rows``; ``effort`` scales their steps."""
    predictor, agent = make_predictor(kind, grid).to(device), Agent(grid, seed=seed).to(device)
    fit_predictor(predictor, *_tensors(grid, rows), seed=seed, steps=round(800 * effort))
    train_agent(agent, predictor, seed, steps=round(400 * effort))
    return Fitted(predictor.eval(), agent.eval())


def measure(evaluator: Evaluator, experience: Experience, policy: Policy, index: int, source: str) -> float:
    """The log-perplexity of ``policy``: from the store if it is there, else evaluated and stored.

    Raises ``PPFError`` if it is not finite.
    """
    known = experience.lookup(policy)
    if known is not None:
        return known
    start = time.perf_counter()
    value = evaluator.log_perplexity(policy)
    if not math.isfinite(value):
        raise PPFError(
            f"the log-perplexity of {policy.to_json()} is {value}: activations overflow in {evaluator.weights.dtype}. "
            "Convert the checkpoint to bfloat16 or float32"
        )
    ratio, seconds = evaluator.grid.ratio(policy), time.perf_counter() - start
    experience.append(Evaluation(policy, value, ratio, index, source, seconds))
    return value


def _proposals(
    evaluator: Evaluator, before: Sequence[Evaluation], index: int, count: int, seed: int, kind: str
) -> list[tuple[Policy, str]]:
    if index == 0:
        return initial_proposals(evaluator.grid, count, seed)
    fitted = learn(evaluator.grid, before, seed + index, evaluator.weights.device, kind=kind)
    return next_proposals(fitted.agent, fitted.predictor, before, count, seed + index)


def _tensors(grid: Grid, rows: Sequence[Evaluation]) -> tuple[torch.Tensor, torch.Tensor]:
    return grid.encode([row.policy for row in rows]), torch.tensor([row.log_perplexity for row in rows])

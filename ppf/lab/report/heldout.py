"""Policies that nothing was trained on, measured once and kept beside the run (``RUN/held-out.sqlite``).

Random ones at each ratio, and ones such as agent and search visit: the agent's answers with noise, neighbours of the
best measured policies, and what breeding on the predictor finds. There the differences are small, and the bred ones
lie where the predictor is too hopeful, if it is anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from ...choose.candidates.breeding import Effort, breed, cautious, move
from ...choose.candidates.sampling import mutate, random_levels
from ...errors import InputError
from ...fitting.evaluation import Evaluator
from ...fitting.evaluation.measurement import measure_many
from ...fitting.experience import SEARCH_ROUND, Evaluation, Experience
from ...fitting.run import Run
from ...fitting.search.exploration import frontier
from ...model.policy import Policy
from ...progress import Progress

STORE = "held-out.sqlite"
GROUPS = ("random", "visited")
_SEED = 977
_PARENTS = 8
_PATIENCE = 30  # draws after which a small model is taken to have no more


@dataclass(frozen=True)
class HeldOut:
    """Measured policies of one group: levels int64 [N, S], log-perplexities fp64 [N], index of the ratio int64 [N]."""

    levels: Tensor
    truth: Tensor
    ratio: Tensor


def training_rows(run: Run) -> list[Evaluation]:
    """What the run's predictor was trained on: the fit's rows, without those of later searches."""
    return run.experience.rows(before_round=SEARCH_ROUND)


def held_out_policies(run: Run, ratios: Sequence[float], count: int) -> dict[str, list[list[Policy]]]:
    """For each group and ratio the policies to measure: ``count`` random ones, half as many visited ones.

    They depend on the run and ``count`` alone, so that a killed report goes on where it stopped. Raises ``InputError``
    if the model does not have that many.
    """
    rows = training_rows(run)
    return {
        "random": [_distinct(run, "random", ratio, rows, count) for ratio in ratios],
        "visited": [_distinct(run, "visited", ratio, rows, max(1, count // 2)) for ratio in ratios],
    }


def held_out_store(run: Run, folder: Path) -> Experience:
    """The store of what is measured, in ``folder``: the run's own, or another that begins with what the run's has."""
    store, own = run.store(folder / STORE), run.path / STORE
    if folder != run.path and own.exists():
        for row in run.store(own, new=False).rows():
            if store.lookup(row.policy) is None:
                store.append(row)
    return store


def measure_all(
    evaluator: Evaluator, store: Experience, parts: Sequence[Sequence[Policy]], source: str, progress: Progress
) -> HeldOut:
    """Measure the policies of every ratio, or read them from the store."""
    values: list[float] = []
    total = sum(map(len, parts))
    for index, policies in enumerate(parts):
        for start in range(0, len(policies), evaluator.chunk):
            values += measure_many(evaluator, store, policies[start : start + evaluator.chunk], index, source)
            progress(f"measure {source}", len(values), total)
    ratio = torch.cat([torch.full((len(policies),), index) for index, policies in enumerate(parts)])
    levels = evaluator.grid.encode([policy for policies in parts for policy in policies])
    return HeldOut(levels, torch.tensor(values, dtype=torch.float64), ratio)


def _distinct(run: Run, group: str, ratio: float, rows: Sequence[Evaluation], count: int) -> list[Policy]:
    """``count`` distinct policies of a group at a ratio that the predictor was not trained on."""
    generator = torch.Generator().manual_seed(_SEED + round(1000 * ratio))
    seen = {row.policy for row in rows}
    found: dict[Policy, None] = {}
    for _ in range(_PATIENCE):
        for policy in run.grid.decode(_draw(run, group, ratio, rows, 2 * count, generator)):
            if policy not in seen and len(found) < count:
                found.setdefault(policy)
        if len(found) == count:
            return list(found)
    problem = f"the model has too few {group} policies at {ratio:.0%} besides those it was fitted on"
    raise InputError("held-out", count, problem, "Use fewer")


def _draw(run: Run, group: str, ratio: float, rows: Sequence[Evaluation], count: int, generator: Generator) -> Tensor:
    """About ``count`` policies int64 [P, S] of a group, in random order."""
    wanted = torch.full((count,), ratio)
    if group == "random":
        return random_levels(run.grid, wanted, generator)
    answers = run.agent(wanted[: count // 3], noise=0.5, generator=generator).cpu()
    best = frontier(run.grid, rows, wanted[:1], _PARENTS)[0]
    parents = move(best, run.grid, wanted[:1].expand(len(best)))
    chosen = torch.randint(len(parents), (count // 3,), generator=generator)
    neighbours = mutate(parents[chosen], run.grid, generator, ratio=ratio)
    effort = Effort(generations=8, offspring=32, keep=max(1, count // 3))
    bred = breed(parents[None], wanted[:1], cautious(run.predictor, 0.0), run.grid, generator, effort)[0].cpu()
    mixed = torch.cat((answers, neighbours, bred))
    return mixed[torch.randperm(len(mixed), generator=generator)]

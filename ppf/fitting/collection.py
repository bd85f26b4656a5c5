"""The fit loop: sample where the agent goes, evaluate, refit, again.

Every round's proposals depend only on the rows of the rounds before it and on the seed. A loop that was killed
therefore proposes the same policies again, finds those already measured in the store, and ends with the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..choose.predictor import Predictor
from ..model.policy import Policy
from ..progress import Progress, silent
from .evaluation import Evaluator
from .evaluation.measurement import measure_many
from .experience import Experience
from .learning import Learning, learn
from .rounds import Journal, Round
from .run.settings import MINIMUM_EVALUATIONS
from .search.exploration import initial_proposals, next_proposals

_INITIAL_SHARE = 0.3
_ROUNDS = 8
_SMALLEST_ROUND = 8
# An agent that only proposes the next round is trained for less long, and breeding proposes beside it.
_ROUND_EFFORT = 0.5


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
    learning: Learning | None = None,
    journal: Journal | None = None,
    early_stop: bool = False,
) -> None:
    """Run the loop until ``experience`` holds all rows of ``evaluations``; resumes what is half done.

    ``journal`` takes down how far the predictor was off at the agent's policies; with ``early_stop`` the loop ends once
    that is no more than it expected.
    """
    journal, done = journal or Journal(), 0
    for index, count in enumerate(schedule(evaluations)):
        if early_stop and journal.settled(index - 1):
            break
        before = experience.rows(before_round=index)
        complete = len(experience.rows(before_round=index + 1)) - len(before) >= count
        if index == 0 and not complete:
            proposals = initial_proposals(evaluator.grid, count, seed, None if learning is None else learning.first)
            _measure(evaluator, experience, proposals, 0, evaluations, progress)
        elif index and not (complete and index in journal.rounds):
            device = evaluator.decoder.device
            how = {"effort": _ROUND_EFFORT, "learning": learning, "experts": 0}
            fitted = learn(evaluator.grid, before, seed + index, device, **how)
            proposals = next_proposals(fitted.agent, fitted.predictor, before, count, seed + index)
            _measure(evaluator, experience, proposals, index, evaluations, progress)
            _take_down(journal, index, fitted.predictor, experience, proposals)
        done += count
        progress("evaluate", done, evaluations)


def _measure(
    evaluator: Evaluator,
    experience: Experience,
    proposals: Sequence[tuple[Policy, str]],
    index: int,
    evaluations: int,
    progress: Progress,
) -> None:
    for start in range(0, len(proposals), evaluator.chunk):
        policies, sources = zip(*proposals[start : start + evaluator.chunk], strict=True)
        measure_many(evaluator, experience, policies, index, sources)
        progress("evaluate", min(len(experience), evaluations), evaluations)


def _take_down(
    journal: Journal,
    index: int,
    predictor: Predictor,
    experience: Experience,
    proposals: Sequence[tuple[Policy, str]],
) -> None:
    """Compare what was predicted of the agent's own policies with what was measured."""
    own = [policy for policy, source in proposals if source == "agent"]
    if own:
        measured = [experience.lookup(policy) for policy in own]
        journal.add(Round.of(index, predictor(predictor.grid.encode(own)), measured))

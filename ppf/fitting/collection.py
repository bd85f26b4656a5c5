"""The fit loop: sample where the agent goes, evaluate, refit, again; and last of all, try the agent that stays.

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
from .learning import Fitted, Learning, learn, learn_more
from .rounds import Journal, Round
from .run.settings import MINIMUM_EVALUATIONS
from .search.exploration import initial_proposals, next_proposals, own_proposals

_INITIAL_SHARE = 0.3
_ROUNDS = 8
_SMALLEST_ROUND = 8
# An agent that only proposes the next round is trained for less long, and breeding proposes beside it.
_ROUND_EFFORT = 0.5
# What is kept for trying the agent that stays: one evaluation in eight, but no more than tell it apart at every ratio.
_TRIAL_SHARE, _MOST_TRIALS = 8, 32


def trials(evaluations: int) -> int:
    """How many of a fit's ``evaluations`` are kept for the answers of the agent that stays."""
    return min(_MOST_TRIALS, evaluations // _TRIAL_SHARE)


def schedule(evaluations: int) -> list[int]:
    """Evaluations of each round before the last, which has :func:`trials`: a first look, then rounds of equal size."""
    spent = evaluations - trials(evaluations)
    first = min(spent, max(MINIMUM_EVALUATIONS, round(_INITIAL_SHARE * spent)))
    rest = spent - first
    rounds = min(_ROUNDS, rest // _SMALLEST_ROUND)
    if not rounds:
        return [spent]
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
    """Run the loop until ``experience`` holds all rows of ``evaluations`` but the last round's, which
    :func:`try_agent` measures; resumes what is half done.

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


def try_agent(
    evaluator: Evaluator,
    experience: Experience,
    evaluations: int,
    fitted: Fitted,
    seed: int,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> None:
    """The last round: measure what the agent that stays answers, from the mildest ratio to the severest, and tell the
    predictor in ``fitted``.

    The agent goes where the predictor promises most, also where it promises too much, and was trained after all other
    rounds: nothing else would notice. Rounds before this one had shorter trained agents. (A fit of SmolLM2-135M with
    120 evaluations ended with an agent that lost 80 % of perplexity to rows of its own experience, dev/LOG.md,
    2026-11-29.) A predictor that knows these rows no longer prefers such answers to what was measured.
    """
    index, count = len(schedule(evaluations)), trials(evaluations)
    before = experience.rows(before_round=index)
    proposals = own_proposals(fitted.agent, before, count, seed + index)
    _measure(evaluator, experience, proposals, index, evaluations, progress)
    _take_down(journal or Journal(), index, fitted.predictor, experience, proposals)
    learn_more(fitted.predictor, evaluator.grid, experience.rows(), seed)


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

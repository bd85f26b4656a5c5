"""The fit loop: all evaluations are spent, and a killed loop ends with the rows of one that was not."""

import multiprocessing
import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from factories import dense_weights, quick_learning, random_ranking, synthetic_log_perplexity, tokens

from ppf.fast.permute import permuted
from ppf.fitting import collection
from ppf.fitting.collection import collect, schedule, trials, try_agent
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.experience import Experience
from ppf.fitting.learning import learn
from ppf.fitting.rounds import Journal
from ppf.fitting.run.settings import MINIMUM_EVALUATIONS
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
EVALUATIONS = 48  # three rounds, and the agent's
LOOKED = EVALUATIONS - trials(EVALUATIONS)


class Killed(BaseException):
    """As Ctrl-C and SIGTERM do: not an ``Exception``."""


class Interrupted(Evaluator):
    """Dies at a given evaluation; counts them. One policy a chunk, so that it may die after any row."""

    calls = 0
    dies_at = None
    chunk = 1

    def log_perplexities(self, policies, tokens=None):
        if self.calls == self.dies_at:
            raise Killed
        self.calls += len(policies)
        return super().log_perplexities(policies, tokens)


@pytest.fixture
def evaluator(monkeypatch) -> Interrupted:
    quick_learning(monkeypatch)
    _, decoder = dense_weights()
    return Interrupted(permuted(decoder, random_ranking(decoder.structure)), Grid(decoder.structure, 8), tokens(2, 12))


def measured(store: Experience) -> list:
    return [replace(row, seconds=0.0) for row in store.rows()]


def test_schedule_spends_exactly_what_it_is_given():
    for evaluations in range(MINIMUM_EVALUATIONS, 700):
        rounds, last = schedule(evaluations), trials(evaluations)
        assert sum(rounds) + last == evaluations and min(rounds[1:], default=8) >= 8 and 3 <= last <= 32
        assert rounds[0] >= min(MINIMUM_EVALUATIONS, evaluations - last)
        assert len(rounds) <= 9 and max(rounds[1:], default=0) - min(rounds[1:], default=0) <= 1
    assert schedule(600) == [170] + [50] * 6 + [49] * 2 and trials(600) == 32


def test_collect_measures_every_row_once(tmp_path, evaluator):
    store, seen = Experience(tmp_path / "experience.sqlite"), []
    collect(evaluator, store, EVALUATIONS, seed=0, progress=lambda *event: seen.append(event))
    rows = store.rows()
    assert len(rows) == evaluator.calls == LOOKED and len({row.policy for row in rows}) == LOOKED
    assert [sum(row.round == index for row in rows) for index in range(3)] == schedule(EVALUATIONS)
    fresh = random.Random(0).sample(rows, 5)
    for row in fresh:
        assert row.log_perplexity == Evaluator.log_perplexities(evaluator, [row.policy])[0]
        assert row.ratio == evaluator.grid.ratio(row.policy) and row.seconds > 0
    assert seen[-1] == ("evaluate", LOOKED, EVALUATIONS) and {stage for stage, *_ in seen} == {"evaluate"}
    collect(evaluator, store, EVALUATIONS, seed=0)
    assert evaluator.calls == LOOKED  # done is done


def test_killed_five_times_ends_with_the_same_rows(tmp_path, evaluator):
    whole = Experience(tmp_path / "whole.sqlite")
    collect(evaluator, whole, EVALUATIONS, seed=0)
    draw = random.Random(1)
    moments = sorted(draw.sample(range(LOOKED), 5))
    evaluator.calls = 0
    for moment in moments:
        evaluator.dies_at = moment
        store = Experience(tmp_path / "killed.sqlite")
        with pytest.raises(Killed):
            collect(evaluator, store, EVALUATIONS, seed=0)
        assert len(store) == moment
        store.close()
    evaluator.dies_at = None
    store = Experience(tmp_path / "killed.sqlite")
    collect(evaluator, store, EVALUATIONS, seed=0)
    assert measured(store) == measured(whole) and evaluator.calls == LOOKED
    # Negative control: another seed measures other policies.
    other = Experience(tmp_path / "other.sqlite")
    collect(evaluator, other, EVALUATIONS, seed=1)
    assert measured(other) != measured(whole)


def test_kill_9_at_ten_random_moments_ends_with_the_same_rows(tmp_path, evaluator):
    """A real SIGKILL, wherever the process is: learning, evaluating, or in the middle of a write."""
    whole = Experience(tmp_path / "whole")
    start = time.perf_counter()
    collect(evaluator, whole, EVALUATIONS, seed=0)
    took, rows = time.perf_counter() - start, measured(whole)
    draw, kills, attempt, before = random.Random(2), 0, 0, 0
    while kills < 10:
        child = multiprocessing.get_context("fork").Process(
            target=_collect_alone, args=(tmp_path / f"{attempt}", evaluator)
        )
        child.start()
        child.join(draw.uniform(0.05, 0.3) * took)
        child.kill()
        child.join()
        store = Experience(tmp_path / f"{attempt}")
        found = measured(store)
        store.close()
        assert found == rows[: len(found)] and len(found) >= before
        killed = child.exitcode == -signal.SIGKILL
        kills, before = kills + killed, len(found) if killed else 0
        if not killed:  # it was done: all rows, and a new store
            assert child.exitcode == 0 and found == rows
            attempt += 1
    last = Experience(tmp_path / f"{attempt}")
    collect(evaluator, last, EVALUATIONS, seed=0)
    assert measured(last) == rows


def _collect_alone(path, evaluator) -> None:
    store = Experience(path)
    collect(evaluator, store, EVALUATIONS, seed=0)
    store.close()


def test_later_rounds_follow_the_agent(tmp_path, monkeypatch, evaluator):
    """With a made-up performance the agent's policies become better than random ones of the same ratio."""
    monkeypatch.setattr(collection, "learn", lambda *a, **named: learn(*a, **(named | {"effort": 0.15})))
    grid = evaluator.grid
    monkeypatch.setattr(
        Interrupted, "log_perplexities", lambda self, p: synthetic_log_perplexity(grid, grid.encode(p)).tolist()
    )
    store = Experience(tmp_path / "experience.sqlite")
    collect(evaluator, store, 60, seed=0)
    rows = store.rows()

    def excess(source: str) -> float:
        """Mean distance to a quadratic in the ratio through the random rows."""
        random_rows = [row for row in rows if row.source == "random"]

        def powers(these):
            return torch.tensor([[1, row.ratio, row.ratio**2] for row in these], dtype=torch.float64)

        values = torch.tensor([[row.log_perplexity] for row in random_rows], dtype=torch.float64)
        curve = torch.linalg.lstsq(powers(random_rows), values).solution
        chosen = [row for row in rows if row.source == source]
        found = torch.tensor([[row.log_perplexity] for row in chosen], dtype=torch.float64)
        return float((found - powers(chosen) @ curve).mean())

    assert excess("agent") < -0.02 and abs(excess("random")) < 1e-9


def test_the_agent_that_stays_is_tried_and_the_predictor_told(tmp_path, evaluator):
    store, journal, seen = Experience(tmp_path / "experience.sqlite"), Journal(), []
    collect(evaluator, store, EVALUATIONS, seed=0, journal=journal)
    fitted = learn(evaluator.grid, store.rows(), 0, torch.device("cpu"), effort=0.05)
    fitted.predictor.target_mean -= 1  # promises more than there is
    try_agent(evaluator, store, EVALUATIONS, fitted, 0, lambda *event: seen.append(event), journal)
    own = store.rows()[LOOKED:]
    assert len(store) == evaluator.calls == EVALUATIONS and seen[-1] == ("evaluate", EVALUATIONS, EVALUATIONS)
    assert {row.round for row in own} == {len(schedule(EVALUATIONS))} == {max(journal.rounds)}
    answers = evaluator.grid.decode(fitted.agent(torch.linspace(0.05, 0.7, 2 * len(own) + 1)[1::2]))
    assert [row.policy for row in own if row.source == "agent"] == list(dict.fromkeys(answers))[: len(own)]
    truth = torch.tensor([row.log_perplexity for row in own])
    found = fitted.predictor(evaluator.grid.encode([row.policy for row in own])).mean
    assert (found - truth).abs().max() < 0.1 * journal.rounds[len(schedule(EVALUATIONS))].gap
    again = learn(evaluator.grid, store.rows(len(schedule(EVALUATIONS))), 0, torch.device("cpu"), effort=0.05)
    try_agent(evaluator, store, EVALUATIONS, again, 0)
    assert len(store) == evaluator.calls == EVALUATIONS  # killed before it could write what it learnt, it goes on


def test_learn_is_reproducible(tmp_path, evaluator):
    store = Experience(tmp_path / "experience.sqlite")
    collect(evaluator, store, MINIMUM_EVALUATIONS, seed=0)
    first, second = (learn(evaluator.grid, store.rows(), 0, torch.device("cpu"), effort=0.05) for _ in range(2))
    for name in ("predictor", "agent"):
        a, b = (getattr(fitted, name).state_dict() for fitted in (first, second))
        assert all(torch.equal(a[key], b[key]) for key in a)

"""The fit loop: all evaluations are spent, and a killed loop ends with the rows of one that was not."""

import random
from dataclasses import replace

import pytest
import torch
from factories import dense_weights, quick_learning, random_ranking, synthetic_log_perplexity, tokens

from ppf import collection
from ppf.collection import collect, learn, schedule
from ppf.measurement import measure
from ppf.errors import PPFError
from ppf.evaluation import Evaluator
from ppf.experience import Experience
from ppf.grid import Grid
from ppf.settings import MINIMUM_EVALUATIONS

pytestmark = pytest.mark.usefixtures("one_thread")
EVALUATIONS = 44  # three rounds


class Killed(BaseException):
    """As Ctrl-C and SIGTERM do: not an ``Exception``."""


class Interrupted(Evaluator):
    """Dies at a given call; counts its evaluations."""

    calls = 0
    dies_at = None

    def log_perplexity(self, policy):
        if self.calls == self.dies_at:
            raise Killed
        self.calls += 1
        return super().log_perplexity(policy)


@pytest.fixture
def evaluator(monkeypatch) -> Interrupted:
    quick_learning(monkeypatch)
    _, weights = dense_weights()
    return Interrupted(weights.permuted(random_ranking(weights.structure)), Grid(weights.structure, 8), tokens(2, 12))


def measured(store: Experience) -> list:
    return [replace(row, seconds=0.0) for row in store.rows()]


def test_schedule_spends_exactly_what_it_is_given():
    for evaluations in range(MINIMUM_EVALUATIONS, 700):
        rounds = schedule(evaluations)
        assert sum(rounds) == evaluations and rounds[0] >= MINIMUM_EVALUATIONS and min(rounds[1:], default=8) >= 8
        assert len(rounds) <= 9 and max(rounds[1:], default=0) - min(rounds[1:], default=0) <= 1
    assert schedule(600) == [180] + [53] * 4 + [52] * 4


def test_collect_measures_every_row_once(tmp_path, evaluator):
    store, seen = Experience(tmp_path / "experience.sqlite"), []
    collect(evaluator, store, EVALUATIONS, seed=0, progress=lambda *event: seen.append(event))
    rows = store.rows()
    assert len(rows) == evaluator.calls == EVALUATIONS and len({row.policy for row in rows}) == EVALUATIONS
    assert [sum(row.round == index for row in rows) for index in range(3)] == schedule(EVALUATIONS)
    fresh = random.Random(0).sample(rows, 5)
    for row in fresh:
        assert row.log_perplexity == Evaluator.log_perplexity(evaluator, row.policy)
        assert row.ratio == evaluator.grid.ratio(row.policy) and row.seconds > 0
    assert seen[-1] == ("evaluate", EVALUATIONS, EVALUATIONS) and {stage for stage, *_ in seen} == {"evaluate"}
    collect(evaluator, store, EVALUATIONS, seed=0)
    assert evaluator.calls == EVALUATIONS  # done is done


def test_killed_five_times_ends_with_the_same_rows(tmp_path, evaluator):
    whole = Experience(tmp_path / "whole.sqlite")
    collect(evaluator, whole, EVALUATIONS, seed=0)
    draw = random.Random(1)
    moments = sorted(draw.sample(range(EVALUATIONS), 5))
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
    assert measured(store) == measured(whole) and evaluator.calls == EVALUATIONS
    # Negative control: another seed measures other policies.
    other = Experience(tmp_path / "other.sqlite")
    collect(evaluator, other, EVALUATIONS, seed=1)
    assert measured(other) != measured(whole)


def test_later_rounds_follow_the_agent(tmp_path, monkeypatch, evaluator):
    """With a made-up performance the agent's policies become better than random ones of the same ratio."""
    monkeypatch.setattr(collection, "learn", lambda *a, **named: learn(*a, effort=0.15, **named))
    grid = evaluator.grid
    monkeypatch.setattr(
        Interrupted, "log_perplexity", lambda self, p: float(synthetic_log_perplexity(grid, grid.encode([p]))[0])
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_overflow_is_an_error_and_not_a_row(tmp_path, monkeypatch, evaluator, value):
    monkeypatch.setattr(Interrupted, "log_perplexity", lambda self, policy: value)
    store = Experience(tmp_path / "experience.sqlite")
    with pytest.raises(PPFError, match="bfloat16 or float32"):
        measure(evaluator, store, evaluator.grid.dense(), 0, "dense")
    assert len(store) == 0


def test_learn_is_reproducible(tmp_path, evaluator):
    store = Experience(tmp_path / "experience.sqlite")
    collect(evaluator, store, MINIMUM_EVALUATIONS, seed=0)
    first, second = (learn(evaluator.grid, store.rows(), 0, torch.device("cpu"), effort=0.05) for _ in range(2))
    for name in ("predictor", "agent"):
        a, b = (getattr(fitted, name).state_dict() for fitted in (first, second))
        assert all(torch.equal(a[key], b[key]) for key in a)

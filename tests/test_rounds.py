"""The journal of rounds: what it says, that it survives, and when it lets a loop stop."""

import json

import pytest
import torch
from factories import dense_weights, quick_learning, random_ranking, tokens

from ppf.choose.predictor import Prediction
from ppf.fast.permute import permuted
from ppf.fitting.collection import collect, schedule
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.experience import Experience
from ppf.fitting.rounds import Journal, Round
from ppf.model.grid import Grid
from ppf.storage.sealed import Sealed

pytestmark = pytest.mark.usefixtures("one_thread")


def test_medians_over_the_agents_policies():
    prediction = Prediction(torch.tensor([4.0, 4.5, 5.0]), torch.tensor([0.1, 0.3, 0.2]))
    found = Round.of(3, prediction, [4.25, 4.5, 5.5])
    assert found == Round(3, 3, pytest.approx(0.25), pytest.approx(0.2))


def test_settled_needs_two_rounds_in_a_row():
    journal = Journal()
    for index, gap in enumerate((0.5, 0.1, 0.3, 0.1, 0.2), start=1):
        journal.add(Round(index, 5, gap, 0.2))
    assert [journal.settled(index) for index in range(7)] == [False, False, False, False, False, True, False]


def test_kept_on_disk_in_order(tmp_path):
    files = Sealed(tmp_path, "a run", "run", "Fit again")
    first = Journal(files)
    for index in (2, 1):
        first.add(Round(index, 4, 0.1, 0.2))
    assert Journal(files).rounds == first.rounds
    assert [row["index"] for row in json.loads((tmp_path / "rounds.json").read_text())["rounds"]] == [1, 2]


@pytest.fixture
def evaluator(monkeypatch) -> Evaluator:
    quick_learning(monkeypatch)
    _, decoder = dense_weights()
    return Evaluator(permuted(decoder, random_ranking(decoder.structure)), Grid(decoder.structure, 8), tokens(2, 12))


def test_a_round_without_its_entry_is_learnt_again_and_measures_nothing(tmp_path, evaluator):
    store, whole = Experience(tmp_path / "experience.sqlite"), Journal()
    collect(evaluator, store, 48, seed=0, journal=whole)
    assert sorted(whole.rounds) == [1, 2] and all(found.policies > 0 for found in whole.rounds.values())
    again = Journal()
    again.rounds = {1: whole.rounds[1]}
    collect(evaluator, store, 48, seed=0, journal=again)
    assert again.rounds == whole.rounds and len(store) == sum(schedule(48))


@pytest.mark.parametrize("early", [True, False])
def test_early_stop_ends_the_loop_once_the_predictor_is_right(tmp_path, monkeypatch, evaluator, early):
    monkeypatch.setattr(Round, "of", lambda index, *_: Round(index, 5, 0.1, 0.2))
    store = Experience(tmp_path / "experience.sqlite")
    collect(evaluator, store, 66, seed=0, early_stop=early)
    assert len(schedule(66)) == 5
    assert len(store) == sum(schedule(66)[: 3 if early else 5])

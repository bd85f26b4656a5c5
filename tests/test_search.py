"""Static mode: exactly the evaluations it is given, all on budget, and the best of them."""

import shutil

import pytest
import torch
from factories import dense_weights, random_ranking, synthetic_log_perplexity, tokens

from ppf.choose.agent import Agent
from ppf.choose.candidates.breeding import Effort
from ppf.choose.predictor import make_predictor
from ppf.errors import InputError
from ppf.fitting.collection import Fitted, collect, learn
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.evaluation.measurement import measure
from ppf.fitting.experience import Experience
from ppf.fitting.search import SEARCH_ROUND, Search
from ppf.model.grid import Grid
from ppf.model.structure import Structure

pytestmark = pytest.mark.usefixtures("one_thread")


class Synthetic(Evaluator):
    """A real evaluator of a small model with a made-up answer, so that a search has something to find."""

    calls = 0

    def log_perplexities(self, policies, tokens=None):
        self.calls += len(policies)
        return synthetic_log_perplexity(self.grid, self.grid.encode(policies)).tolist()


@pytest.fixture(autouse=True)
def small_generations(monkeypatch):
    monkeypatch.setattr("ppf.fitting.search.static._EFFORT", Effort(generations=4, offspring=16, keep=16))
    monkeypatch.setattr("ppf.fitting.search.exploration._EFFORT", Effort(generations=3, offspring=8, keep=4))


def evaluator() -> Synthetic:
    _, weights = dense_weights(num_attention_heads=12, num_key_value_heads=3, head_dim=8)
    grid = Grid(weights.structure, 8)
    assert grid.step_cost[0] > 3 * grid.step_cost[-1]  # budgets cannot be met by swapping one for one
    return Synthetic(weights.permuted(random_ranking(weights.structure)), grid, tokens(2, 12))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> tuple[Fitted, str]:
    """A predictor and an agent, and the store they learnt from."""
    path = tmp_path_factory.mktemp("search") / "experience.sqlite"
    store, measuring = Experience(path), evaluator()
    collect(measuring, store, 24, seed=0)
    found = learn(measuring.grid, store.rows(), 0, torch.device("cpu"), effort=0.3)
    store.close()
    return found, path


@pytest.fixture
def search(fitted, tmp_path):
    (found, path), store = fitted, tmp_path / "experience.sqlite"
    shutil.copy(path, store)

    def make(ratio: float = 0.4, seed: int = 0) -> Search:
        return Search(evaluator(), Experience(store), found.predictor, found.agent, ratio, seed)

    return make


@pytest.mark.parametrize("evaluations", [1, 7, 21])
def test_spends_what_it_is_given_and_returns_the_best(search, evaluations):
    one = search()
    known, seen = len(one.experience), []
    best, value = one.run(evaluations, lambda *event: seen.append(event))
    assert evaluations == one.evaluator.calls == len(one.experience) - known
    assert value == min(one.measured.values()) == one.measured[best]
    assert [row.round for row in one.experience.rows()[known:]] == [SEARCH_ROUND] * evaluations
    assert seen[-1] == ("search", evaluations, evaluations)


def test_what_is_known_is_free(search):
    one = search()
    first = one.grid.decode(one.agent(torch.tensor([0.4])))[0]
    value = measure(one.evaluator, one.experience, first, 0, "agent")
    known = len(one.experience)
    one.run(5)
    assert one.measured[first] == value and len(one.measured) >= 6 and len(one.experience) == known + 5


def test_never_worse_than_the_agent(search):
    one = search(0.55)
    answer = one.grid.decode(one.agent(torch.tensor([0.55])))[0]
    _, value = one.run(6)
    assert answer in one.measured and value <= one.measured[answer]


def test_more_evaluations_find_better_policies(search):
    one = search()
    first = one.grid.decode(one.agent(torch.tensor([0.4])))[0]
    _, value = one.run(40)
    assert value < one.measured[first] - 0.005


@pytest.mark.parametrize("ratio", [0.17, 0.66])
def test_every_measured_policy_is_on_the_budget(search, ratio):
    one = search(ratio)
    one.run(24)
    target = (1 - ratio) * one.grid.structure.decoder_parameters
    gaps = (one.grid.kept(one.grid.encode(list(one.measured))) - target).abs()
    assert gaps.max() <= min(one.grid.step_cost) / 2


def test_starts_without_any_experience(fitted, tmp_path):
    found, _ = fitted
    one = Search(evaluator(), Experience(tmp_path / "empty.sqlite"), found.predictor, found.agent, 0.3, 0)
    assert one.run(3)[0] in one.measured


def test_refuses_what_cannot_be(search):
    for ratio in (0.0, 1.2, 0.999):
        with pytest.raises(InputError):
            search(ratio)
    for evaluations in (0, -3):
        with pytest.raises(InputError, match="at least 1"):
            search().run(evaluations)


def test_a_budget_with_few_policies_ends_with_an_error(fitted, tmp_path, monkeypatch):
    structure = Structure(1, 48, 2, 1, 8, 32)
    _, weights = dense_weights(
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=32
    )
    grid = Grid(weights.structure, 16)
    assert weights.structure == structure
    measuring = Synthetic(weights, grid, tokens(2, 12))
    one = Search(measuring, Experience(tmp_path / "small.sqlite"), make_predictor("mlp", grid), Agent(grid), 0.3, 0)
    with pytest.raises(InputError, match="no more policies"):
        one.run(20)

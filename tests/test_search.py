"""Static mode: exactly the evaluations it is given, all on budget, and the best of them."""

import shutil

import pytest
import torch
from factories import config_of, dense_weights, llama, random_ranking, synthetic_log_perplexity, tokens

from ppf.choose.agent import Agent
from ppf.choose.candidates.breeding import Effort
from ppf.choose.predictor import make_predictor
from ppf.errors import InputError
from ppf.fast.permute import permuted
from ppf.fitting.collection import collect
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.evaluation.measurement import measure
from ppf.fitting.experience import SEARCH_ROUND, Experience
from ppf.fitting.learning import Fitted, Learning, learn
from ppf.fitting.search import Search
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy

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
    _, decoder = dense_weights(num_attention_heads=12, num_key_value_heads=3, head_dim=8)
    grid = Grid(decoder.structure, 8)
    assert grid.step_cost[0] > 3 * grid.step_cost[-1]  # budgets cannot be met by swapping one for one
    return Synthetic(permuted(decoder, random_ranking(decoder.structure)), grid, tokens(2, 12))


def irregular() -> Synthetic:
    """Of a model whose layers differ: layer 1 has no FFN, layer 2 no attention."""
    config = pruned_config(config_of("phi3"), Policy([2, 3, 0, 3], [64, 0, 48, 32]))
    decoder = Decoder.of_model(llama(config))
    return Synthetic(decoder, Grid(decoder.structure, 4), tokens(2, 12))


def whole() -> Synthetic:
    """Of a model whose attention goes as a whole."""
    _, decoder = dense_weights(family="olmo2")
    return Synthetic(decoder, Grid(decoder.structure, 4), tokens(2, 12))


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


@pytest.mark.parametrize("make, kind", [(irregular, "gp"), (irregular, "mlp"), (irregular, "cnn"), (whole, "gp")])
def test_layers_may_differ_and_attention_may_go_as_a_whole(make, kind, tmp_path, monkeypatch):
    """From the first proposals to the end of a search, with every kind of predictor."""
    monkeypatch.setattr("ppf.fitting.search.static._REFIT_STEPS", 30)
    measuring, store = make(), Experience(tmp_path / "experience.sqlite")
    grid = measuring.grid
    collect(measuring, store, 24, seed=0, learning=Learning(predictor=kind))
    found = learn(grid, store.rows(), 0, torch.device("cpu"), effort=0.1, learning=Learning(predictor=kind), experts=0)
    best, value = Search(measuring, store, found.predictor, found.agent, 0.4, 0).run(12)
    searched = [row for row in store.rows() if row.round == SEARCH_ROUND]
    assert len(searched) == 12 and value == min(row.log_perplexity for row in searched)
    for row in store.rows():
        grid.check(row.policy)
    target, half = 0.6 * grid.structure.decoder_parameters, min(cost for cost in grid.step_cost if cost) / 2
    assert (grid.kept(grid.encode([row.policy for row in searched])) - target).abs().max() <= half
    assert best in {row.policy for row in searched}


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
    _, decoder = dense_weights(
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=32
    )
    grid = Grid(decoder.structure, 16)
    measuring = Synthetic(decoder, grid, tokens(2, 12))
    one = Search(measuring, Experience(tmp_path / "small.sqlite"), make_predictor("mlp", grid), Agent(grid), 0.3, 0)
    with pytest.raises(InputError, match="no more policies"):
        one.run(20)

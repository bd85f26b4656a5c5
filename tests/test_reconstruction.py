"""The thorough refit: kept weights of all families learn what the dense layers make of the text."""

import json

import pytest
import torch
from cli_cases import ppf, refusal
from factories import config_of, dense_weights, random_ranking, tokens
from refit_cases import library_of

from ppf.errors import InputError
from ppf.families import families
from ppf.fast.permute import identity, permuted
from ppf.fitting.materialize import materialize
from ppf.fitting.reconstruction import Reconstruction, Schedule
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy
from ppf.model.stream import Host, Stream

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = tokens(8, 24, seed=3)
MEASURED = Schedule.of
# A sub-layer less, a layer less, and a layer that is whole.
POLICY = Policy([3, 0, 0, 1], [64, 16, 0, 40])


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A few large steps, of windows that overlap."""
    monkeypatch.setattr("ppf.fitting.reconstruction._RATE", 1e-2)
    monkeypatch.setattr(Schedule, "of", classmethod(lambda cls, *_: cls(3, 12, 4)))


class Case:
    def __init__(self, family: str = "llama"):
        self.dense, decoder = dense_weights(family=family)
        ranking = random_ranking(decoder.structure)
        self.decoder = permuted(decoder, ranking)
        self.grid = Grid(decoder.structure, 8)
        # Some families' kv-groups only go together.
        apart = decoder.structure.attention[0].step == 1
        self.policy = POLICY if apart else Policy([3, 0, 0, 3], POLICY["ffn"])
        self.library = library_of(decoder, ranking, self.grid, tokens(8, 40))

    def model(self, taught=None, policy: Policy | None = None):
        policy = policy or self.policy
        return materialize(self.decoder, identity(self.decoder), self.grid, policy, self.library, taught)

    def taught(self, policy: Policy | None = None, seed: int = 0, scored=None, decoder=None):
        teacher = Reconstruction(decoder or self.decoder, policy or self.policy, TEXT, scored, seed)
        return self.model(teacher.taught, policy), teacher

    @torch.no_grad()
    def off(self, model, ids=TEXT) -> float:
        """How far the last layer's states are from the dense model's, relative energy."""
        wanted, got = (m.model(ids).last_hidden_state for m in (self.dense, model))
        return float((got - wanted).square().sum() / wanted.square().sum())


def same(first, second) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("family", [family.model_type for family in families()])
def test_kept_weights_learn_what_the_dense_layers_give(family):
    case = Case(family)
    model, _ = case.taught()
    assert case.off(model) < 0.8 * case.off(case.model())


def test_what_loses_nothing_stays_as_it_is():
    case = Case()
    dense = case.grid.dense()
    model, _ = case.taught(dense)
    assert same(model, case.model(policy=dense))


def test_the_same_seed_gives_the_same_weights():
    case = Case()
    (first, _), (again, _), (other, _) = case.taught(seed=1), case.taught(seed=1), case.taught(seed=2)
    assert same(first, again)
    assert not same(first, other)


def test_layers_that_stream_give_the_same_weights():
    case = Case()
    decoder = case.decoder
    streamed = Decoder.of_layers(
        decoder.config, Stream(Host(iter(decoder.layers), pinned=False), decoder.device), decoder.outer
    )
    assert same(case.taught()[0], case.taught(decoder=streamed)[0])


def test_only_scored_tokens_count():
    case = Case()
    scored = torch.zeros_like(TEXT, dtype=torch.bool)
    whole, _ = case.taught(scored=~scored)
    assert case.off(whole) == pytest.approx(case.off(case.taught()[0]), rel=0.05)
    nothing, _ = case.taught(scored=scored)
    assert same(nothing, case.model())


def test_a_batch_that_does_not_fit_goes_through_in_parts(monkeypatch):
    case, real = Case(), Reconstruction._loss
    plain, _ = case.taught()

    def limited(self, layers, chosen):
        if len(chosen) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(self, layers, chosen)

    monkeypatch.setattr(Reconstruction, "_loss", limited)
    with pytest.warns(UserWarning, match="4 parts"):
        parted, teacher = case.taught()
    assert teacher._parts == 4
    assert case.off(parted) == pytest.approx(case.off(plain), rel=1e-3)


def test_what_does_not_fit_at_all_says_what_helps(monkeypatch):
    def never(self, layers, chosen):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Reconstruction, "_loss", never)
    with pytest.raises(InputError, match="--refit fast"):
        Case().taught()


def test_a_window_has_as_many_layers_as_fit(monkeypatch):
    decoder = Decoder.of_layers(config_of("llama"), *_weights())
    assert MEASURED(decoder, TEXT) == Schedule(4, 48, 1)
    monkeypatch.setattr("ppf.memory.room", lambda device: 0)
    assert MEASURED(decoder, TEXT).layers == 1


def _weights():
    _, decoder = dense_weights()
    return decoder.layers, decoder.outer


def test_prune_refits_thoroughly(tiny_run, tmp_path):
    found = {}
    for how in ("fast", "thorough"):
        out = tmp_path / how
        assert ppf("prune", tiny_run / "run", "--ratio", 0.4, "--output", out, "--refit", how).exit_code == 0
        found[how] = json.loads((out / "ppf.json").read_text())
        assert found[how]["refit"] == how
    assert found["thorough"]["policy"] == found["fast"]["policy"]
    assert found["thorough"]["measured"]["perplexity"] < found["fast"]["measured"]["perplexity"]
    # The same again is there already; another refit is another result.
    again = "prune", tiny_run / "run", "--ratio", 0.4, "--output", tmp_path / "thorough"
    with pytest.warns(UserWarning, match="holds exactly this already"):
        assert ppf(*again, "--refit", "thorough").exit_code == 0
    refusal(*again, field="output")


def test_another_refit_is_refused(tiny_run, tmp_path):
    asked = "prune", tiny_run / "run", "--ratio", 0.4, "--output", tmp_path / "out", "--refit", "best"
    assert "thorough" in refusal(*asked, field="refit", value="best")
    assert not (tmp_path / "out").exists()

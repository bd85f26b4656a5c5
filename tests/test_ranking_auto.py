"""Rankings that choose themselves: what trials cost is what the pruned model loses, and the cheapest order is taken."""

import json
import math
from itertools import permutations
from pathlib import Path

import pytest
import torch
from cli_cases import ppf as command
from factories import (
    config_of,
    dense_weights,
    llama,
    llama_config,
    quick_learning,
    tokens,
    track_grams,
    write_checkpoint,
)
from ranks_cases import forked_together
from refit_cases import library_of

import ppf
from ppf.checkpoint import load_decoder
from ppf.errors import PPFError
from ppf.families import KINDS
from ppf.fast.permute import identity, permuted
from ppf.fitting import stages
from ppf.fitting.calibration import calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.ranking import auto, rank_layer
from ppf.fitting.ranking import trials as trying
from ppf.fitting.ranking.auto import CANDIDATES, MEASURED, Chosen, choose_rankings
from ppf.fitting.ranking.trials import Trials, refitted
from ppf.fitting.run import Settings
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.layer import LayerRanking
from ppf.model.policy import Policy
from ppf.model.stream import Placement

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT, JUDGE = tokens(4, 32), tokens(4, 32, seed=2)


def chosen_for(decoder: Decoder, multiple: int = 8, portable: bool = False) -> Chosen:
    return choose_rankings(decoder, Grid(decoder.structure, multiple, portable), (TEXT, None), (JUDGE, None))


def truly(decoder: Decoder, kind: str, index: int, order: torch.Tensor, widths: list[int], counted=None) -> list[float]:
    """The Kullback-Leibler divergence from the dense model, in nats a token, that the evaluator's logits have with the
    run's library when one sub-layer keeps the first units of ``order``."""
    grid, ranking = Grid(decoder.structure, 8), identity(decoder)
    ranking[index] = LayerRanking(**{k: order if k == kind else ranking[index].of(k) for k in KINDS})
    library = library_of(decoder, ranking, grid, TEXT)
    evaluator, found = Evaluator(permuted(decoder, ranking), grid, JUDGE, library), []
    dense = evaluator.logits(grid.dense(), JUDGE).double().log_softmax(-1)
    for width in widths:
        policy = {k: list(grid.dense()[k]) for k in KINDS}
        policy[kind][index] = width
        other = evaluator.logits(Policy(**policy), JUDGE).double().log_softmax(-1)
        lost = (dense.exp() * (dense - other)).sum(-1)[:, :-1]
        found.append(float(lost.mean() if counted is None else lost[counted[:, 1:]].mean()))
    return found


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_a_trial_costs_what_the_pruned_model_loses(family):
    _, decoder = dense_weights(family=family)
    scored = torch.rand(JUDGE.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    trials, tried = Trials(decoder, JUDGE, scored, 20), {}
    for index, statistics in enumerate(calibrate(decoder, TEXT)):
        ranking, begun = rank_layer("obs", decoder, index, statistics), {}
        for kind, widths in (("attention", [2, 1]), ("ffn", [24, 48])) if index in (1, 3) else ():
            order, columns = ranking.of(kind), decoder.structure.of(kind)[index].columns
            kept = refitted(decoder.output(index, kind), statistics.of(kind), order, columns, widths)
            begun[f"my {kind}"], tried[index, f"my {kind}"] = (kind, kept), (kind, index, order, widths)
        trials.advance(index, begun)
    found = trials.damages()
    assert found.keys() == tried.keys() and len(tried) == 4
    for key, damages in found.items():
        assert damages == pytest.approx(truly(decoder, *tried[key], scored), rel=2e-3, abs=1e-6)
        assert max(damages) > 1e-3


def test_the_order_that_costs_least_is_chosen():
    """All orders of three kv-groups, the candidates of channels; judged by what the evaluator says of each."""
    _, decoder = dense_weights()
    chosen = chosen_for(decoder)
    statistics = list(calibrate(decoder, TEXT))
    for index in (0, 2):
        groups = {
            order: cost(decoder, "attention", index, torch.tensor(order), [1, 2]) for order in permutations(range(3))
        }
        assert chosen.rankings[index].attention.tolist() == list(min(groups, key=groups.get))
        orders = {name: rank_layer(name, decoder, index, statistics[index]).ffn for name in CANDIDATES}
        channels = {name: cost(decoder, "ffn", index, order, [16, 32, 48]) for name, order in orders.items()}
        best = min(channels, key=channels.get)
        assert chosen.names["ffn"][index] == best and torch.equal(chosen.rankings[index].ffn, orders[best])
        assert max(groups.values()) > min(groups.values()) and max(channels.values()) > min(channels.values())
    assert chosen.names["attention"] == [MEASURED] * 4


def cost(*arguments) -> float:
    return sum(map(math.log, truly(*arguments)))


def test_many_kv_groups_have_the_candidates_orders():
    _, decoder = dense_weights("mha")
    chosen, statistics = chosen_for(decoder), list(calibrate(decoder, TEXT))
    for kind in KINDS:
        for index, name in enumerate(chosen.names[kind]):
            assert name in CANDIDATES
            expected = rank_layer(name, decoder, index, statistics[index]).of(kind)
            assert torch.equal(chosen.rankings[index].of(kind), expected)
    assert len({name for names in chosen.names.values() for name in names}) > 1


def test_where_there_is_nothing_to_choose_units_stay():
    """Absent sub-layers, one group, units that only go together, and a grid of one step."""
    policy = Policy([3, 0, 1, 1], [64, 16, 0, 40])
    decoder = Decoder.of_model(llama(pruned_config(config_of("qwen3"), policy)))
    chosen = chosen_for(decoder)
    assert chosen.names["attention"] == [MEASURED, None, None, None]
    assert [name is None for name in chosen.names["ffn"]] == [False, False, True, False]
    for index, ranking in enumerate(chosen.rankings):
        assert sorted(ranking.attention.tolist()) == list(range(policy.attention[index]))
        assert sorted(ranking.ffn.tolist()) == list(range(policy.ffn[index]))
        assert ranking.attention.dtype == ranking.ffn.dtype == torch.int64
    _, decoder = dense_weights(family="olmo2")
    chosen = chosen_for(decoder, 64)
    assert chosen.names == {kind: [None] * 4 for kind in KINDS}
    assert all(ranking.attention.tolist() == [0, 1, 2] for ranking in chosen.rankings)


def test_portable_grids_choose_for_all_that_their_library_holds():
    """Their price is measured beside the restriction."""
    _, decoder = dense_weights()
    names = [chosen_for(decoder, portable=portable).names for portable in (False, True)]
    assert names[0] == names[1]


def test_one_layers_grams_at_a_time(monkeypatch):
    _, decoder = dense_weights()
    small, living = chosen_for(decoder), track_grams(monkeypatch)
    monkeypatch.setattr(auto, "_HELD_BYTES", 0)
    large = chosen_for(decoder)
    assert living() == 0 and living.peak <= 3 * len(KINDS)
    assert len(small.statistics) == 4 and large.statistics is None
    alike(large, small)


def test_streamed_weights_and_copies_in_host_memory_choose_alike(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model")
    expected = chosen_for(load_decoder(folder))
    monkeypatch.setattr(trying, "_SHARE", 0.0)
    streamed = load_decoder(folder, placement=Placement("disk"))
    assert not streamed.resident
    alike(chosen_for(streamed), expected)


def alike(found, expected) -> None:
    assert found.names == expected.names
    for ours, theirs in zip(found.rankings, expected.rankings, strict=True):
        assert torch.equal(ours.attention, theirs.attention) and torch.equal(ours.ffn, theirs.ffn)


_TOGETHER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from factories import dense_weights, tokens
from ppf import ranks
from ppf.fitting.ranking.auto import choose_rankings
from ppf.model.grid import Grid
torch.set_num_threads(1)
ranks.start()
_, decoder = dense_weights(num_hidden_layers=2)
found = choose_rankings(decoder, Grid(decoder.structure, 8), (tokens(4, 32), None), (tokens(4, 32, seed=2), None))
told = [found.names, [[r.attention.tolist(), r.ffn.tolist()] for r in found.rankings]]
assert ranks.gather(told) == [told] * 2
print(json.dumps(told))
"""


def test_two_processes_choose_what_one_does():
    told = json.loads(forked_together(2, _TOGETHER, Path(__file__).parent)[0].stdout)
    _, decoder = dense_weights(num_hidden_layers=2)
    one = chosen_for(decoder)
    assert told == [one.names, [[r.attention.tolist(), r.ffn.tolist()] for r in one.rankings]]


def test_activations_that_are_not_finite_are_refused():
    model = llama(llama_config())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = math.inf
    decoder = Decoder.of_model(model)
    with pytest.raises(PPFError, match="NaN or Inf"):
        chosen_for(decoder)


def test_a_fit_says_what_was_chosen_also_after_it_was_killed(tiny_run, tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    settings = Settings(24, ranking="auto", ffn_multiple=16, sequence_length=32, calibration_tokens=1024)

    def fit():
        return ppf.fit(tiny_run / "model", tiny_run / "text.txt", tmp_path / "run", settings=settings, device="cpu")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "_conclude", interrupted)
        fit()
    monkeypatch.setattr(stages, "choose_rankings", interrupted)  # nothing is chosen twice
    run = fit()
    texts = (run.sequences("calibration"), None), (run.sequences(), None)
    expected = choose_rankings(load_decoder(tiny_run / "model"), run.grid, *texts)
    alike(Chosen(run.ranking, run.manifest["rankings"]), expected)
    told = command("info", tmp_path / "run").stdout
    assert "auto (attention: 4 measured; ffn: " in told
    assert json.loads(command("info", tmp_path / "run", "--json").stdout)["rankings"] == expected.names
    small = run.prune(ratio=0.3, device="cpu")
    assert small.save_pretrained(tmp_path / "out")["rankings"] == expected.names


def interrupted(*_):
    raise KeyboardInterrupt

"""Peers: on the grid, on the budget, deterministic, within their evaluations, and true to their formulas."""

import copy
import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from factories import config_of, llama, model_of, synthetic_log_perplexity, tokens
from structures import llama_structure

from ppf.choose.budget import FlopsBudget, MemoryBudget, RatioBudget
from ppf.choose.budget.costs import token_flops, weight_bytes
from ppf.errors import InputError
from ppf.families import KINDS, families
from ppf.fitting.calibration import calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.masked import masked_losses
from ppf.fitting.run import Run
from ppf.fitting.session import Session
from ppf.lab.peers import PEERS, Meter, PeerStatistics, peer_named
from ppf.lab.peers.activations import LayerActivations, observe
from ppf.lab.peers.adapt_pruner import importance
from ppf.lab.peers.alphapruning import tail_index
from ppf.lab.peers.atp import differences, rates
from ppf.lab.peers.dropping import kept_after, sublayer_costs
from ppf.lab.peers.flap import above_threshold
from ppf.lab.peers.global_mp import magnitude_counts, shares_above
from ppf.lab.peers.layers import mean_over_layers, positions
from ppf.lab.peers.puzzle import solve
from ppf.lab.peers.tracenas import _Agreement
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")

GIVEN = {"uniform-split": 5, "random": 8, "atp": 6, "finercut": 60, "puzzle": 40, "evopress": 30, "evolution": 20}
# A plain model, one of fused projections, one whose attention goes as a whole, and one with biases whose layers differ:
# layer 1 has no FFN, layer 2 no attention, layer 3 neither.
SOURCES = "llama", "phi3", "olmo2", "irregular"


class Synthetic(Evaluator):
    """A real evaluator whose answer is made up, and which remembers what it was asked."""

    def __init__(self, decoder, grid, sequences):
        super().__init__(decoder, grid, sequences)
        self.asked = []

    def log_perplexities(self, policies, tokens=None):
        self.asked += policies
        return synthetic_log_perplexity(self.grid, self.grid.encode(policies)).tolist()


@functools.cache
def model(source: str):
    if source != "irregular":
        return model_of(source)
    return llama(pruned_config(config_of("qwen2", num_hidden_layers=5), Policy([2, 3, 0, 0, 3], [64, 0, 48, 0, 32])))


@functools.cache
def observed(source: str) -> PeerStatistics:
    """Statistics of a model whose ranking is the checkpoint's order."""
    decoder, sequences = Decoder.of_model(model(source)), tokens(6, 32)
    grid, moments = Grid(decoder.structure, 8), list(calibrate(decoder, sequences))
    return PeerStatistics(grid, decoder, moments, sequences, Meter(Synthetic(decoder, grid, sequences), 0))


def statistics(source: str = "llama", evaluations: int = 0, seed: int = 0) -> PeerStatistics:
    fresh = observed(source).with_budget(evaluations, seed)
    fresh.meter.evaluator = copy.copy(fresh.meter.evaluator)
    fresh.meter.evaluator.asked = []
    return fresh


def allocated(name: str, found: PeerStatistics, ratio: float) -> Policy:
    return PEERS[name].allocate(found.grid.structure, found, RatioBudget(found.grid, ratio))


def gap(grid: Grid, policy: Policy, ratio: float) -> float:
    """Parameters between a policy and its budget."""
    return abs(int(grid.kept(grid.encode([policy]))[0]) - (1 - ratio) * grid.structure.decoder_parameters)


@pytest.fixture(autouse=True)
def few_proxies_and_steps(monkeypatch):
    monkeypatch.setattr("ppf.lab.peers.tracenas._PROXIES", 12)
    monkeypatch.setattr("ppf.lab.peers.adapt_pruner._STEPS", 10)
    monkeypatch.setattr("ppf.lab.peers.adapt_pruner._AMPLITUDE", 0.1)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", PEERS)
def test_on_the_budget_within_the_evaluations_and_the_same_again(name, source):
    given = GIVEN.get(name, 0)
    for ratio in (0.15, 0.5):
        found = statistics(source, given)
        grid = found.grid
        policy = allocated(name, found, ratio)
        # FFN steps are the cheapest everywhere here, and there are enough of them to make up for one of attention.
        assert gap(grid, policy, ratio) <= min(cost for cost in grid.step_cost if cost) / 2
        assert found.meter.spent <= given + 1e-9 and (found.meter.spent > 0) == (given > 0)
        assert allocated(name, statistics(source, given), ratio) == policy


@pytest.mark.parametrize("family", [family.model_type for family in families() if family.model_type not in SOURCES])
def test_methods_that_look_at_every_layer_run_on_all_families(family):
    """Norms behind sub-layers and windows (Gemma), scaled residuals (Granite), rotary of some layers only (SmolLM3)."""
    for name in ("global-mp", "atp", "adapt-pruner"):
        found = statistics(family, GIVEN.get(name, 0))
        policy = allocated(name, found, 0.3)
        assert gap(found.grid, policy, 0.3) <= min(cost for cost in found.grid.step_cost if cost) / 2
        assert allocated(name, statistics(family, GIVEN.get(name, 0)), 0.3) == policy


@pytest.mark.parametrize("name", PEERS)
def test_limits_are_kept_and_used(name):
    """Of bytes, and of operations with contexts so long that no FFN makes up for attention: there as nearly as others
    come."""
    found, given = statistics("irregular"), GIVEN.get(name, 0)
    grid, even = found.grid, torch.full((found.grid.structure.layers,), 0.6)
    flops = token_flops(grid, 1 << 17, 258)
    memory = MemoryBudget(grid, 0.6 * weight_bytes(grid, 2, 0).range(grid)[1] / 1e9, weight_bytes(grid, 2, 0))
    for budget in (memory, FlopsBudget(grid, 0.6 * flops.range(grid)[1], 1 << 17, 258)):
        cost = budget.cost(PEERS[name].allocate(grid.structure, statistics("irregular", given), budget))
        nearest = min(budget.target - budget.projector.cheapest + 1, budget.cost(budget.policy(even)))
        assert nearest <= cost <= budget.target


@pytest.mark.parametrize("source", SOURCES)
def test_methods_differ(source):
    found = {name: allocated(name, statistics(source, GIVEN.get(name, 0)), 0.4) for name in PEERS}
    assert len(set(found.values())) >= len(PEERS) - 3


def test_seeds_matter_to_what_is_random():
    for name in ("random", "evolution"):
        assert len({allocated(name, statistics(evaluations=60, seed=seed), 0.4) for seed in range(3)}) == 3


@pytest.mark.parametrize("source", SOURCES)
def test_searching_methods_return_the_best_they_measured(source):
    for name in ("uniform-split", "random", "atp", "evolution"):
        found = statistics(source, GIVEN[name])
        policy = allocated(name, found, 0.4)
        asked = found.meter.evaluator.asked
        values = synthetic_log_perplexity(found.grid, found.grid.encode(asked))
        assert policy == asked[int(values.argmin())] and len(set(asked)) == len(asked)


def test_evolution_improves_and_more_is_better():
    values = []
    for given in (1, 60, 300):
        found = statistics(evaluations=given)
        policy = allocated("evolution", found, 0.4)
        values.append(float(synthetic_log_perplexity(found.grid, found.grid.encode([policy]))[0]))
    assert values[0] > values[1] > values[2]


def test_staged_evolution_measures_few_on_much_text(monkeypatch):
    monkeypatch.setattr("ppf.lab.peers.evolution._BROOD", 12)
    monkeypatch.setattr("ppf.lab.peers.evolution._STAGES", ((4, 32), (2, 64), (1, 10**6)))
    found, calls = statistics(evaluations=9), []
    measure = found.meter.measure
    found.meter.measure = lambda policies, tokens: calls.append((len(policies), tokens)) or measure(policies, tokens)
    allocated("evopress", found, 0.4)
    assert calls[:3] == [(12, 32), (4, 64), (3, 10**6)]
    first = (12 + 4 * 2) / len(found.sequences) + 3
    assert first - 1e-9 <= found.meter.spent <= 9 and 9 - found.meter.spent < first


def test_the_meter_refuses_what_was_not_given():
    found = statistics(evaluations=2)
    meter, dense = found.meter, found.grid.dense()
    meter.measure([dense])
    assert meter.cost(32) == 1 / len(found.sequences) and meter.cost(10**9) == 1
    with pytest.raises(InputError, match="evaluations"):
        meter.measure([dense, dense])
    assert meter.spent == 1
    for name, given in (("finercut", 5), ("puzzle", 3)):
        with pytest.raises(InputError, match="evaluations"):
            allocated(name, statistics(evaluations=given), 0.5)


@pytest.mark.parametrize("source", SOURCES)
def test_puzzle_finds_the_optimum_of_additive_damages(source):
    """Against every policy of a made-up additive problem; interactions of the true one are not its claim."""
    grid, generator = observed(source).grid, torch.Generator().manual_seed(0)
    damage = [
        torch.rand(high - low + 1, generator=generator).sort(descending=True).values.double()
        for low, high in zip(grid.minimum, grid.maximum, strict=True)
    ]
    budget = RatioBudget(grid, 0.4)
    levels = grid.encode([solve(damage, budget)])[0].tolist()
    chosen = sum(float(d[level - low]) for d, level, low in zip(damage, levels, grid.minimum, strict=True))
    assert chosen <= _best_additive(damage, grid, budget.kept) + 1e-4


def _best_additive(damage, grid, kept) -> float:
    """Dynamic programming over costs in units of the cheapest step's divisor."""
    unit = math.gcd(*grid.step_cost)
    total = grid.structure.decoder_parameters
    best = {0: 0.0}
    for d, low, step in zip(damage, grid.minimum, grid.step_cost, strict=True):
        nxt: dict[int, float] = {}
        for (cost, value), (index, damage_here) in itertools.product(best.items(), enumerate(d.tolist())):
            key = cost + (low + index) * step // unit
            nxt[key] = min(nxt.get(key, math.inf), value + damage_here)
        best = nxt
    slack = min(cost for cost in grid.step_cost if cost) / 2
    return min(v for cost, v in best.items() if abs(cost * unit - kept * total) <= slack)


@pytest.mark.parametrize("source", SOURCES)
def test_finercut_drops_the_least_harmful_first(source):
    found = statistics(source, 60)
    grid = found.grid
    policy = allocated("finercut", found, 0.3)
    # It asks about every sub-layer that has something to lose.
    free = [s for s, (low, high) in enumerate(zip(grid.minimum, grid.maximum, strict=True)) if high > low]
    asked = found.meter.evaluator.asked[: len(free)]
    assert len(set(asked)) == len(free) and grid.dense() not in asked
    values = synthetic_log_perplexity(grid, grid.encode(asked))
    first = free[int(values.argmin())]
    assert grid.encode([policy])[0, first] <= grid.minimum[first] + 1


def test_dropping_goes_on_until_the_budget_and_partly_beyond():
    grid = Grid(llama_structure(3, 32, 2, 1, 8, 64), 8)
    costs = sublayer_costs(grid)
    assert kept_after(grid, [(1, 4), (2, 5)], 1.0).tolist() == [1] * 6
    for kept in (0.9, 0.6, 0.4):
        fractions = kept_after(grid, [(1, 4), (2, 5), (0, 3)], kept)
        assert float((fractions * costs).sum() / costs.sum()) == pytest.approx(kept)
    fractions = kept_after(grid, [(0, 3), (1, 4)], 0.4)
    assert fractions[0] == 0.5 and fractions[3] == 0 and 0 < fractions[1] == fractions[4] < 1


def test_dropping_what_is_absent_changes_nothing():
    grid = observed("irregular").grid
    costs = sublayer_costs(grid)
    assert costs[[6, 2, 3, 8]].tolist() == [0, 0, 0, 0] and (costs > 0).sum() == 6
    fractions = kept_after(grid, [(3, 8), (2, 7), (1, 6), (4, 9)], 0.7)
    assert float((fractions * costs).sum() / costs.sum()) == pytest.approx(0.7)


def test_flap_counts_costs_to_the_budget():
    structure = llama_structure(4, 32, 4, 2, 8, 96)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(s.units, generator=generator) for s in structure.sublayers]
    scores[2] = torch.zeros(0)  # an absent one
    costs = [s.cost for s in structure.sublayers]
    kept = above_threshold(scores, costs, 0.55)
    cost, total = (sum(int(n) * c for n, c in zip(ns, costs, strict=True)) for ns in (
        [k.sum() for k in kept], [len(k) for k in kept]
    ))  # fmt: skip
    assert abs(cost - 0.55 * total) <= max(costs) / 2
    kept, scores = torch.cat(kept), torch.cat(scores)
    assert scores[kept].min() > scores[~kept].max()


def test_shares_are_of_parameters_and_absent_layers_count_nothing():
    structure = observed("irregular").grid.structure
    attention, ffn = (torch.tensor([s.units * s.cost for s in structure.of(kind)]) for kind in KINDS)
    costs = attention + ffn
    values = torch.tensor([0.1, 0.2, 0.3, 100.0, 0.5], dtype=torch.float64)
    assert float(mean_over_layers(values, structure)) == pytest.approx(float((values * costs).sum() / costs.sum()))
    assert costs[3] == 0 and len(set(costs.tolist())) == 5
    alike = llama_structure(4, 48, 3, 2, 8, 64)
    assert float(mean_over_layers(torch.arange(4.0), alike)) == pytest.approx(1.5)
    assert positions([3.0, None, 5.0, 4.0]).tolist() == [0, 0, 1, 0.5] and positions([2.0, 2.0]).tolist() == [0, 0]


def test_tail_index_finds_a_power_law():
    """Eigenvalues that are exact quantiles of a Pareto law with exponent 3 in density."""
    n, alpha = 400, 3.0
    values = (torch.arange(1, n + 1) / n) ** (-1 / (alpha - 1))
    matrix = torch.diag(values.sqrt())
    assert float(tail_index(matrix)) == pytest.approx(alpha, rel=0.02)


def test_one_threshold_for_all_weights_leaves_these_shares():
    """By hand: six and two weights; of bins that the budget lies between, the nearer."""
    counts = torch.tensor([[3, 0, 2, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
    for kept, shares in ((1.0, [1, 1, 0]), (0.6, [1 / 2, 1, 0]), (0.52, [1 / 2, 1 / 2, 0]), (0.2, [1 / 6, 1 / 2, 0])):
        assert shares_above(counts, [6, 2, 0], kept).tolist() == pytest.approx(shares)


@pytest.mark.parametrize("dtype, within", [(torch.bfloat16, 1e-12), (torch.float32, 5e-3)])
@pytest.mark.parametrize("source", ["llama", "phi3"])
def test_the_threshold_is_that_of_all_weights_sorted(source, dtype, within):
    decoder = Decoder.of_model(model_of(source, dtype=dtype))
    structure, weights = decoder.structure, {}
    for index, layer in enumerate(decoder.layers):
        for name, tensor in layer.items():
            if tensor.dim() == 2:
                place = index + structure.layers * name.startswith("mlp")
                weights[place] = torch.cat((weights.get(place, torch.zeros(0)), tensor.float().abs().flatten()))
    every, costs = torch.cat(list(weights.values())), [s.units * s.cost for s in structure.sublayers]
    assert len(every) == structure.decoder_parameters
    for kept in (0.85, 0.5):
        found = shares_above(magnitude_counts(decoder), costs, kept)
        threshold = every.sort().values[round((1 - kept) * len(every))]
        # Where many weights are equal, as in bf16, the threshold is theirs or the one above, whichever is nearer.
        candidates = threshold, every[every > threshold].min()
        shares = [[float((weights[s] >= t).double().mean()) for s in range(len(costs))] for t in candidates]
        assert min((found - torch.tensor(s, dtype=torch.float64)).abs().max() for s in shares) <= within


def test_atp_rises_in_an_arithmetic_progression():
    """By hand, for S = 0.3 and L = 4: β is at most min(2S/3, 2(1 − S)/3) = 0.2, and s = S − 3β/2 + β(i − 1)."""
    alike = llama_structure(4, 48, 3, 2, 8, 64)
    assert rates(0.3, 0.1, alike).tolist() == pytest.approx([0.15, 0.25, 0.35, 0.45])
    found = differences(0.3, alike, 1000)
    assert found == pytest.approx([0.002 * (index + 1) for index in range(100)])
    assert rates(0.3, found[-1], alike).tolist() == pytest.approx([0, 0.2, 0.4, 0.6])
    assert differences(0.3, alike, 4) == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert differences(0.7, alike, 1)[0] == pytest.approx(0.2) and differences(0.001, alike, 9) == [0]
    assert differences(0.3, llama_structure(1, 48, 3, 2, 8, 64), 9) == [0]


def test_atp_keeps_the_mean_and_every_ratio_where_layers_differ():
    structure = observed("irregular").grid.structure
    for ratio in (0.2, 0.7):
        found = [rates(ratio, difference, structure) for difference in differences(ratio, structure, 9)]
        assert all(float(mean_over_layers(r, structure)) == pytest.approx(ratio) for r in found)
        assert all(float(r.min()) >= 0 and float(r.max()) <= 1 for r in found)
        assert min(float(found[-1].min()), 1 - float(found[-1].max())) < 0.01


def test_adapt_pruner_weighs_layers_by_how_they_turn_the_stream():
    """By hand: −cos is −0.9, −0.8, −0.4, around their mean −0.2, −0.1, 0.3, and scaled −2/3, −1/3, 1."""
    alike = llama_structure(3, 48, 3, 2, 8, 64)
    seen = [LayerActivations(cosine, 0.0, {}) for cosine in (0.9, 0.8, 0.4)]
    assert importance(seen, alike).tolist() == pytest.approx([-2 / 3, -1 / 3, 1])
    assert importance(seen[:1] * 3, alike).tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_adapt_pruner_takes_small_steps_and_looks_again(monkeypatch):
    """Two and a half steps of a tenth: looks at the dense model, then at what the first and the second step leave."""
    found, asked = statistics(), []
    grid, moved = found.grid, [LayerActivations(c, 0.0, {}) for c in (0.9, 0.8, 0.4, 0.7)]
    found.__dict__["activations"] = moved
    monkeypatch.setattr(found, "observed", lambda policy: asked.append(policy) or moved)
    budget = RatioBudget(grid, 0.25)
    monkeypatch.setattr(budget, "policy", lambda kept: kept)  # before the projection makes up for anything
    kept = PEERS["adapt-pruner"].allocate(grid.structure, found, budget)
    rise = 0.1 - 0.1 * importance(moved, grid.structure)
    assert float(rise.min()) == 0 and float(rise.max()) > 0.15
    assert kept.tolist() == pytest.approx((1 - 2.5 * rise).tolist())
    for looked, steps in zip(asked, (1, 2), strict=True):
        for kind, step in (("attention", 1), ("ffn", grid.ffn_multiple)):
            wanted = [s.units * (1 - float(r) * steps) for s, r in zip(grid.structure.of(kind), rise, strict=True)]
            assert all(abs(a - b) <= step / 2 + 1e-6 for a, b in zip(looked[kind], wanted, strict=True))


@pytest.mark.parametrize("source", (*SOURCES, "gemma2", "granite"))
def test_activations_of_a_policy_are_those_of_the_dense_model_with_the_rest_at_zero(source):
    found = observed(source)
    policy = allocated("random", statistics(source, seed=5), 0.5)
    decoder, structure, layers = found.decoder, found.grid.structure, []
    for index, layer in enumerate(decoder.layers):
        layers.append({name: tensor.clone() for name, tensor in layer.items()})
        for kind in KINDS:
            sublayer, name = structure.of(kind)[index], f"{decoder.family.parts[kind].output_name}.weight"
            if sublayer.units:
                layers[-1][name][:, policy[kind][index] * sublayer.columns :] = 0
    zeroed = observe(replace(decoder, layers=tuple(layers)), found.sequences, found.grid.dense())
    for cut, zero in zip(found.observed(policy), zeroed, strict=True):
        assert cut.cosine == pytest.approx(zero.cosine, abs=1e-5)
        for kind in cut.inputs:
            torch.testing.assert_close(cut.inputs[kind], zero.inputs[kind], rtol=1e-4, atol=1e-6)
    assert [layer.cosine for layer in zeroed] != [layer.cosine for layer in found.activations]


@pytest.mark.parametrize("source", (*SOURCES, "gemma2", "granite"))
def test_activations_are_those_of_the_model(source):
    real, given = model(source), tokens(3, 32, seed=4)
    decoder = Decoder.of_model(real)
    read = {}

    def keep(place, _, inputs):
        read[place] = inputs[0].detach().double().square().mean((0, 1))

    hooks = []
    for index, layer in enumerate(real.model.layers):
        for kind, part in decoder.family.parts.items():
            if decoder.structure.of(kind)[index].units:
                first = layer.get_submodule(f"{part.module}.{next(iter(part.rows))}")
                hooks.append(first.register_forward_pre_hook(functools.partial(keep, (index, kind))))
    with torch.no_grad():
        states = real(input_ids=given, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    seen = observe(decoder, given, Grid(decoder.structure, 8).dense())
    assert {(index, kind) for index, layer in enumerate(seen) for kind in layer.inputs} == set(read)
    for index in range(len(seen) - 1):  # transformers normalises the last one
        cosine = torch.cosine_similarity(states[index], states[index + 1], dim=-1).double()
        assert seen[index].cosine == pytest.approx(float(cosine.mean()), abs=1e-5)
        assert seen[index].angle == pytest.approx(float(cosine.clamp(-1, 1).arccos().mean() / math.pi), abs=1e-4)
    for (index, kind), found in read.items():
        torch.testing.assert_close(seen[index].inputs[kind], found, rtol=1e-4, atol=1e-6)


def test_statistics_of_a_run_stand_in_its_ranking_order(tiny_run):
    session = Session(Run(tiny_run / "run"), "cpu")
    found = PeerStatistics.of_run(session.run, session.evaluator(), 7, seed=3)
    assert (found.meter.limit, found.seed) == (7, 3)
    for layer, truth in zip(found.moments, calibrate(session.permuted, found.sequences), strict=True):
        for kind in KINDS:
            torch.testing.assert_close(layer.of(kind).mean, truth.of(kind).mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.of(kind).variance, truth.of(kind).variance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_the_differentiable_model_is_the_evaluators(source):
    found = observed(source)
    policy = allocated("uniform", found, 0.3)
    levels = found.grid.encode([policy])[0].tolist()
    losses = masked_losses(found.decoder, found.grid, levels, found.sequences)
    truth = Evaluator(found.decoder, found.grid, found.sequences).log_perplexity(policy)
    assert float(losses.double().mean()) == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_gradient_agreement_is_one_per_projection_for_the_dense_model(source):
    found = observed(source)
    agreement = _Agreement(found, RatioBudget(found.grid, 0.3))
    dense = agreement(found.grid.dense())
    assert dense == pytest.approx({"llama": 28, "phi3": 16, "olmo2": 28, "irregular": 3 * 4 + 3 * 3}[source], rel=1e-4)
    assert agreement(allocated("uniform", found, 0.3)) < 0.9 * dense


def test_what_is_no_method_is_refused():
    with pytest.raises(InputError, match="evopress"):
        peer_named("gradient-descent")

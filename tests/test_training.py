"""Training the predictor on a made-up function: it learns what there is to learn and knows how well."""

import pytest
import torch
from factories import synthetic_log_perplexity
from scipy.stats import spearmanr
from structures import llama_structure

from ppf.choose.candidates.sampling import random_levels, random_ratios
from ppf.choose.predictor import Predictor, ensemble, make_predictor, one_hot
from ppf.choose.predictor.mlp import MLP
from ppf.choose.predictor.training import fit_predictor
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = Grid(llama_structure(6, 48, 3, 2, 8, 128), 16)
RATIOS = (0.2, 0.35, 0.5)


def data(count: int, seed: int, ratio: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ratios = random_ratios(count, generator) if ratio is None else torch.full((count,), ratio)
    levels = random_levels(GRID, ratios, generator)
    return levels, synthetic_log_perplexity(GRID, levels)


def new(kind: str) -> Predictor:
    return MLP(GRID, hidden=64) if kind == "mlp" else make_predictor(kind, GRID)


def both(function):
    """The kinds that people use; the third one is an ensemble as the second is."""
    return pytest.mark.parametrize("kind", ["gp", "mlp"])(function)


@pytest.fixture(scope="module", params=["gp", "mlp"])
def fitted(request) -> Predictor:
    predictor = new(request.param)
    fit_predictor(predictor, *data(400, seed=0), seed=0, steps=300)
    return predictor


@pytest.mark.parametrize("ratio", RATIOS)
def test_unseen_policies_of_one_ratio_are_ranked(fitted, ratio):
    levels, truth = data(200, seed=1, ratio=ratio)
    assert spearmanr(fitted(levels).mean, truth).statistic > 0.9


def test_it_is_more_than_additive(fitted):
    """The best additive model of the same code, by least squares, errs more on unseen policies."""
    (levels, values), (unseen, truth) = data(400, seed=0), data(300, seed=2)

    def code(levels):
        bits = new("mlp").encode(one_hot(levels, GRID))
        return torch.cat((bits, torch.ones(len(bits), 1)), dim=1)

    additive = code(unseen) @ torch.linalg.lstsq(code(levels), values[:, None], driver="gelsd").solution
    error = (additive.squeeze(1) - truth).square().mean()
    assert (fitted(unseen).mean - truth).square().mean() < 0.7 * error


@both
def test_shuffled_measurements_teach_nothing(kind):
    levels, values = data(400, seed=0)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(3))
    predictor = new(kind)
    fit_predictor(predictor, levels, values[order], seed=0, steps=100)
    for ratio in RATIOS:
        unseen, truth = data(200, seed=1, ratio=ratio)
        assert abs(spearmanr(predictor(unseen).mean, truth).statistic) < 0.6


def test_two_standard_deviations_hold_most_unseen_policies(fitted):
    levels, truth = data(600, seed=4)
    found = fitted(levels)
    inside = ((found.mean - truth).abs() <= 1.64 * found.std).float().mean()  # a 90 % interval
    assert 0.80 <= inside <= 0.99


@both
def test_uncertainty_grows_away_from_the_data(kind):
    levels, values = data(400, seed=0)
    mild = GRID.kept(levels) > 0.6 * GRID.structure.decoder_parameters
    predictor = new(kind)
    fit_predictor(predictor, levels[mild], values[mild], seed=0, steps=150)
    spread = predictor(levels).std
    assert spread[~mild].mean() > 1.5 * spread[mild].mean()


@both
def test_the_same_seed_gives_the_same_weights(kind):
    levels, values = data(450, seed=0)

    def fit(seed: int) -> dict[str, torch.Tensor]:
        torch.randn(3)  # the global generator must not matter
        predictor = new(kind)
        # More rows than the likelihood looks at in one step, so that the seed chooses them.
        fit_predictor(predictor, levels, values, seed=seed, steps=20)
        return predictor.state_dict()

    first, second, other = fit(0), fit(0), fit(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first if name != "seed")


@both
def test_refitting_goes_on_from_what_was_learnt(kind):
    levels, values = data(200, seed=0)
    predictor = new(kind)
    fit_predictor(predictor, levels[:100], values[:100], seed=0, steps=150)
    frozen = {name: predictor.get_buffer(name).clone() for name in ("offset", "target_mean", "target_std")}
    unseen, truth = data(200, seed=5)
    before = (predictor(unseen).mean - truth).square().mean()
    fit_predictor(predictor, levels, values, seed=0, steps=80, fresh=False)
    assert all(torch.equal(predictor.get_buffer(name), value) for name, value in frozen.items())
    assert (predictor(unseen).mean - truth).square().mean() < before


@pytest.mark.parametrize("rows", [24, 25, 101])
def test_every_row_is_hidden_from_two_members(rows):
    held_out = ensemble._folds(rows, 8, seed=0)
    assert (held_out.sum(0) == 2).all() and held_out.sum(1).min() >= rows // 4


@both
def test_equal_measurements_are_no_trouble(kind):
    levels, values = data(40, seed=0)
    predictor = new(kind)
    fit_predictor(predictor, levels, torch.full_like(values, 3.0), seed=0, steps=20)
    found = predictor(levels)
    assert found.mean.isfinite().all() and found.std.isfinite().all()
    torch.testing.assert_close(found.mean, torch.full_like(values, 3.0), rtol=0.01, atol=0.01)


def test_a_gaussian_process_remembers_what_it_saw_and_learns_from_few():
    """Measured policies are certain; eighty measurements rank unseen ones better than the networks do."""
    (levels, values), (unseen, truth) = data(80, seed=0), data(300, seed=1, ratio=0.35)
    ranks = {}
    for kind in ("gp", "mlp"):
        predictor = new(kind)
        fit_predictor(predictor, levels, values, seed=0, steps=400)
        ranks[kind] = spearmanr(predictor(unseen).mean, truth).statistic
        if kind == "gp":
            seen = predictor(levels)
            assert (seen.mean - values).abs().max() < 0.02 and seen.std.max() < 0.3 * predictor(unseen).std.mean()
    assert ranks["gp"] > ranks["mlp"] + 0.02


def test_members_spread_as_the_uncertainty_says():
    predictor = new("gp")
    fit_predictor(predictor, *data(150, seed=0), seed=0, steps=200)
    unseen, _ = data(300, seed=1)
    ratio = predictor.members_at(unseen).std(0) / predictor(unseen).std
    assert 0.7 < ratio.median() < 1.3

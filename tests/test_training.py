"""Training the predictor on a made-up function: it learns what there is to learn and knows how well."""

import pytest
import torch
from factories import synthetic_log_perplexity
from scipy.stats import spearmanr

from ppf.grid import Grid
from ppf.predictor import Predictor, ensemble, one_hot
from ppf.predictor.mlp import MLP
from ppf.sampling import random_levels, random_ratios
from ppf.structure import Structure
from ppf.training import fit_predictor

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = Grid(Structure(6, 48, 3, 2, 8, 128), 16)
RATIOS = (0.2, 0.35, 0.5)


def data(count: int, seed: int, ratio: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ratios = random_ratios(count, generator) if ratio is None else torch.full((count,), ratio)
    levels = random_levels(GRID, ratios, generator)
    return levels, synthetic_log_perplexity(GRID, levels)


@pytest.fixture(scope="module")
def fitted() -> Predictor:
    predictor = MLP(GRID, hidden=64)
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
        bits = fitted.encode(one_hot(levels, GRID))
        return torch.cat((bits, torch.ones(len(bits), 1)), dim=1)

    additive = code(unseen) @ torch.linalg.lstsq(code(levels), values[:, None], driver="gelsd").solution
    error = (additive.squeeze(1) - truth).square().mean()
    assert (fitted(unseen).mean - truth).square().mean() < 0.7 * error


def test_shuffled_measurements_teach_nothing():
    levels, values = data(400, seed=0)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(3))
    predictor = MLP(GRID, hidden=64)
    fit_predictor(predictor, levels, values[order], seed=0, steps=100)
    for ratio in RATIOS:
        unseen, truth = data(200, seed=1, ratio=ratio)
        assert abs(spearmanr(predictor(unseen).mean, truth).statistic) < 0.6


def test_two_standard_deviations_hold_most_unseen_policies(fitted):
    levels, truth = data(600, seed=4)
    found = fitted(levels)
    inside = ((found.mean - truth).abs() <= 1.64 * found.std).float().mean()  # a 90 % interval
    assert 0.80 <= inside <= 0.99


def test_uncertainty_grows_away_from_the_data():
    levels, values = data(400, seed=0)
    mild = GRID.kept(levels) > 0.6 * GRID.structure.decoder_parameters
    predictor = MLP(GRID, hidden=64)
    fit_predictor(predictor, levels[mild], values[mild], seed=0, steps=150)
    spread = predictor(levels).std
    assert spread[~mild].mean() > 1.5 * spread[mild].mean()


def test_the_same_seed_gives_the_same_weights():
    levels, values = data(60, seed=0)

    def fit(seed: int) -> dict[str, torch.Tensor]:
        torch.randn(3)  # the global generator must not matter
        predictor = MLP(GRID, hidden=16)
        fit_predictor(predictor, levels, values, seed=seed, steps=20)
        return predictor.state_dict()

    first, second, other = fit(0), fit(0), fit(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["additive"], other["additive"])


def test_refitting_goes_on_from_the_weights_there_are():
    levels, values = data(200, seed=0)
    predictor = MLP(GRID, hidden=32)
    fit_predictor(predictor, levels[:100], values[:100], seed=0, steps=150)
    frozen = {name: predictor.get_buffer(name).clone() for name in ("center", "offset", "target_mean", "target_std")}
    unseen, truth = data(200, seed=5)
    before = (predictor(unseen).mean - truth).square().mean()
    fit_predictor(predictor, levels, values, seed=0, steps=80, fresh=False)
    assert all(torch.equal(predictor.get_buffer(name), value) for name, value in frozen.items())
    assert (predictor(unseen).mean - truth).square().mean() < before


@pytest.mark.parametrize("rows", [24, 25, 101])
def test_every_row_is_hidden_from_two_members(rows):
    held_out = ensemble._folds(rows, 8, seed=0)
    assert (held_out.sum(0) == 2).all() and held_out.sum(1).min() >= rows // 4


def test_equal_measurements_are_no_trouble():
    levels, values = data(40, seed=0)
    predictor = MLP(GRID, hidden=16)
    fit_predictor(predictor, levels, torch.full_like(values, 3.0), seed=0, steps=20)
    found = predictor(levels)
    assert found.mean.isfinite().all() and found.std.isfinite().all()
    torch.testing.assert_close(found.mean, torch.full_like(values, 3.0), rtol=0.01, atol=0.01)

"""The Gaussian process: a kernel that is one, a posterior that is the textbook's, parameters that the data choose."""

import pytest
import torch
from factories import synthetic_log_perplexity
from structures import irregular_structure, llama_structure

from ppf.choose.candidates.sampling import random_levels, random_ratios
from ppf.choose.predictor import gaussian, one_hot
from ppf.choose.predictor.gaussian import GaussianProcess
from ppf.choose.predictor.kernel import PolicyKernel
from ppf.choose.predictor.likelihood import _surprise, maximise_likelihood, noise_variance, noisy
from ppf.choose.predictor.posterior import Posterior, Waves
from ppf.choose.predictor.spread import Spread
from ppf.choose.predictor.training import fit_predictor
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = Grid(llama_structure(4, 48, 3, 2, 8, 64), 16)  # 4 levels of attention, 5 of the FFN
LAYERS = GRID.structure.layers
UNEVEN = Grid(irregular_structure(), 16)  # layers of their own widths; some lack a sub-layer or both


def drawn(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    levels = random_levels(GRID, random_ratios(count, generator), generator).unique(dim=0)
    return levels, synthetic_log_perplexity(GRID, levels).double()


def standardised(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean()) / values.std()


@pytest.fixture
def kernel() -> PolicyKernel:
    """A kernel with parameters that are all different."""
    kernel = PolicyKernel(GRID)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return kernel.requires_grad_(False)


def test_covariances_are_symmetric_and_positive(kernel):
    points = kernel.at(drawn(80)[0])
    gram = kernel(points, points)
    torch.testing.assert_close(gram, gram.T)
    torch.testing.assert_close(gram.diagonal(), kernel.variance(points), rtol=1e-6, atol=1e-6)
    assert torch.linalg.eigvalsh(gram).min() > 0  # no policy twice


def test_definite_policies_are_the_corners_of_relaxed_ones(kernel):
    levels, _ = drawn(30)
    tables = kernel.tables()
    for definite, relaxed in zip(kernel.at(levels), kernel.embed(one_hot(levels, GRID).double(), tables), strict=True):
        torch.testing.assert_close(definite, relaxed)


def test_strain_reaches_downwards_only(kernel):
    """What a sub-layer loses strains itself and what comes after it; of one layer, attention comes first."""
    dense = torch.tensor([GRID.maximum])
    order = [sublayer for layer in range(LAYERS) for sublayer in (layer, LAYERS + layer)]
    for place, sublayer in enumerate(order):
        less = dense.clone()
        less[0, sublayer] -= 1
        strain = kernel.at(less).matern[0, 2 * GRID.sublayers :]
        assert (strain[:place] == 0).all() and (strain[place:] > 0).all()
    assert (kernel.at(dense).linear == 0).all()


def test_absence_is_told_apart_from_little(kernel):
    levels = torch.tensor([GRID.maximum]).repeat(3, 1)
    levels[1, 1], levels[2, 1] = 1, 0
    absent = kernel.at(levels).matern[:, GRID.sublayers : 2 * GRID.sublayers]
    assert (absent[:2] == 0).all() and absent[2].nonzero().flatten().tolist() == [1]


def test_sublayers_that_the_model_lacks_say_nothing():
    """They are at the same place in every policy, whatever their parameters are."""
    generator = torch.Generator().manual_seed(0)
    levels = random_levels(UNEVEN, random_ratios(20, generator), generator)
    kernel, absent = PolicyKernel(UNEVEN).requires_grad_(False), torch.tensor(UNEVEN.maximum) == 0
    before = kernel(kernel.at(levels), kernel.at(levels))
    for name in ("gap", "own_gap", "scale", "weight", "absence", "reach", "rough"):
        getattr(kernel, name)[absent] += 1
    assert absent.sum() == 4
    torch.testing.assert_close(kernel(kernel.at(levels), kernel.at(levels)), before)
    kernel.scale[~absent] += 1  # negative control
    assert (kernel(kernel.at(levels), kernel.at(levels)) - before).abs().max() > 1e-3


def test_lines_start_with_the_shape_of_the_error_energies():
    energies = torch.zeros(GRID.sublayers, GRID.levels)
    energies[:LAYERS, :4] = torch.tensor([1.0, 0.5, 0.2, 0.0])
    energies[LAYERS:] = torch.tensor([1.0, 0.6, 0.3, 0.1, 0.0])
    place = PolicyKernel(GRID, energies).tables()[1].detach()
    for sublayer in (0, LAYERS):
        top = GRID.maximum[sublayer]
        shape = place[sublayer, : top + 1] / place[sublayer, top]
        torch.testing.assert_close(shape.float(), 1 - energies[sublayer, : top + 1], rtol=1e-4, atol=1e-4)
    even = PolicyKernel(GRID).tables()[1].detach()
    torch.testing.assert_close(even[0, :4].diff(), even[0, 1].expand(3))


def test_energies_are_saved(tmp_path):
    energies = torch.rand(GRID.sublayers, GRID.levels).sort(dim=1, descending=True).values
    told, again = GaussianProcess(GRID, energies), GaussianProcess(GRID)
    again.load_state_dict(told.state_dict())
    assert torch.equal(again.kernel.start, told.kernel.start)


@pytest.mark.parametrize("grid", [GRID, UNEVEN], ids=["equal layers", "layers that differ"])
def test_the_prior_prefers_what_it_starts_from(grid):
    kernel = PolicyKernel(grid)
    assert kernel.penalty() == 0
    for name, parameter in kernel.named_parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 1
        assert (kernel.penalty() > 0) == ("amplitude" not in name)
        kernel.reset()


def test_the_posterior_is_the_textbooks(kernel):
    """Against the formulas with an explicit inverse (Rasmussen & Williams, eq. 2.25 and 2.26)."""
    (levels, values), (unseen, _) = drawn(90), drawn(40, seed=1)
    targets, log_noise = standardised(values), torch.tensor(-4.0, dtype=torch.float64)
    mean, variance, _ = Posterior(kernel, log_noise, levels, targets).at(unseen)
    data, points = kernel.at(levels), kernel.at(unseen)
    inverse = torch.linalg.inv(noisy(kernel(data, data), log_noise))
    cross = kernel(points, data)
    torch.testing.assert_close(mean, cross @ inverse @ targets)
    expected = kernel.variance(points) - (cross @ inverse * cross).sum(-1)
    torch.testing.assert_close(variance, expected, rtol=0.02, atol=1e-5)  # it is computed in fp32


def test_rows_left_out_at_once_are_rows_left_out_one_by_one(kernel):
    levels, values = drawn(40)
    targets, log_noise = standardised(values), torch.tensor(-3.0, dtype=torch.float64)
    found, std = Posterior(kernel, log_noise, levels, targets).left_out()
    for row in range(0, 40, 7):
        others = torch.arange(len(levels)) != row
        mean, variance, _ = Posterior(kernel, log_noise, levels[others], targets[others]).at(levels[[row]])
        expected_std = (variance + noise_variance(log_noise)).sqrt()
        torch.testing.assert_close(std[[row]], expected_std, rtol=0.02, atol=1e-3)
        expected = (targets[row] - mean) / expected_std
        torch.testing.assert_close(found[[row]], expected, rtol=0.02, atol=1e-3)


def test_likelihood_rises_and_tells_noise_from_signal():
    levels, values = drawn(200)
    generator = torch.Generator().manual_seed(5)
    clean, noise = standardised(values), torch.randn(len(values), generator=generator, dtype=torch.float64)
    found = []
    for targets in (clean, clean + 0.2 * noise):
        kernel, log_noise = PolicyKernel(GRID), torch.nn.Parameter(torch.tensor(-4.6, dtype=torch.float64))
        before = float(_surprise(kernel, log_noise, levels, targets).detach())
        maximise_likelihood(kernel, log_noise, levels, targets, seed=0, steps=60)
        assert float(_surprise(kernel, log_noise, levels, targets).detach()) < before - 20
        # What is rough and what is noise cannot be told apart where no policy stands twice.
        found.append(float(noise_variance(log_noise).detach() + kernel.rough_amplitude.detach().exp()))
    assert found[1] > 3 * found[0]


def test_waves_have_variance_one_and_are_smooth():
    waves = Waves(8, 10, seed=0, device=torch.device("cpu"))
    points = torch.randn(4000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = waves(points)
    assert values.shape == (4000, 8) and abs(values.mean()) < 0.05 and 0.9 < values.std() < 1.1
    assert (waves(points + 1e-4) - values).abs().mean() < 0.02


def test_few_measurements_make_no_false_certainty():
    levels, values = drawn(60)
    predictor = GaussianProcess(GRID)
    fit_predictor(predictor, levels, values, seed=0)
    unseen, truth = drawn(300, seed=9)
    found = predictor(unseen)
    inside = ((found.mean - truth).abs() <= 1.645 * found.std).float().mean()
    assert inside > 0.75 and predictor.spread.factors.min() >= 1


def test_more_rows_than_it_takes_are_thinned_out(monkeypatch):
    monkeypatch.setattr(gaussian, "_LARGEST", 50)
    levels, values = drawn(120)
    predictor = GaussianProcess(GRID)
    fit_predictor(predictor, levels, values, seed=0, steps=40)
    kept = {tuple(row) for row in predictor.levels.tolist()}
    assert len(kept) == 50 and kept < {tuple(row) for row in levels.tolist()}
    assert predictor(levels).mean.isfinite().all()


def test_the_uncertainty_of_a_near_policy_is_not_lost_in_rounding(kernel):
    """Next to the data the variance is a small difference of large numbers: fp64 throughout is the reference."""
    levels, targets = drawn(600, seed=3)
    near = levels[:100].clone()
    near[:, LAYERS + 1] = (near[:, LAYERS + 1] - 1).clamp_min(0)
    near = near[~(near[:, None] == levels).all(-1).any(1)]
    kernel.rough_amplitude.fill_(-12.0)  # a smooth function, certain near its data
    posterior = Posterior(kernel, torch.tensor(-9.0).double(), levels, standardised(targets))
    points = kernel.at(near)
    covariance = kernel(points, posterior.data)
    explained = (covariance * torch.linalg.solve(posterior.covariance, covariance.T).T).sum(1)
    expected = kernel.variance(points) - explained
    assert len(near) > 20 and expected.median() < 1e-2 * kernel.variance(points).median()
    torch.testing.assert_close(posterior.at(near)[1], expected, rtol=1e-4, atol=0)
    cancelled = kernel.variance(points) - posterior._explained(covariance.float())
    assert ((cancelled / expected - 1).abs() > 1e-3).any()  # the textbook's form in fp32


def trial(stds: tuple[float, ...], widths: tuple[float, ...], seed: int = 0):
    """400 errors at each standard deviation, ``width`` times as large as that says."""
    generator = torch.Generator().manual_seed(seed)
    std = torch.cat([torch.full((400,), value) for value in stds]).double()
    std = std * (1 + 0.05 * torch.rand(len(std), generator=generator, dtype=torch.float64))
    errors = torch.randn(len(std), generator=generator, dtype=torch.float64)
    return errors * torch.tensor(widths).repeat_interleave(400), std


def test_spread_widens_where_errors_ask_for_it():
    """Small deviations are right, large ones a third of the errors: 90 % of each lie within after it."""
    errors, std = trial((0.01, 0.03, 0.1), (1.0, 2.0, 3.0))
    spread = Spread()
    spread.fit((errors, std), (errors, std))
    inside = (errors.abs() <= 1.645 * spread(std)).double().view(3, 400).mean(1)
    assert ((inside > 0.85) & (inside < 0.95)).all()
    assert spread(std[:400]).max() < 1.3 and spread(std[800:]).min() > 2.5


def test_spread_listens_to_later_rows_except_about_the_most_uncertain():
    left_out = trial((0.01, 0.03, 0.1), (1.0, 1.0, 1.0))
    spread = Spread()
    spread.fit(trial((0.01, 0.03, 0.1), (2.0, 2.0, 2.0), seed=1), left_out)
    assert spread.factors[0] > 1.7 and spread.factors[1] > 1.7 and spread.factors[2] < 1.2


def test_spread_of_a_handful_holds_for_one_more():
    """Of few errors all count everywhere, and the quantile leaves room for the one that is not there yet."""
    few = (torch.arange(1, 15).double(), torch.full((14,), 0.1).double())
    spread = Spread()
    spread.fit(few, few)
    assert spread.factors.tolist() == pytest.approx([14 / 1.645] * 3)  # the largest of 14
    many = (torch.arange(1, 40).double(), torch.full((39,), 0.1).double())
    spread.fit(many, many)
    assert spread.factors.tolist() == pytest.approx([36 / 1.645] * 3)
    spread.fit((few[0][:8], few[1][:8]), (few[0][:8], few[1][:8]))
    assert spread.factors.min() >= 10  # eight errors do not know where nine tenths are


def test_intervals_of_few_measurements_hold():
    """Nine tenths of unseen random policies, from two dozen measurements."""
    inside = []
    for seed in range(3):
        levels, values = drawn(26, seed)
        predictor = GaussianProcess(GRID)
        fit_predictor(predictor, levels, values, seed=seed, steps=400)
        unseen, truth = drawn(200, seed + 50)
        found = predictor(unseen)
        inside.append(((found.mean - truth).abs() <= 1.645 * found.std).double().mean())
    assert torch.stack(inside).mean() > 0.8

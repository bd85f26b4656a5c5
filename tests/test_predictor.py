"""Predictors of every kind: relaxed and definite policies agree, gradients are right, saved is loaded."""

import pytest
import torch
from factories import synthetic_log_perplexity
from safetensors.torch import load_file, save_file
from structures import irregular_structure, llama_structure

from ppf.choose.candidates.sampling import random_levels, random_ratios
from ppf.choose.predictor import KINDS, CapturedPredictor, Predictor, make_predictor, one_hot
from ppf.choose.predictor.training import fit_predictor
from ppf.errors import InputError
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
GRIDS = {
    "equal layers": Grid(llama_structure(4, 48, 3, 2, 8, 64), 16),  # 4 levels of attention, 5 of the FFN
    "layers that differ": Grid(irregular_structure(), 16),  # some lack a sub-layer or both
}
STEPS = {"gp": 160, "mlp": 80, "cnn": 40}


def drawn(grid: Grid, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    levels = random_levels(grid, random_ratios(count, generator), generator)
    return levels, synthetic_log_perplexity(grid, levels)


@pytest.fixture(scope="module", params=[(kind, name) for kind in sorted(KINDS) for name in GRIDS], ids="-".join)
def fitted(request) -> tuple[Predictor, torch.Tensor]:
    kind, name = request.param
    levels, values = drawn(GRIDS[name], 120)
    predictor = make_predictor(kind, GRIDS[name])
    fit_predictor(predictor, levels, values, seed=0, steps=STEPS[kind])
    return predictor, levels


def copy_of(predictor: Predictor) -> Predictor:
    again = make_predictor(predictor.kind, predictor.grid)
    again.load_state_dict(predictor.state_dict())
    return again


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_thermometer_code(kind, name):
    grid = GRIDS[name]
    levels, _ = drawn(grid, 120)
    code = make_predictor(kind, grid).encode(one_hot(levels, grid))
    assert set(code.unique().tolist()) == {0.0, 1.0}
    layers, tops = grid.structure.layers, grid.maximum
    if kind == "cnn":  # an image: as many columns as the widest layer has levels
        tops = (max(tops[:layers]),) * layers + (max(tops[layers:]),) * layers
    rows = [[[float(level >= bit) for bit in range(1, top + 1)] for level, top in zip(row, tops, strict=True)]
            for row in levels.tolist()]  # fmt: skip
    if kind == "mlp":
        assert code.tolist() == [sum(row, []) for row in rows]
    else:
        assert code.tolist() == [[row[i] + row[layers + i] for i in range(layers)] for row in rows]


def test_definite_policies_are_the_corners_of_relaxed_ones(fitted):
    predictor, levels = fitted
    corner = predictor.relaxed(one_hot(levels, predictor.grid))
    torch.testing.assert_close(corner, predictor.members_at(levels), rtol=1e-6, atol=1e-6)
    assert corner.shape == (8, 120)
    mean = predictor(levels).mean
    assert (mean >= corner.min(0).values - 1e-6).all() and (mean <= corner.max(0).values + 1e-6).all()


def test_gradients_in_relaxed_policies_equal_finite_differences(fitted):
    """A step small enough for the function's curvature and large enough for members in fp32."""
    predictor = copy_of(fitted[0]).double().requires_grad_(False)
    grid = predictor.grid
    probabilities = torch.randn(2, grid.sublayers, grid.levels, dtype=torch.float64).softmax(-1).requires_grad_()
    (gradient,) = torch.autograd.grad(predictor.relaxed(probabilities).mean(0).sum(), probabilities)
    there = torch.tensor(grid.maximum) > 0
    assert gradient.abs().amax((0, 2))[there].min() > 1e-4  # every sub-layer matters
    direction = torch.randn(probabilities.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        up, down = (predictor.relaxed(probabilities + sign * 1e-3 * direction).mean(0).sum() for sign in (1, -1))
    assert float((up - down) / 2e-3) == pytest.approx(float((gradient * direction).sum()), rel=0.02)


def test_nats_round_trip(fitted):
    predictor, levels = fitted
    values = synthetic_log_perplexity(predictor.grid, levels)
    torch.testing.assert_close(predictor.to_nats(predictor.from_nats(values)).float(), values)


def test_saved_and_loaded_predicts_the_same(fitted, tmp_path):
    predictor, levels = fitted
    save_file(predictor.state_dict(), tmp_path / "predictor.safetensors")
    again = make_predictor(predictor.kind, predictor.grid)
    again.load_state_dict(load_file(tmp_path / "predictor.safetensors"))
    after, expected = again(levels), predictor(levels)
    assert torch.equal(after.mean, expected.mean) and torch.equal(after.std, expected.std)
    assert torch.equal(again.members_at(levels), predictor.members_at(levels))


def test_predictions_are_made_row_by_row(fitted):
    predictor, levels = fitted
    together = predictor(levels)
    alone = torch.cat([predictor(levels[i : i + 1]).mean for i in range(10)])
    torch.testing.assert_close(together.mean[:10], alone)
    assert (together.std > 0).all() and together.mean.isfinite().all()


def test_refitted_it_predicts_from_the_new_data(fitted):
    """Nothing of the old data stays behind, such as a posterior that was worked out before."""
    predictor, levels = copy_of(fitted[0]), fitted[1]
    before = predictor(levels).mean
    fit_predictor(predictor, levels, synthetic_log_perplexity(predictor.grid, levels) + 1, seed=0, steps=8)
    assert (predictor(levels).mean - before).mean() > 0.7


def test_unknown_kinds_are_refused():
    with pytest.raises(InputError, match=r"predictor = forest.*cnn.*gp.*mlp"):
        make_predictor("forest", GRIDS["equal layers"])


@pytest.mark.gpu
def test_cuda_predicts_what_the_cpu_does(fitted):
    predictor, levels = fitted
    found, expected = copy_of(predictor).cuda()(levels), predictor(levels)
    torch.testing.assert_close(found.mean.cpu(), expected.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.std.cpu(), expected.std, rtol=0.05, atol=1e-4)


@pytest.mark.gpu
def test_a_captured_predictor_says_the_same(fitted):
    predictor, levels = copy_of(fitted[0]).cuda(), fitted[1][:40].cuda()
    captured = CapturedPredictor(predictor)
    for row in levels.split(1):
        found, expected = captured(row), predictor(row)
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.std, expected.std, rtol=1e-3, atol=1e-6)


def test_only_a_predictor_on_a_gpu_is_captured(fitted):
    with pytest.raises(InputError, match="predictor = cpu"):
        CapturedPredictor(fitted[0])

"""The predictor: relaxed and definite policies agree, gradients are right, saved is loaded."""

import pytest
import torch
from factories import synthetic_log_perplexity
from safetensors.torch import load_file, save_file

from ppf.grid import Grid
from ppf.predictor import one_hot
from ppf.predictor.mlp import MLP
from ppf.sampling import random_levels, random_ratios
from ppf.structure import Structure
from ppf.training import fit_predictor

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = Grid(Structure(4, 48, 3, 2, 8, 64), 16)  # 4 levels of attention, 5 of the FFN


@pytest.fixture(scope="module")
def fitted() -> tuple[MLP, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    levels = random_levels(GRID, random_ratios(120, generator), generator)
    predictor = MLP(GRID, hidden=32)
    fit_predictor(predictor, levels, synthetic_log_perplexity(GRID, levels), seed=0, steps=80)
    return predictor, levels


def test_thermometer_code(fitted):
    predictor, levels = fitted
    code = predictor.encode(one_hot(levels, GRID))
    assert code.shape == (120, sum(GRID.maximum)) and set(code.unique().tolist()) == {0.0, 1.0}
    expected = [[float(level >= bit) for level, top in zip(row, GRID.maximum, strict=True) for bit in range(1, top + 1)]
                for row in levels.tolist()]  # fmt: skip
    assert code.tolist() == expected


def test_definite_policies_are_the_corners_of_relaxed_ones(fitted):
    predictor, levels = fitted
    corner = predictor.relaxed(one_hot(levels, GRID))
    assert torch.equal(corner, predictor.members_at(levels)) and corner.shape == (8, 120)
    mean = predictor(levels).mean
    assert (mean >= corner.min(0).values).all() and (mean <= corner.max(0).values).all()


def test_gradients_in_relaxed_policies_equal_finite_differences(fitted):
    predictor = MLP(GRID, hidden=32)
    predictor.load_state_dict(fitted[0].state_dict())
    predictor.double().requires_grad_(False)
    logits = torch.randn(2, GRID.sublayers, GRID.levels, dtype=torch.float64)
    probabilities = logits.softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: predictor.relaxed(p).mean(0), probabilities, eps=1e-6, atol=1e-5)
    (gradient,) = torch.autograd.grad(predictor.relaxed(probabilities).sum(), probabilities)
    assert gradient.abs().amax((0, 2)).min() > 1e-4  # every sub-layer matters


def test_nats_round_trip(fitted):
    predictor, levels = fitted
    values = synthetic_log_perplexity(GRID, levels)
    torch.testing.assert_close(predictor.to_nats(predictor.from_nats(values)), values)


def test_saved_and_loaded_predicts_the_same(fitted, tmp_path):
    predictor, levels = fitted
    save_file(predictor.state_dict(), tmp_path / "predictor.safetensors")
    again = MLP(GRID, hidden=32)
    before = again(levels)
    again.load_state_dict(load_file(tmp_path / "predictor.safetensors"))
    after, expected = again(levels), predictor(levels)
    assert torch.equal(after.mean, expected.mean) and torch.equal(after.std, expected.std)
    assert not torch.equal(before.mean, expected.mean)


def test_predictions_are_made_row_by_row(fitted):
    predictor, levels = fitted
    together = predictor(levels)
    alone = torch.cat([predictor(levels[i : i + 1]).mean for i in range(10)])
    torch.testing.assert_close(together.mean[:10], alone)
    assert (together.std > 0).all() and together.mean.isfinite().all()


@pytest.mark.gpu
def test_cuda_predicts_what_the_cpu_does(fitted):
    predictor, levels = fitted
    on_gpu = MLP(GRID, hidden=32)
    on_gpu.load_state_dict(predictor.state_dict())
    found = on_gpu.cuda()(levels)
    torch.testing.assert_close(found.mean.cpu(), predictor(levels).mean, rtol=1e-4, atol=1e-4)

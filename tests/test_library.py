"""The refits of every level against textbook least squares on the actual activations."""

import pytest
import torch
from factories import dense_weights, random_ranking, tokens
from safetensors.torch import load_file

from ppf.errors import PPFError
from ppf.fitting.calibration import LayerStatistics, Statistics, calibrate
from ppf.fitting.library import (
    DAMPING,
    Library,
    fits_on_device,
    library_bytes,
    load_refits,
    refit,
    refit_layer,
    save_refits,
)
from ppf.model.grid import Grid
from ppf.model.structure import Structure
from ppf.model.weights import permute_layer

pytestmark = pytest.mark.usefixtures("one_thread")
N, TOKENS, HIDDEN = 24, 300, 10
WIDTHS = [0, 1, 5, 12, 23, 24]


@pytest.fixture
def problem():
    """W [hidden, n] in ranking order, correlated x [tokens, n] in checkpoint order, and the order; all fp64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = draw(TOKENS, 6) @ draw(6, N) + 0.5 * draw(TOKENS, N) + 0.3
    order = torch.randperm(N, generator=generator)
    return draw(HIDDEN, N), x, order


def every(found) -> list[torch.Tensor]:
    """The solutions of all levels."""
    return [found.weight(level) for level in range(len(found.widths))]


def statistics_of(x: torch.Tensor) -> Statistics:
    return Statistics(x.T @ x / len(x), x.mean(0), x.var(0, correction=0))


def energy(x: torch.Tensor, weight: torch.Tensor, prefix: torch.Tensor, damping: float = 0.0) -> float:
    """(E‖(Ŵ − W)x‖² + λ‖Ŵ‖²) / E‖Wx‖² over the tokens of x, in ranking order."""
    out = x @ weight.T
    penalty = damping * x.square().mean() * prefix.square().sum() * len(x)
    return float(((x[:, : prefix.shape[1]] @ prefix.T - out).square().sum() + penalty) / out.square().sum())


def test_refits_are_the_least_squares_solutions(problem):
    weight, x, order = problem
    found = refit(weight, statistics_of(x), order, WIDTHS, damping=1e-12)
    ordered = x[:, order]
    for width, ours in zip(WIDTHS, every(found), strict=True):
        expected = torch.linalg.lstsq(ordered[:, :width], ordered @ weight.T).solution.T
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    # Negative control: another order's solution is another one.
    other = refit(weight, statistics_of(x), order.flip(0), [12], damping=1e-12).weight(0)
    assert (other - found.weight(WIDTHS.index(12))).abs().max() > 0.1


def test_damped_refits_solve_the_damped_normal_equations(problem):
    weight, x, order = problem
    found = refit(weight, statistics_of(x), order, WIDTHS[:-1], damping=0.05)
    ordered = x[:, order]
    gram = ordered.T @ ordered / TOKENS
    damping = 0.05 * gram.diagonal().mean()
    for width, ours in zip(WIDTHS[:-1], every(found), strict=True):
        # Damping stands on the left side only: the target is the dense output itself.
        left = gram[:width, :width] + damping * torch.eye(width, dtype=torch.float64)
        expected = torch.linalg.solve(left, (weight @ gram)[:, :width].T).T
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_error_energy_is_that_of_the_activations(problem):
    weight, x, order = problem
    found = refit(weight, statistics_of(x), order, WIDTHS)
    for ours, claimed in list(zip(every(found), found.error.tolist(), strict=True))[:-1]:
        assert claimed == pytest.approx(energy(x[:, order], weight, ours, DAMPING), rel=1e-9, abs=1e-12)
        # Negative control: without the penalty it is another number, and a lower one.
        assert len(ours.T) == 0 or claimed > energy(x[:, order], weight, ours) * (1 + 1e-6)
    assert found.error.dtype == torch.float64 and found.error[0] == pytest.approx(1) and found.error[-1] == 0


def test_error_falls_with_the_level_and_beats_masking(problem):
    weight, x, order = problem
    widths = list(range(N + 1))
    found = refit(weight, statistics_of(x), order, widths)
    assert (found.error.diff() < 0).all()
    masked = torch.tensor([energy(x[:, order], weight, weight[:, :w]) for w in widths[1:-1]])
    assert (found.error[1:-1] < masked).all() and (found.error[2:-1] < 0.7 * masked[1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_width_is_bit_identical_and_dtypes_stay(problem, dtype):
    weight, x, order = problem
    found = refit(weight.to(dtype), statistics_of(x.float()), order, WIDTHS)
    assert torch.equal(every(found)[-1], weight.to(dtype))
    assert [tuple(w.shape) for w in every(found)] == [(HIDDEN, width) for width in WIDTHS]
    assert {w.dtype for w in every(found)} == {dtype}
    for ours, claimed in zip(every(found), found.error.tolist(), strict=True):
        if ours.shape[1] < N:
            exact = x[:, order].float().double()
            real = energy(exact, weight.to(dtype).double(), ours.double(), DAMPING)
            assert real == pytest.approx(claimed, rel=0.01, abs=2e-4)


def test_dead_channels_are_no_trouble(problem):
    weight, x, order = problem
    x = x.clone()
    x[:, order[3]] = 0
    found = refit(weight, statistics_of(x), order, WIDTHS)
    assert all(w.isfinite().all() for w in every(found)) and found.error.isfinite().all()
    nothing = refit(weight, statistics_of(torch.zeros_like(x)), order, WIDTHS)
    assert all(w.isfinite().all() for w in every(nothing)) and nothing.error.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (5, 17)])
def test_grams_that_are_not_finite_are_refused(problem, value, place):
    weight, x, order = problem
    statistics = statistics_of(x)
    statistics.gram[place] = statistics.gram[place[::-1]] = value
    with pytest.raises(PPFError, match="NaN or Inf"):
        refit(weight, statistics, order, WIDTHS)


@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_layers_are_refitted_on_their_grid(heads, tmp_path):
    _, weights = dense_weights(heads)
    grid = Grid(weights.structure, 16)
    ranking = random_ranking(weights.structure)[1]
    layer = permute_layer(weights.layers[1], ranking, weights.structure)
    statistics: LayerStatistics = list(calibrate(weights, tokens(8, 40)))[1]
    attention, ffn = refit_layer(layer, statistics, ranking, grid)
    size = weights.structure.group_rows
    assert [w.shape[1] for w in every(attention)] == [size * level for level in range(weights.structure.kv_groups + 1)]
    assert [w.shape[1] for w in every(ffn)] == [0, 16, 32, 48, 64]
    assert (attention.error.diff() < 0).all() and (ffn.error.diff() < 0).all()
    save_refits(tmp_path / "layer.safetensors", attention, ffn)
    for old, new in zip(
        (attention, ffn), load_refits(load_file(tmp_path / "layer.safetensors"), layer, grid), strict=True
    ):
        assert torch.equal(old.error, new.error)
        assert all(torch.equal(a, b) for a, b in zip(every(old), every(new), strict=True))
    library = Library([attention, ffn]).to(torch.bfloat16)
    assert torch.equal(library.weight(1, 2), ffn.weight(2).bfloat16()) and library.error(0) is attention.error


def test_default_damping_hardly_costs_anything(problem):
    weight, x, order = problem
    exact, damped = (refit(weight, statistics_of(x), order, [12], damping=d).error[0] for d in (1e-12, DAMPING))
    assert exact < damped < 1.05 * exact


@pytest.fixture
def layer_refits():
    """Refits of o and down of one layer on a grid of four and five levels, with the layer and the grid."""
    _, weights = dense_weights("gqa")
    grid = Grid(weights.structure, 16)
    ranking = random_ranking(weights.structure)[1]
    layer = permute_layer(weights.layers[1], ranking, weights.structure)
    return refit_layer(layer, list(calibrate(weights, tokens(8, 40)))[1], ranking, grid), layer, grid


def test_library_keeps_what_fits_and_solves_the_rest_again(layer_refits):
    refits, *_ = layer_refits
    roomy, tight = Library(refits), Library(refits, cache_bytes=refits[1].weight(2).nbytes)
    assert roomy.weight(1, 2) is roomy.weight(1, 2)
    first = tight.weight(1, 2)
    assert tight.weight(1, 2) is first
    tight.weight(1, 3)  # pushes the other one out
    assert tight.weight(1, 2) is not first and torch.equal(tight.weight(1, 2), first)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_solutions_are_the_same_together_and_alone(layer_refits, dtype):
    """Bit for bit, or a checkpoint would not be what was evaluated."""
    refits, *_ = layer_refits
    roomy, tight = Library(refits, dtype), Library(refits, dtype, cache_bytes=1)
    for sublayer, refitted in enumerate(refits):
        stacked = roomy.levels(sublayer)
        for level, width in enumerate(refitted.widths):
            alone = refitted.weight(level).to(dtype or torch.float32)
            assert torch.equal(roomy.weight(sublayer, level), alone) and torch.equal(
                tight.weight(sublayer, level), alone
            )
            assert torch.equal(stacked[level, :, :width], alone) and not stacked[level, :, width:].any()


def test_factors_may_stay_in_their_file(tmp_path, layer_refits):
    refits, layer, grid = layer_refits
    save_refits(tmp_path / "layer.safetensors", *refits)
    tensors = load_file(tmp_path / "layer.safetensors")
    mapped = load_refits(tensors, layer, grid, on_device=False)
    assert mapped[1].half.data_ptr() == tensors["ffn.half"].data_ptr()
    assert all(
        torch.equal(a, b) for x, y in zip(refits, mapped, strict=True) for a, b in zip(every(x), every(y), strict=True)
    )


def test_factors_go_to_the_gpu_only_with_room_for_their_solutions(monkeypatch):
    grid = Grid(Structure(layers=32, hidden=4096, kv_groups=32, heads_per_group=1, head_dim=128, channels=11008), 688)
    sizes = [(11008, range(0, 11009, 688)), (4096, range(0, 4097, 128))]
    factors = 32 * sum(4 * n * (n + 4096) for n, _ in sizes)
    solutions = 32 * sum(2 * 4096 * sum(widths) for _, widths in sizes)
    assert library_bytes(grid) == factors and solutions / 1e9 == pytest.approx(42.2, abs=0.1)
    for free, fits in ((factors + solutions) / 0.85 * 1.001, True), ((factors + solutions) / 0.85 * 0.999, False):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free), 80 << 30))
        assert fits_on_device(grid, torch.bfloat16, torch.device("cuda")) is fits
    assert fits_on_device(grid, torch.bfloat16, torch.device("cpu"))  # mapped files, whatever is free


def test_library_bytes_are_those_on_disk(tmp_path, layer_refits):
    refits, _, grid = layer_refits
    save_refits(tmp_path / "layer", *refits)
    written = sum(tensor.nbytes for name, tensor in load_file(tmp_path / "layer").items() if "error" not in name)
    assert library_bytes(grid) == grid.structure.layers * written

"""The refits of every level against textbook least squares on the actual activations."""

import pytest
import torch
from factories import config_of, dense_weights, llama, random_ranking, tokens
from safetensors.torch import load_file
from structures import llama_structure

from ppf.errors import PPFError
from ppf.families import KINDS
from ppf.fast.permute import permuted
from ppf.fitting.calibration import Statistics, calibrate
from ppf.fitting.library import (
    DAMPING,
    Library,
    fits_on_device,
    library_bytes,
    load_refits,
    refit,
    refit_layer,
    save_refits,
    widths_of,
)
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy

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


def outputs_of(decoder: Decoder, index: int) -> dict[str, torch.Tensor]:
    return decoder.names(index).outputs(decoder.layers[index])


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


def test_grams_that_rounding_made_indefinite_are_damped_more(problem):
    """As fp32 sums are where a few inputs dwarf all others; tenfold, until it is enough."""
    weight, x, order = problem
    statistics = statistics_of(x)
    values, vectors = torch.linalg.eigh(statistics.gram)
    below = values[0] + 0.004 * statistics.gram.diagonal().mean()
    statistics.gram.sub_(below * vectors[:, :1] @ vectors[:, :1].T)
    assert torch.linalg.eigvalsh(statistics.gram)[0] < -0.003 * statistics.gram.diagonal().mean()
    found = refit(weight, statistics, order, WIDTHS)
    expected = refit(weight, statistics, order, WIDTHS, damping=10 * DAMPING)
    for ours, damped in zip(every(found), every(expected), strict=True):
        torch.testing.assert_close(ours, damped, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "heads"), [("llama", "mha"), ("llama", "gqa"), ("phi3", "gqa"), ("olmo2", "gqa")])
def test_layers_are_refitted_on_their_grid(family, heads, tmp_path):
    _, decoder = dense_weights(heads, family)
    grid, ranking = Grid(decoder.structure, 16), random_ranking(decoder.structure)
    outputs = outputs_of(permuted(decoder, ranking), 1)
    refits = refit_layer(outputs, list(calibrate(decoder, tokens(8, 40)))[1], ranking[1], grid, 1)
    attention = decoder.structure.attention[1]
    levels = range(0, attention.units + 1, attention.step)
    assert [w.shape[1] for w in every(refits["attention"])] == [attention.columns * units for units in levels]
    assert [w.shape[1] for w in every(refits["ffn"])] == [0, 16, 32, 48, 64]
    for kind, found in refits.items():
        assert (found.error.diff() < 0).all() and torch.equal(
            found.weight(grid.maximum[4 * KINDS.index(kind)]), outputs[kind]
        )
    save_refits(tmp_path / "layer.safetensors", refits)
    again = load_refits(load_file(tmp_path / "layer.safetensors"), outputs, grid, 1)
    assert list(again) == list(refits) == list(KINDS)
    for kind in KINDS:
        assert torch.equal(refits[kind].error, again[kind].error)
        assert all(torch.equal(a, b) for a, b in zip(every(refits[kind]), every(again[kind]), strict=True))
    library = Library([refits["attention"], refits["ffn"]]).to(torch.bfloat16)
    assert torch.equal(library.weight(1, 2), refits["ffn"].weight(2).bfloat16())
    assert library.error(0) is refits["attention"].error


def test_refits_reproduce_the_dense_output_best():
    """What a refitted output projection gives is nearer to what the dense one does than the dense one cut."""
    _, decoder = dense_weights("gqa", "qwen3")
    grid, ranking = Grid(decoder.structure, 16), random_ranking(decoder.structure)
    statistics = list(calibrate(decoder, tokens(8, 40)))[2]
    ranked = permuted(decoder, ranking)
    for kind, found in refit_layer(outputs_of(ranked, 2), statistics, ranking[2], grid, 2).items():
        order = ranking[2].of(kind)
        columns = decoder.structure.of(kind)[2].columns
        channels = (order[:, None] * columns + torch.arange(columns)).flatten()
        gram = statistics.of(kind).gram[channels][:, channels].double()
        dense = ranked.output(2, kind).double()

        def off(weight, gram=gram, dense=dense):
            gap = torch.nn.functional.pad(weight.double(), (0, dense.shape[1] - weight.shape[1])) - dense
            return float(((gap @ gram) * gap).sum())

        for level in range(1, len(found.widths) - 1):
            width = found.widths[level]
            assert off(found.weight(level)) < 0.98 * off(dense[:, :width])


def test_sublayers_that_the_model_lacks_have_no_refits(tmp_path):
    """Only what is there is refitted, stored and loaded; levels count from the source's own widths."""
    policy = Policy([3, 0, 2, 0], [64, 16, 0, 0])
    decoder = Decoder.of_model(llama(pruned_config(config_of("qwen2"), policy)))
    grid, ranking, layers = Grid(decoder.structure, 16), random_ranking(decoder.structure), []
    ranked = permuted(decoder, ranking)
    for index, statistics in enumerate(calibrate(decoder, tokens(8, 40))):
        found = refit_layer(outputs_of(ranked, index), statistics, ranking[index], grid, index)
        assert set(found) == {kind for kind in KINDS if policy[kind][index]}
        save_refits(tmp_path / f"{index}", found)
        again = load_refits(load_file(tmp_path / f"{index}"), outputs_of(ranked, index), grid, index)
        assert set(again) == set(found)
        layers.append(again)
    library = Library.of_layers(layers)
    assert [len(library.error(s)) for s in range(8)] == [level + 1 for level in grid.maximum]
    assert library.error(1).tolist() == library.error(6).tolist() == [0.0]
    assert library.weight(2, 1).shape == (48, 16) and library.weight(5, 1).shape == (48, 16)
    assert widths_of(grid, "attention", 2) == [0, 16, 32] and widths_of(grid, "ffn", 2) == [0]
    written = sum(t.nbytes for i in range(4) for n, t in load_file(tmp_path / f"{i}").items() if "error" not in n)
    assert library_bytes(grid) == written


def test_default_damping_hardly_costs_anything(problem):
    weight, x, order = problem
    exact, damped = (refit(weight, statistics_of(x), order, [12], damping=d).error[0] for d in (1e-12, DAMPING))
    assert exact < damped < 1.05 * exact


@pytest.fixture
def layer_refits():
    """Refits of o and down of one layer on a grid of four and five levels, with its output projections and the grid."""
    _, decoder = dense_weights("gqa")
    grid, ranking = Grid(decoder.structure, 16), random_ranking(decoder.structure)
    outputs = outputs_of(permuted(decoder, ranking), 1)
    return refit_layer(outputs, list(calibrate(decoder, tokens(8, 40)))[1], ranking[1], grid, 1), outputs, grid


def test_library_keeps_what_fits_and_solves_the_rest_again(layer_refits):
    refits = list(layer_refits[0].values())
    roomy, tight = Library(refits), Library(refits, cache_bytes=refits[1].weight(2).nbytes)
    assert roomy.weight(1, 2) is roomy.weight(1, 2)
    first = tight.weight(1, 2)
    assert tight.weight(1, 2) is first
    tight.weight(1, 3)  # pushes the other one out
    assert tight.weight(1, 2) is not first and torch.equal(tight.weight(1, 2), first)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_solutions_are_the_same_together_and_alone(layer_refits, dtype):
    """Bit for bit, or a checkpoint would not be what was evaluated."""
    refits = list(layer_refits[0].values())
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
    refits, outputs, grid = layer_refits
    save_refits(tmp_path / "layer.safetensors", refits)
    tensors = load_file(tmp_path / "layer.safetensors")
    mapped = load_refits(tensors, outputs, grid, 1, on_device=False)
    assert mapped["ffn"].half.data_ptr() == tensors["ffn.half"].data_ptr()
    for kind in KINDS:
        assert all(torch.equal(a, b) for a, b in zip(every(refits[kind]), every(mapped[kind]), strict=True))


def test_a_factor_that_is_not_there_is_named(tmp_path, layer_refits):
    refits, outputs, grid = layer_refits
    save_refits(tmp_path / "layer.safetensors", {"ffn": refits["ffn"]})
    with pytest.raises(KeyError, match="attention.half"):
        load_refits(load_file(tmp_path / "layer.safetensors"), outputs, grid, 1)


def test_factors_go_to_the_gpu_only_with_room_for_their_solutions(monkeypatch):
    grid = Grid(llama_structure(32, 4096, 32, 1, 128, 11008), 688)
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
    save_refits(tmp_path / "layer", refits)
    written = sum(tensor.nbytes for name, tensor in load_file(tmp_path / "layer").items() if "error" not in name)
    assert library_bytes(grid) == grid.structure.layers * written

"""A sub-layer's factors and solutions against textbook least squares on the actual activations."""

from dataclasses import replace

import pytest
import torch
from factories import dense_weights, random_ranking, tokens
from safetensors.torch import load_file, save_file

from ppf.errors import PPFError
from ppf.families import KINDS
from ppf.fast.permute import permuted
from ppf.fitting.calibration import Statistics, calibrate
from ppf.fitting.factors import (
    DAMPING,
    STORED,
    Factors,
    factorise,
    factorise_layer,
    solve,
    stored_dtype,
    tensors_of,
)
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
N, TOKENS, HIDDEN = 24, 300, 10
WIDTHS = [0, 1, 5, 12, 23, 24]
EXACT = torch.float64


@pytest.fixture
def problem():
    """W [hidden, n] in ranking order, correlated x [tokens, n] in checkpoint order, and the order; all fp64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = draw(TOKENS, 6) @ draw(6, N) + 0.5 * draw(TOKENS, N) + 0.3
    order = torch.randperm(N, generator=generator)
    return draw(HIDDEN, N), x, order


def statistics_of(x: torch.Tensor) -> Statistics:
    return Statistics(x.T @ x / len(x), x.mean(0), x.var(0, correction=0))


def every(weight: torch.Tensor, found: Factors) -> list[torch.Tensor]:
    """The solutions at all boundaries, ascending."""
    return [solution for _, solution in solve(weight, found, found.boundaries)][::-1]


def damped(x: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """H̃ of activations in ranking order."""
    gram = x.T @ x / len(x)
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def energy(x: torch.Tensor, weight: torch.Tensor, prefix: torch.Tensor, damping: float = DAMPING) -> float:
    """(E‖(Ŵ − W)x‖² + λ‖Ŵ − W‖²) / (E‖Wx‖² + λ‖W‖²) over the tokens of x, in ranking order."""
    penalty = damping * x.square().mean() * len(x)
    gap = torch.nn.functional.pad(prefix, (0, weight.shape[1] - prefix.shape[1])) - weight
    lost, whole = ((x @ w.T).square().sum() + penalty * w.square().sum() for w in (gap, weight))
    return float(lost / whole)


def test_undamped_solutions_are_the_least_squares_solutions(problem):
    weight, x, order = problem
    found = factorise(weight, statistics_of(x), order, WIDTHS, damping=1e-12, dtype=EXACT)
    ordered = x[:, order]
    for width, ours in zip(WIDTHS, every(weight, found), strict=True):
        expected = torch.linalg.lstsq(ordered[:, :width], ordered @ weight.T).solution.T
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    # Negative control: another order's solution is another one.
    other = factorise(weight, statistics_of(x), order.flip(0), WIDTHS, damping=1e-12, dtype=EXACT)
    assert (every(weight, other)[3] - every(weight, found)[3]).abs().max() > 0.1


@pytest.mark.parametrize("widths", [WIDTHS, [0, 12, 24], list(range(N + 1))])
@pytest.mark.parametrize("group", [1, 7, 512])
def test_the_ridge_draws_solutions_to_the_dense_weight(problem, widths, group, monkeypatch):
    """Each width against its own system, which does not know of the widths passed on the way."""
    monkeypatch.setattr("ppf.fitting.factors._GROUP", group)
    weight, x, order = problem
    found = factorise(weight, statistics_of(x), order, widths, damping=0.05, dtype=EXACT)
    system = damped(x[:, order], 0.05)
    for width, ours in zip(widths, every(weight, found), strict=True):
        right = (weight @ system)[:, :width]
        expected = torch.linalg.solve(system[:width, :width], right.T).T
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        if 0 < width < N:  # negative control: a ridge towards zero gives another one
            undamped = (weight @ damped(x[:, order], 0.0))[:, :width]
            assert (torch.linalg.solve(system[:width, :width], undamped.T).T - ours).abs().max() > 1e-3


def test_no_other_weights_have_a_lower_energy(problem):
    weight, x, order = problem
    found = factorise(weight, statistics_of(x), order, WIDTHS, dtype=EXACT)
    generator = torch.Generator().manual_seed(1)
    for ours, claimed in list(zip(every(weight, found), found.error.tolist(), strict=True))[1:-1]:
        for size in (1e-1, 1e-2, 1e-3):
            noise = size * torch.randn(ours.shape, generator=generator, dtype=torch.float64)
            assert energy(x[:, order], weight, ours + noise) > claimed


def test_error_is_the_energy_that_is_minimised(problem):
    weight, x, order = problem
    found = factorise(weight, statistics_of(x), order, WIDTHS, dtype=EXACT)
    for ours, claimed in zip(every(weight, found), found.error.tolist(), strict=True):
        assert claimed == pytest.approx(energy(x[:, order], weight, ours), rel=1e-9, abs=1e-12)
        # Negative control: without the penalty it is another number.
        assert ours.shape[1] in (0, N) or claimed != pytest.approx(energy(x[:, order], weight, ours, 0.0), rel=1e-6)
    assert found.error.dtype == torch.float64 and found.error[0] == 1 and found.error[-1] == 0


def test_error_falls_with_the_level_and_beats_masking(problem):
    weight, x, order = problem
    found = factorise(weight, statistics_of(x), order, range(N + 1))
    assert (found.error.diff() < 0).all()
    masked = torch.tensor([energy(x[:, order], weight, weight[:, :w]) for w in range(1, N)])
    assert (found.error[1:-1] < masked).all() and (found.error[2:-1] < 0.7 * masked[1:]).all()


@pytest.mark.parametrize("block", [1, 5, 7, 4096])
def test_triangular_systems_may_be_solved_in_blocks(problem, block, monkeypatch):
    weight, x, order = problem
    expected = factorise(weight, statistics_of(x), order, WIDTHS, dtype=EXACT)
    monkeypatch.setattr("ppf.fitting.factors._BLOCK", block)
    found = factorise(weight, statistics_of(x), order, WIDTHS, dtype=EXACT)
    torch.testing.assert_close(found.packed, expected.packed, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.error, expected.error, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_width_is_bit_identical_and_dtypes_stay(problem, dtype):
    weight, x, order = problem
    weight = weight.to(dtype)
    found = factorise(weight, statistics_of(x.float()), order, WIDTHS)
    solutions = every(weight, found)
    assert solutions[-1] is weight and found.packed.dtype == torch.float32
    assert [tuple(w.shape) for w in solutions] == [(HIDDEN, width) for width in WIDTHS]
    assert {w.dtype for w in solutions} == {dtype} and all(w.is_contiguous() for w in solutions)
    for ours, claimed in zip(solutions, found.error.tolist(), strict=True):
        assert energy(x[:, order], weight.double(), ours.double()) == pytest.approx(claimed, rel=0.01, abs=2e-4)


def test_sixteen_bits_of_coefficients_are_enough(problem):
    """A bf16 rounding of each coefficient, with 8 bits, costs next to nothing of what masking loses."""
    weight, x, order = problem
    weight, widths = weight.float(), list(range(N + 1))
    exact, rounded = (
        factorise(weight, statistics_of(x.float()), order, widths, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.packed.dtype == torch.bfloat16 and torch.equal(rounded.error, exact.error)
    assert torch.equal(rounded.packed, exact.packed.bfloat16()) and not torch.equal(
        rounded.packed.float(), exact.packed
    )
    for width, claimed, ours in zip(widths, exact.error.tolist(), every(weight, rounded), strict=True):
        masked = energy(x[:, order], weight.double(), weight[:, :width].double())
        assert energy(x[:, order], weight.double(), ours.double()) <= claimed + 2e-3 * masked


def test_more_inputs_are_kept_in_sixteen_bits():
    assert stored_dtype(2048) is torch.float32 and stored_dtype(2049) is torch.bfloat16


def test_dead_channels_are_no_trouble(problem):
    weight, x, order = problem
    x = x.clone()
    x[:, order[3]] = 0
    dead, nothing = (factorise(weight, statistics_of(y), order, WIDTHS) for y in (x, torch.zeros_like(x)))
    for found in (dead, nothing, factorise(torch.zeros_like(weight), statistics_of(x), order, WIDTHS)):
        assert all(w.isfinite().all() for w in every(weight, found)) and found.error.isfinite().all()
        assert found.error[0] == 1 and found.error[-1] == 0
    assert torch.equal(every(weight, nothing)[2], weight[:, :5])  # nothing to refit: the dense columns


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (5, 17)])
def test_grams_that_are_not_finite_are_refused(problem, value, place):
    weight, x, order = problem
    statistics = statistics_of(x)
    statistics.gram[place] = statistics.gram[place[::-1]] = value
    with pytest.raises(PPFError, match="NaN or Inf"):
        factorise(weight, statistics, order, WIDTHS)


def test_grams_that_rounding_made_indefinite_are_damped_more(problem):
    """As fp32 sums are where a few inputs dwarf all others; tenfold, until it is enough."""
    weight, x, order = problem
    statistics = statistics_of(x)
    values, vectors = torch.linalg.eigh(statistics.gram)
    below = values[0] + 0.004 * statistics.gram.diagonal().mean()
    statistics.gram.sub_(below * vectors[:, :1] @ vectors[:, :1].T)
    assert torch.linalg.eigvalsh(statistics.gram)[0] < -0.003 * statistics.gram.diagonal().mean()
    before = statistics.gram.clone()
    found = factorise(weight, statistics, order, WIDTHS)
    expected = factorise(weight, statistics, order, WIDTHS, damping=10 * DAMPING)
    assert torch.equal(found.packed, expected.packed) and torch.equal(found.error, expected.error)
    assert torch.equal(statistics.gram, before)  # the caller's stays as it is


def test_ill_conditioned_grams_are_refitted_well(problem):
    """A few inputs a thousand times as large as the others, in fp32 sums, and coefficients of 8 bits."""
    weight, x, order = problem
    scale = torch.ones(N, dtype=torch.float64)
    scale[order[[2, 7, 20]]] = 1e3
    x = x * scale
    assert torch.linalg.cond(x.T @ x) > 1e7
    weight = (weight / scale[order]).float()
    found = factorise(weight, statistics_of(x.float()), order, WIDTHS, dtype=torch.bfloat16)
    for width, claimed, ours in zip(WIDTHS, found.error.tolist(), every(weight, found), strict=True):
        masked = energy(x[:, order], weight.double(), weight[:, :width].double())
        assert energy(x[:, order], weight.double(), ours.double()) <= claimed + 0.01 * masked


def test_default_damping_hardly_costs_anything(problem):
    weight, x, order = problem
    exact, ours = (
        every(weight, factorise(weight, statistics_of(x), order, [0, 12, N], damping=d, dtype=EXACT))[1]
        for d in (1e-12, DAMPING)
    )
    least, cost = (energy(x[:, order], weight, w, 0.0) for w in (exact, ours))
    assert least < cost < 1.05 * least


@pytest.mark.parametrize("group", [1, 5, 512])
def test_bits_do_not_depend_on_what_else_is_asked_for(problem, group, monkeypatch):
    monkeypatch.setattr("ppf.fitting.factors._GROUP", group)
    weight, x, order = problem
    weight = weight.bfloat16()
    found = factorise(weight, statistics_of(x), order, range(N + 1))
    together = dict(solve(weight, found, range(N + 1)))
    assert list(together) == list(range(N, -1, -1))
    for width in range(N + 1):
        ((at, alone),) = solve(weight, found, [width])
        assert at == width and torch.equal(alone, together[width])
    kept = {width: solution.clone() for width, solution in together.items()}
    together[5].zero_()  # nobody else's memory
    assert all(torch.equal(together[width], kept[width]) for width in together if width != 5)


def test_other_widths_and_coefficients_are_refused(problem):
    weight, x, order = problem
    found = factorise(weight, statistics_of(x), order, WIDTHS)
    with pytest.raises(PPFError, match=r"widths \[6, 7\]"):
        list(solve(weight, found, [5, 6, 7]))
    with pytest.raises(PPFError, match="do not belong"):
        replace(found, packed=found.packed[:-1])


def outputs_of(decoder: Decoder, index: int) -> dict[str, torch.Tensor]:
    return decoder.names(index).outputs(decoder.layers[index])


@pytest.mark.parametrize(("family", "heads"), [("llama", "mha"), ("llama", "gqa"), ("phi3", "gqa"), ("olmo2", "gqa")])
def test_layers_are_refitted_on_their_grid(family, heads, tmp_path):
    _, decoder = dense_weights(heads, family)
    grid, ranking = Grid(decoder.structure, 16), random_ranking(decoder.structure)
    outputs = outputs_of(permuted(decoder, ranking), 1)
    found = factorise_layer(outputs, list(calibrate(decoder, tokens(8, 40)))[1], ranking[1], grid, 1)
    attention = decoder.structure.attention[1]
    levels = range(0, attention.units + 1, attention.step)
    assert found["attention"].boundaries == tuple(attention.columns * units for units in levels)
    assert found["ffn"].boundaries == (0, 16, 32, 48, 64) and list(found) == list(KINDS)
    assert all((part.error.diff() < 0).all() for part in found.values())
    save_file(tensors_of(found), tmp_path / "layer.safetensors")
    again, tensors = load_file(tmp_path / "layer.safetensors"), tensors_of(found)
    assert set(again) == {f"{kind}.{name}" for kind in KINDS for name in STORED}
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in again)


def test_refits_reproduce_the_dense_output_best():
    """What a refitted output projection gives is nearer to what the dense one does than the dense one cut."""
    _, decoder = dense_weights("gqa", "qwen3")
    grid, ranking = Grid(decoder.structure, 16), random_ranking(decoder.structure)
    statistics = list(calibrate(decoder, tokens(8, 40)))[2]
    ranked = permuted(decoder, ranking)
    for kind, found in factorise_layer(outputs_of(ranked, 2), statistics, ranking[2], grid, 2).items():
        columns = decoder.structure.of(kind)[2].columns
        channels = (ranking[2].of(kind)[:, None] * columns + torch.arange(columns)).flatten()
        gram = statistics.of(kind).gram[channels][:, channels].double()
        dense = ranked.output(2, kind)

        def off(weight, gram=gram, dense=dense):
            gap = torch.nn.functional.pad(weight, (0, dense.shape[1] - weight.shape[1])).double() - dense.double()
            return float(((gap @ gram) * gap).sum())

        for width, ours in solve(dense, found, found.boundaries[1:-1]):
            assert off(ours) < 0.98 * off(dense[:, :width])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_makes_and_solves_the_same_factors(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 40, generator=generator) @ torch.randn(40, 768, generator=generator)
    x += torch.randn(2000, 768, generator=generator)
    weight, order = torch.randn(256, 768, generator=generator).bfloat16(), torch.randperm(768, generator=generator)
    statistics, widths = statistics_of(x), range(0, 769, 64)
    on_gpu = Statistics(*(value.cuda() for value in (statistics.gram, statistics.mean, statistics.variance)))
    expected = factorise(weight, statistics, order, widths, dtype=torch.float32)
    found = factorise(weight.cuda(), on_gpu, order, widths, dtype=torch.float32)
    torch.testing.assert_close(found.packed.cpu(), expected.packed, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.error, expected.error, rtol=1e-9, atol=1e-12)
    # The same coefficients to both, so that only the products differ: fp32 sums of exact products.
    given = replace(expected, packed=expected.packed.to(dtype))
    exact = dict(solve(weight.double(), given, widths))
    for place in ("cuda", "cpu"):  # where the coefficients are does not matter
        for width, ours in solve(weight.cuda().float(), replace(given, packed=given.packed.to(place)), widths):
            torch.testing.assert_close(ours.cpu().double(), exact[width], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_factorising_takes_no_more_memory_than_it_says():
    n, hidden = 8192, 512
    gram = torch.eye(n, device="cuda") + 0.1 / n
    statistics, weight = Statistics(gram, gram[0], gram[0]), torch.randn(hidden, n, device="cuda").bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = factorise(weight, statistics, torch.arange(n), range(0, n + 1, 256))
    assert found.packed.dtype is torch.bfloat16
    assert torch.cuda.max_memory_allocated() - before < 13.5 * n * n

"""Budgets are met exactly: 10,000 random budgets and structures, and what known peers do instead."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from structures import llama_structure

from ppf.choose.budget.projection import Projector, check_ratio, nearest
from ppf.choose.candidates.sampling import random_levels
from ppf.errors import InputError
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")


def random_grid(draw: random.Random) -> Grid:
    """Attention steps from forty times cheaper to a hundred times dearer than FFN steps."""
    multiple = draw.choice([1, 8, 16, 64])
    structure = llama_structure(
        layers=draw.randint(1, 8),
        hidden=draw.choice([48, 64]),
        groups=draw.choice([1, 2, 3, 4, 8]),
        heads=draw.choice([1, 2, 4, 8]),
        head_dim=draw.choice([4, 8, 32, 64, 128]),
        channels=multiple * draw.randint(1, 24),
    )
    return Grid(structure, multiple)


def pruned_before(grid: Grid, draw: random.Random) -> Grid:
    """The grid of a model whose layers differ already: some units are gone, or all of a sub-layer but layer 0's."""
    s, multiple = grid.structure, grid.ffn_multiple
    attention = [replace(a, units=draw.randint(index == 0, a.units)) for index, a in enumerate(s.attention)]
    ffn = [replace(f, units=multiple * draw.randint(0, f.units // multiple)) for f in s.ffn]
    ffn[0] = s.ffn[0]  # something to prune
    return Grid(replace(s, attention=tuple(attention), ffn=tuple(ffn)), multiple)


def random_utilities(grid: Grid, batch: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    shape = (batch, grid.sublayers, grid.levels)
    if kind == "noise":
        return torch.randn(shape, generator=generator)
    if kind == "walk":
        return 30 * torch.randn(shape, generator=generator).cumsum(-1)
    if kind == "flat":
        return torch.zeros(shape)
    return nearest(torch.rand(shape[:2], generator=generator), grid)


def guaranteed_gap(grid: Grid) -> float:
    """Half a step of the cheapest sub-layers if these together span a step of the dearest, else half of the latter."""
    steps = [s for s in zip(grid.maximum, grid.minimum, grid.step_cost, strict=True) if s[0] > s[1]]
    cheapest, dearest = (best(cost for *_, cost in steps) for best in (min, max))
    span = sum((high - low) * cost for high, low, cost in steps if cost == cheapest)
    return (cheapest if span >= dearest else dearest) / 2


def check_budget(grid: Grid, levels: torch.Tensor, ratio: torch.Tensor) -> None:
    assert (levels >= torch.tensor(grid.minimum)).all() and (levels <= torch.tensor(grid.maximum)).all()
    target = (1 - ratio.double()) * grid.structure.decoder_parameters
    assert ((grid.kept(levels) - target).abs() <= guaranteed_gap(grid) * (1 + 1e-9)).all()


def test_10000_random_budgets_are_met_within_half_a_step():
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    dearer = cheaper = strict = 0
    for number in range(200):
        grid = random_grid(draw)
        if number % 4 == 3:
            grid = pruned_before(grid, draw)
        ratio = 0.001 + (grid.maximum_ratio - 0.001) * torch.rand(50, generator=generator, dtype=torch.float64)
        kind = draw.choice(["noise", "walk", "flat", "nearest", "random_levels"])
        if kind == "random_levels":
            levels = random_levels(grid, ratio.float(), generator)
            ratio = ratio.float()
        else:
            levels = Projector(grid)(random_utilities(grid, 50, kind, generator), ratio)
        check_budget(grid, levels, ratio)
        if kind != "random_levels":
            assert (levels[:, 0] >= 1).all()
        attention, ffn = grid.step_cost[0], grid.step_cost[-1]
        dearer += attention > ffn
        cheaper += attention < ffn
        strict += guaranteed_gap(grid) == min(attention, ffn) / 2
    assert dearer > 50 and cheaper > 20 and strict > 130  # the draw covers what it says


def test_peers_that_drift_fail_the_same_check():
    grid = Grid(llama_structure(8, 64, 4, 1, 16, 512), 1)
    ratio, generator = torch.full((20,), 2 / 3), torch.Generator().manual_seed(0)
    shares = torch.sigmoid(2 * torch.randn(20, grid.sublayers, generator=generator))
    maximum = torch.tensor(grid.maximum)
    renormalised = shares / shares.mean(1, keepdim=True) / 3
    clamped = (renormalised.clamp(0, 1) * maximum).round().long()  # clamps, does not renormalise
    truncated = (torch.full((20, grid.sublayers), 1 / 3) * maximum).long()  # 512/3 becomes 170
    for levels in (clamped, truncated):
        levels[:, 0] = levels[:, 0].clamp_min(1)
        with pytest.raises(AssertionError):
            check_budget(grid, levels, ratio)
    check_budget(grid, Projector(grid)(nearest(renormalised, grid), ratio), ratio)


def test_a_third_of_512_channels_is_170_in_some_layers_and_171_in_others():
    grid = Grid(llama_structure(6, 64, 3, 1, 16, 512), 1)
    levels = Projector(grid)(nearest(torch.full((1, 12), 1 / 3), grid), torch.tensor([2 / 3], dtype=torch.float64))[0]
    assert levels[:6].tolist() == [1] * 6 and set(levels[6:].tolist()) == {170, 171} and levels[6:].sum() == 6 * 512 / 3


def test_concave_utilities_give_the_optimum():
    """Against all policies of a small grid: with equal step costs the optimum of concave utilities is found."""
    grid = Grid(llama_structure(2, 24, 2, 1, 6, 24), 8)
    assert len(set(grid.step_cost)) == 1
    generator = torch.Generator().manual_seed(3)
    gains = torch.rand((40, 4, grid.levels), generator=generator).sort(-1, descending=True).values
    utility = gains.cumsum(-1)
    every = torch.tensor(
        list(itertools.product(*(range(a, b + 1) for a, b in zip(grid.minimum, grid.maximum, strict=True))))
    )
    ratio = 0.1 + 0.6 * torch.rand(40, generator=generator)
    levels = Projector(grid)(utility, ratio)
    for u, chosen in zip(utility, levels, strict=True):
        value = u.gather(1, every.T).sum(0)
        best = value[grid.kept(every) == grid.kept(chosen)].max()
        assert u.gather(1, chosen[:, None]).sum() >= best - 1e-5


def test_the_direct_path_to_the_nearest_policy_finds_as_good_ones():
    """Against the general path, on grids of every kind, with the weights that mutation gives."""
    draw, generator = random.Random(1), torch.Generator().manual_seed(1)
    for _ in range(60):
        grid = random_grid(draw)
        fractions = 1.4 * torch.rand((30, grid.sublayers), generator=generator) - 0.2
        weight = 1 + draw.choice([0, 1e-4, 0.5]) * torch.rand((30, grid.sublayers), generator=generator)
        ratio = 0.001 + (grid.maximum_ratio - 0.001) * torch.rand(30, generator=generator, dtype=torch.float64)
        utility, projector = nearest(fractions, grid) * weight[..., None], Projector(grid)
        levels = projector.nearest(fractions, ratio, weight)
        check_budget(grid, levels, ratio)
        direct, general = (_utility(utility, found) for found in (levels, projector(utility, ratio)))
        slack = 1e-5 + (grid.kept(levels) != grid.kept(projector(utility, ratio))) * 0.02
        assert (direct >= general - slack * (1 + general.abs())).all()


def _utility(utility: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return utility.gather(2, levels[..., None]).sum((1, 2))


def test_rows_of_a_batch_do_not_influence_each_other():
    grid = Grid(llama_structure(4, 48, 3, 2, 8, 64), 8)
    generator = torch.Generator().manual_seed(1)
    utility, ratio = random_utilities(grid, 30, "noise", generator), torch.rand(30, generator=generator) * 0.8
    projector = Projector(grid)
    together = projector(utility, ratio)
    alone = torch.cat([projector(utility[i : i + 1], ratio[i : i + 1]) for i in range(30)])
    assert torch.equal(together, alone)


def test_projector_has_nothing_to_save():
    assert Projector(Grid(llama_structure(4, 48, 3, 2, 8, 64), 8)).state_dict() == {}


@pytest.mark.parametrize("ratio", [0, -0.1, 1, 1.5, math.nan, math.inf, -math.inf])
def test_what_is_no_ratio_is_refused(ratio):
    with pytest.raises(InputError) as caught:
        check_ratio(ratio, Grid(llama_structure(4, 48, 3, 2, 8, 64), 8))
    assert caught.value.field == "ratio"


def test_the_maximum_is_named_and_can_be_had():
    grid = Grid(llama_structure(4, 48, 3, 2, 8, 64), 8)
    check_ratio(grid.maximum_ratio, grid)
    with pytest.raises(InputError, match="The maximum for this model is") as caught:
        check_ratio(grid.maximum_ratio + 1e-6, grid)
    named = float(caught.value.remedy.split()[6])
    check_ratio(named, grid)
    assert named == pytest.approx(grid.maximum_ratio, abs=1e-4)
    utility = random_utilities(grid, 1, "noise", torch.Generator().manual_seed(0))
    smallest = Projector(grid)(utility, torch.tensor([grid.maximum_ratio], dtype=torch.float64))
    assert smallest[0].tolist() == list(grid.minimum)


@pytest.mark.gpu
def test_a_gpu_finds_the_same_policies_without_synchronising():
    """On the device, and from a graph, which a synchronisation in the middle would make impossible."""
    grid, generator = Grid(llama_structure(6, 64, 4, 2, 16, 512), 32), torch.Generator().manual_seed(0)
    utility = random_utilities(grid, 1, "walk", generator)
    ratio = torch.tensor([0.37])
    projector = Projector(grid).cuda()
    expected = Projector(grid)(utility, ratio)
    given = utility.cuda(), ratio.cuda()
    assert torch.equal(projector(*given).cpu(), expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        projector(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = projector(*given)
    given[0].copy_(random_utilities(grid, 1, "walk", generator))
    graph.replay()
    assert torch.equal(found, projector(*given))
    fractions = torch.rand((40, grid.sublayers), generator=generator)
    ratios = 0.1 + 0.5 * torch.rand(40, generator=generator)
    assert torch.equal(
        projector.nearest(fractions.cuda(), ratios.cuda()).cpu(), Projector(grid).nearest(fractions, ratios)
    )

"""Limits are limits: 10,000 random structures, kinds and limits, checked against all sums that policies can cost."""

import bisect
import math
import random
import re

import pytest
import torch
from structures import llama_structure

from ppf.choose.budget import FlopsBudget, LatencyBudget, MemoryBudget, Profile, ThroughputBudget
from ppf.choose.budget.base import LimitBudget
from ppf.choose.budget.costs import Costs, parameters, weight_bytes
from ppf.choose.budget.projection import projector_of
from ppf.choose.candidates.breeding import Effort, breed, move
from ppf.choose.candidates.sampling import mutate, random_levels
from ppf.errors import InputError
from ppf.fast.timing import Workload
from ppf.model.grid import Grid
from ppf.model.structure import Structure, SubLayer

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = "memory-gb", "flops", "latency-ms", "tokens-per-second"
_CONTEXTS = 0, 1, 2_048, 131_072, 1 << 20
_SUMS = 20_000  # more are not listed


def odd_grid(draw: random.Random) -> Grid:
    """Few layers of uneven widths, some without a sub-layer or with one that goes as a whole; now and then every layer
    has costs of its own; attention from far cheaper to far dearer than an FFN step."""
    layers, multiple, alike = draw.randint(1, 5), draw.choice((1, 3, 8, 64)), draw.random() < 0.7
    attention, ffn = [], []
    heads, head_dim, hidden = draw.choice((1, 2, 8)), draw.choice((4, 16, 128)), draw.choice((24, 48))
    for layer in range(layers):
        if not alike:
            heads, head_dim = draw.choice((1, 2, 8)), draw.choice((4, 16, 128))
        groups, channels = draw.randint(layer == 0, 4), multiple * draw.randint(layer == 0, 4)
        bias, whole = draw.choice((0, 0, 1)), draw.random() < 0.2
        cost = (2 * heads + 2) * head_dim * hidden + bias * (heads + 2) * head_dim
        attention.append(SubLayer(groups, cost, heads * head_dim, groups if whole else 1) if groups else _ABSENT)
        ffn.append(SubLayer(channels, 3 * hidden + bias, 1) if channels else _ABSENT)
    portable = draw.random() < 0.2
    return Grid(Structure(hidden, head_dim, tuple(attention), tuple(ffn)), multiple, portable)


_ABSENT = SubLayer(0, 0, 1)


def odd_profile(grid: Grid, draw: random.Random, phase: str) -> Profile:
    """Milliseconds that jump, stand still and fall now and then, as measured ones do."""

    def column(levels: int, scale: float) -> tuple[float, ...]:
        return tuple(scale * (draw.random() < 0.6) * draw.random() + 0.3 * scale * n for n in range(levels + 1))

    layers = grid.structure.layers
    lists = column(max(grid.maximum[:layers]), 10 ** draw.uniform(-3, 1)), column(max(grid.maximum[layers:]), 0.1)
    return Profile(Workload(phase, draw.choice((1, 3)), 64), draw.random(), *lists)


def asked(kind: str, grid: Grid, draw: random.Random):
    """A function from what is requested to a budget of this kind, and the range that can be requested."""
    context, profile = draw.choice(_CONTEXTS), odd_profile(grid, draw, "prefill")
    costs = weight_bytes(grid, draw.choice((1, 2, 4)), draw.randint(0, 10_000))
    ask = {
        "memory-gb": lambda value: MemoryBudget(grid, value, costs),
        "flops": lambda value: FlopsBudget(grid, value, context, 100),
        "latency-ms": lambda value: LatencyBudget(grid, value, profile),
        "tokens-per-second": lambda value: ThroughputBudget(grid, value, profile),
    }[kind]
    with pytest.raises(InputError) as caught:
        ask(math.nan)
    return ask, *range_of(caught.value)


def range_of(error: InputError) -> tuple[float, float]:
    """The smallest and the dense model that a refusal names; the same if it says that all policies are."""
    every = re.findall(r"All policies of this model have (\S+):", error.remedy) * 2
    smallest, dense = every or re.findall(r"(\S+) \(the", error.remedy)
    return float(smallest), float(dense)


def sums_of(grid: Grid, costs: Costs) -> list[float] | None:
    """All costs that policies can have without the constant, in increasing order; None of too many."""
    found = {0.0}
    for row, low, high in zip(costs.table.tolist(), grid.minimum, grid.maximum, strict=True):
        found = {known + cost for known in found for cost in set(row[low : high + 1])}
        if len(found) > _SUMS:
            return None
    return sorted(found)


def check(budgets: list[LimitBudget], levels: torch.Tensor, every: list[float] | None) -> None:
    """Assert that the policies of ``levels`` [B, S], one for each budget, are within it, that no level of theirs can be
    raised, and that of ``every`` sum nothing is nearer, unless they are near enough."""
    grid, table, constant = budgets[0].grid, budgets[0].costs.table, budgets[0].costs.constant
    low, high = torch.tensor(grid.minimum), torch.tensor(grid.maximum)
    assert (levels >= low).all() and (levels <= high).all()
    costs, raised = budgets[0].costs.of(levels).tolist(), (levels + 1).minimum(high)
    steps = table.gather(1, raised.T).T - table.gather(1, levels.T).T
    least = steps.masked_fill(raised == levels, torch.inf).amin(1).tolist()
    free = [row[a : b + 1].diff() for row, a, b in zip(table, grid.minimum, grid.maximum, strict=True)]
    smallest = min(float(row[row > 0].min()) for row in free if (row > 0).any())
    for budget, cost, step in zip(budgets, costs, least, strict=True):
        assert budget.allows(budget.in_unit(cost))
        assert not budget.allows(budget.in_unit(cost + step))
        near = 0.01 * (budget.target - constant) if budget.timed else smallest
        if every is not None and budget.target - cost >= near:
            following = bisect.bisect_right(every, cost - constant)
            assert following == len(every) or not budget.allows(budget.in_unit(every[following] + constant))


def test_10000_random_limits_are_never_exceeded_and_nothing_is_nearer():
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    seen = listed = 0
    while seen < 10_000:
        grid, kind = odd_grid(draw), KINDS[seen // 40 % len(KINDS)]
        ask, smallest, dense = asked(kind, grid, draw)
        if smallest == dense:
            continue
        budgets = [ask(smallest + share * (dense - smallest)) for share in (0, *(draw.random() for _ in range(39)))]
        every, first = sums_of(grid, budgets[0].costs), budgets[0]
        target = torch.tensor([budget.target for budget in budgets], dtype=torch.float64) - first.costs.constant
        utility = 10 ** draw.uniform(-1, 2) * torch.randn(40, grid.sublayers, grid.levels, generator=generator)
        utility = utility if draw.random() < 0.5 else utility.abs().cumsum(-1)
        levels = first.projector.meet(utility, target, first.is_limit)
        check(budgets, levels, every)
        listed += 40 * (every is not None)
        if seen % 200 == 0:  # alone and by the budget itself it is the same
            assert torch.equal(budgets[5].levels(utility[5:6])[0], levels[5])
        seen += len(budgets)
    assert listed > 9_000


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_that_a_refusal_names_can_be_had(kind):
    draw = random.Random(1)
    for _ in range(25):
        grid = odd_grid(draw)
        ask, smallest, dense = asked(kind, grid, draw)
        if smallest == dense:
            continue
        budget = ask(smallest)
        least, most = (budget.in_unit(cost) for cost in budget.costs.range(grid))
        assert smallest == pytest.approx(least, rel=1e-5) and dense == pytest.approx(most, rel=1e-5)
        levels = budget.levels(torch.zeros(1, grid.sublayers, grid.levels))
        assert budget.allows(budget.in_unit(float(budget.costs.of(levels)[0])))
        for beyond in (least * (1.001 if budget.upwards else 0.999), most, -1.0, math.inf, -math.inf):
            with pytest.raises(InputError) as caught:
                ask(beyond)
            assert range_of(caught.value) == (smallest, dense)


def test_gigabytes_that_are_no_whole_bytes_are_not_rounded_up():
    grid = Grid(llama_structure(4, 48, 3, 2, 8, 64), 8)
    costs = weight_bytes(grid, 2, 0)
    least, most = costs.range(grid)
    utility = torch.randn(1, grid.sublayers, grid.levels, generator=torch.Generator().manual_seed(0))
    for cost in range(int(least), int(most), 9_973):
        reached = float(costs.of(MemoryBudget(grid, cost / 1e9, costs).levels(utility))[0])
        assert reached <= cost and reached / 1e9 <= cost / 1e9
        again = MemoryBudget(grid, reached / 1e9, costs)
        assert again.target == reached and float(costs.of(again.levels(utility))[0]) <= reached
        with_less = MemoryBudget(grid, reached / 1e9 - 1e-12, costs) if reached > least else again
        assert with_less.target < reached or reached == least


def test_everything_that_makes_candidates_keeps_the_ceiling():
    """What a search draws from: moves, mutants and bred policies, where the nearest ones would lie above."""
    draw, generator, above = random.Random(2), torch.Generator().manual_seed(2), 0
    for _ in range(15):
        grid = odd_grid(draw)
        ask, smallest, dense = asked("memory-gb", grid, draw)
        if smallest == dense:
            continue
        budget = ask(smallest + draw.random() * (dense - smallest))
        ratio = torch.full((6,), budget.comes_to, dtype=torch.float64)
        start = random_levels(grid, ratio.float(), generator)
        moved = move(start, grid, ratio, ceiling=True)
        mutants = mutate(moved, grid, generator, ratio=budget.comes_to, ceiling=True)
        effort = Effort(generations=4, offspring=6, keep=4)
        bred = breed(moved[None], ratio[:1], lambda levels: -levels.sum(1).float(), grid, generator, effort, True)[0]
        for levels in (moved, mutants, bred):
            assert (budget.costs.of(levels) <= budget.target).all()
        above += int((budget.costs.of(move(start, grid, ratio)) > budget.target).sum())
    assert above > 20  # without the ceiling they do


def test_ratios_are_met_as_nearly_as_the_grid_can():
    """Within half the smallest step, or nothing is nearer, on either side; the same by both paths."""
    draw, generator, coarse = random.Random(3), torch.Generator().manual_seed(3), 0
    for _ in range(60):
        grid = odd_grid(draw)
        if grid.minimum == grid.maximum:
            continue
        ratio = 0.001 + (grid.maximum_ratio - 0.001) * torch.rand(8, generator=generator, dtype=torch.float64)
        every = sums_of(grid, parameters(grid))
        if every is None:
            continue
        steps = [c for c, a, b in zip(grid.step_cost, grid.minimum, grid.maximum, strict=True) if a < b]
        fractions = torch.rand(8, grid.sublayers, generator=generator)
        utility = 30 * torch.randn(8, grid.sublayers, grid.levels, generator=generator)
        projector = projector_of(grid, torch.device("cpu"))
        for levels in (projector(utility, ratio), projector.nearest(fractions, ratio)):
            for kept, share in zip(grid.kept(levels).tolist(), ratio.tolist(), strict=True):
                target = (1 - share) * grid.structure.decoder_parameters
                off, least = abs(kept - target), min(abs(cost - target) for cost in every)
                assert off <= min(steps) / 2 * (1 + 1e-9) or off == pytest.approx(least, abs=1e-6)
                coarse += off > min(steps) / 2
    assert coarse > 20

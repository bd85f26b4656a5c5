"""Random, uniform and neighbouring policies, all on budget."""

import pytest
import torch
from structures import irregular_structure, llama_structure

from ppf.choose.candidates.sampling import RATIO_RANGE, mutate, random_levels, random_ratios, uniform_policy
from ppf.errors import InputError
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
# An attention step costs 2.7 FFN steps: budgets cannot be met by swapping one for one.
GRID = Grid(llama_structure(8, 64, 4, 3, 8, 256), 8)
IRREGULAR = Grid(irregular_structure(), 8)


def gap(levels: torch.Tensor, ratio: torch.Tensor | float, grid: Grid = GRID) -> torch.Tensor:
    """Distance from the budget, in the cheapest steps."""
    target = (1 - torch.as_tensor(ratio).double()) * grid.structure.decoder_parameters
    return (grid.kept(levels) - target).abs() / min(cost for cost in grid.step_cost if cost)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_random_ratios_fill_the_range():
    ratios = random_ratios(2000, generator())
    assert ratios.min() >= RATIO_RANGE[0] and ratios.max() <= RATIO_RANGE[1]
    assert torch.histc(ratios, 10, *RATIO_RANGE).min() > 150


def test_random_levels_are_on_budget_and_diverse():
    ratio = random_ratios(400, generator())
    levels = random_levels(GRID, ratio, generator(1))
    assert (gap(levels, ratio) <= 0.5 + 1e-6).all()
    assert len(set(GRID.decode(levels))) == 400
    share = levels / torch.tensor(GRID.maximum)
    spread = (share - share.mean(1, keepdim=True)).abs().mean(1)
    assert spread.min() < 0.1 and spread.max() > 0.3
    assert torch.equal(levels, random_levels(GRID, ratio, generator(1)))
    assert not torch.equal(levels, random_levels(GRID, ratio, generator(2)))


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.3, 0.5, 0.77, 0.9])
def test_uniform_policies_differ_by_one_step_at_most(ratio):
    policy = uniform_policy(GRID, ratio)
    levels = GRID.encode([policy])
    assert gap(levels, ratio).item() <= 0.5 + 1e-6
    for part in (levels[0, :8], levels[0, 8:]):
        assert part.max() - part.min() <= 1


def test_uniform_policy_refuses_what_cannot_be():
    with pytest.raises(InputError, match="maximum"):
        uniform_policy(GRID, 0.9999)


def test_neighbours_are_near_distinct_and_on_budget():
    ratio = random_ratios(50, generator())
    parents = random_levels(GRID, ratio, generator(1)).repeat_interleave(8, 0)
    mutants = mutate(parents, GRID, generator(2))
    own = 1 - GRID.kept(parents) / GRID.structure.decoder_parameters
    assert (gap(mutants, own) <= 0.5 + 1e-5).all()
    changed = (mutants != parents).sum(1).float()
    assert (changed > 0).float().mean() > 0.8 and changed.mean() < 10
    assert (mutants >= torch.tensor(GRID.minimum)).all() and (mutants <= torch.tensor(GRID.maximum)).all()
    assert torch.equal(mutants, mutate(parents, GRID, generator(2)))


def test_generations_of_mutants_stay_on_the_budget_they_are_given():
    free = held = random_levels(GRID, torch.full((64,), 0.4), generator(1))
    draw = generator(2)
    for _ in range(25):
        free, held = mutate(free, GRID, draw), mutate(held, GRID, draw, ratio=0.4)
    assert (gap(held, 0.4) <= 0.5 + 1e-5).all()
    assert gap(free, 0.4).max() > 0.5  # each keeping its parent's cost drifts away


def test_what_a_layer_lacks_stays_absent():
    ratio = random_ratios(100, generator())
    levels = random_levels(IRREGULAR, ratio, generator(1))
    mutants = mutate(levels, IRREGULAR, generator(2), ratio=ratio)
    for found in (levels, mutants):
        assert (gap(found, ratio, IRREGULAR) <= 0.5 + 1e-5).all()
        assert (found <= torch.tensor(IRREGULAR.maximum)).all() and (found >= torch.tensor(IRREGULAR.minimum)).all()
    assert (mutants != levels).any(1).float().mean() > 0.8
    for share in (0.2, 0.5):
        policy = uniform_policy(IRREGULAR, share)
        assert gap(IRREGULAR.encode([policy]), share, IRREGULAR).item() <= 0.5 + 1e-6

"""Breeding: on budget, distinct, better every time, reproducible, and neighbours learn from each other."""

import pytest
import torch
from factories import synthetic_log_perplexity
from structures import irregular_structure, llama_structure

from ppf.choose.candidates.breeding import Effort, breed, cautious, move
from ppf.choose.candidates.sampling import random_levels
from ppf.choose.predictor import Prediction
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = Grid(llama_structure(4, 48, 3, 2, 8, 64), 8)
RATIOS = torch.tensor([0.2, 0.35, 0.5])
EFFORT = Effort(generations=8, offspring=24, keep=6)


def judge(levels: torch.Tensor) -> torch.Tensor:
    return synthetic_log_perplexity(GRID, levels)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(count: int = 5) -> torch.Tensor:
    drawn = random_levels(GRID, RATIOS.repeat_interleave(count), generator(9))
    return drawn.view(len(RATIOS), count, GRID.sublayers)


def test_populations_are_on_budget_distinct_and_sorted():
    pool = breed(start(), RATIOS, judge, GRID, generator(), EFFORT)
    assert pool.shape == (3, 6, GRID.sublayers)
    target = (1 - RATIOS.double()) * GRID.structure.decoder_parameters
    assert ((GRID.kept(pool) - target[:, None]).abs() <= min(GRID.step_cost) / 2).all()
    for island in pool:
        assert len({tuple(levels) for levels in island.tolist()}) == 6
        value = judge(island)
        assert (value[1:] >= value[:-1]).all()


def test_better_than_what_it_starts_from_and_than_chance():
    best = judge(breed(start(), RATIOS, judge, GRID, generator(), EFFORT)[:, 0])
    assert (best < judge(start().flatten(0, 1)).view(3, -1).amin(1) - 0.01).all()
    budget = EFFORT.generations * EFFORT.offspring
    for ratio, found in zip(RATIOS, best, strict=True):
        assert found < judge(random_levels(GRID, ratio.expand(budget), generator(1))).min()


def test_the_same_seed_gives_the_same_populations():
    one, two, other = (breed(start(), RATIOS, judge, GRID, generator(seed), EFFORT) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_the_best_is_never_lost():
    known = breed(start(), RATIOS, judge, GRID, generator(), Effort(20, 32, 6))[:, :1]
    again = breed(known, RATIOS, judge, GRID, generator(5), Effort(1, 4, 2))
    assert (judge(again[:, 0]) <= judge(known[:, 0])).all()


def test_islands_take_over_from_their_neighbours():
    """A good population next door helps one that starts badly, within the same few generations."""
    good = breed(start(), RATIOS, judge, GRID, generator(), Effort(20, 32, 6))
    few = Effort(generations=4, offspring=2, keep=4)
    mixed = torch.stack((good[0], start(6)[1], good[2]))
    alone = breed(mixed[1:2], RATIOS[1:2], judge, GRID, generator(3), few)[0, :1]
    together = breed(mixed, RATIOS, judge, GRID, generator(3), few)[1, :1]
    assert judge(together) < judge(alone)


class Opinion:
    """A predictor that is sure of itself at the first half of what it is asked."""

    def __call__(self, levels: torch.Tensor) -> Prediction:
        std = torch.where(torch.arange(len(levels)) < len(levels) // 2, 0.0, 1.0)
        return Prediction(torch.full((len(levels),), 4.0), std)


def test_caution_weighs_uncertainty_for_all_or_by_island():
    levels = start()[:2].flatten(0, 1)
    assert cautious(Opinion(), 0.5)(levels).tolist() == [4.0] * 5 + [4.5] * 5
    assert cautious(Opinion(), torch.tensor([1.0, -2.0]))(levels).tolist() == [4.0] * 5 + [2.0] * 5


def test_moving_changes_the_budget_and_little_else():
    levels = start()[2]
    moved = move(levels, GRID, torch.full((5,), 0.45))
    target = 0.55 * GRID.structure.decoder_parameters
    assert ((GRID.kept(moved) - target).abs() <= min(GRID.step_cost) / 2).all()
    assert (moved - levels).abs().max() <= 2
    assert move(levels[:0], GRID, torch.zeros(0)).shape == (0, GRID.sublayers)


def test_layers_that_differ_are_bred_as_well():
    grid = Grid(irregular_structure(), 8)
    drawn = random_levels(grid, RATIOS.repeat_interleave(5), generator(9)).view(3, 5, grid.sublayers)
    pool = breed(drawn, RATIOS, lambda levels: synthetic_log_perplexity(grid, levels), grid, generator(), EFFORT)
    target = (1 - RATIOS.double()) * grid.structure.decoder_parameters
    assert ((grid.kept(pool) - target[:, None]).abs() <= min(c for c in grid.step_cost if c) / 2).all()
    assert (pool <= torch.tensor(grid.maximum)).all()
    moved = move(pool[0], grid, torch.full((len(pool[0]),), 0.3))
    assert ((grid.kept(moved) - 0.7 * grid.structure.decoder_parameters).abs() <= max(grid.step_cost) / 2).all()

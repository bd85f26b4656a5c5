"""Proposals of the fit loop: distinct, new, reproducible, and where they are useful."""

from collections import Counter

import pytest
import torch
from factories import synthetic_log_perplexity, synthetic_rows
from structures import irregular_structure, llama_structure

from ppf.choose.candidates.sampling import random_levels, random_ratios, uniform_policy
from ppf.errors import InputError, PPFError
from ppf.fitting.learning import learn
from ppf.fitting.search.exploration import check_evaluations, frontier, initial_proposals, next_proposals
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = Grid(llama_structure(4, 48, 3, 2, 8, 64), 8)
SMALL = Grid(llama_structure(1, 48, 2, 1, 8, 64), 16)  # 2 · 5 policies


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    return synthetic_rows(GRID, random_levels(GRID, random_ratios(60, generator), generator))


@pytest.fixture(scope="module")
def fitted(rows):
    return learn(GRID, rows, 0, torch.device("cpu"), effort=0.05)


def test_initial_proposals_are_distinct_and_hold_the_anchors():
    found = initial_proposals(GRID, 80, seed=0)
    policies = [policy for policy, _ in found]
    assert len(policies) == len(set(policies)) == 80
    assert found[0] == (GRID.dense(), "dense")
    assert [p for p, source in found if source == "uniform"] == [
        uniform_policy(GRID, r) for r in (0.1, 0.2, 0.3, 0.4, 0.5)
    ]
    assert Counter(source for _, source in found) == {"dense": 1, "uniform": 5, "random": 74}
    assert found == initial_proposals(GRID, 80, seed=0) != initial_proposals(GRID, 80, seed=1)


def test_next_proposals_are_new_and_mixed(rows, fitted):
    found = next_proposals(fitted.agent, fitted.predictor, rows, 40, seed=3)
    policies = [policy for policy, _ in found]
    assert len(set(policies)) == 40 and not set(policies) & {row.policy for row in rows}
    sources = Counter(source for _, source in found)
    assert set(sources) == {"agent", "agent-noise", "bred"} and min(sources.values()) >= 6
    assert found == next_proposals(fitted.agent, fitted.predictor, rows, 40, seed=3)
    assert found != next_proposals(fitted.agent, fitted.predictor, rows, 40, seed=4)
    for policy in policies:
        GRID.check(policy)
        assert 0.03 < GRID.ratio(policy) < 0.72


def test_the_frontier_is_the_best_near_each_ratio(rows):
    wanted = torch.linspace(0.05, 0.7, 30)
    chosen = frontier(GRID, rows, wanted, 2)
    assert chosen.shape == (30, 2, GRID.sublayers)
    value = {row.policy: row.log_perplexity for row in rows}
    for ratio, pair in zip(wanted.tolist(), chosen, strict=True):
        near = sorted(row.log_perplexity for row in rows if abs(row.ratio - ratio) <= 0.02)[:2]
        # A policy a little outside the window may be taken for a better one inside, never for a worse one.
        found = [value[policy] for policy in GRID.decode(pair)]
        assert all(ours <= theirs for ours, theirs in zip(found, near, strict=False))
    assert len({policy for pair in chosen for policy in GRID.decode(pair)}) > 16


def test_what_is_bred_is_better_than_chance(rows, fitted):
    """Bred on the predictor, policies beat random policies of the same ratios in truth."""
    found = next_proposals(fitted.agent, fitted.predictor, rows, 60, seed=5)
    levels = GRID.encode([policy for policy, source in found if source == "bred"])
    ratio = (1 - GRID.kept(levels) / GRID.structure.decoder_parameters).float()
    chance = random_levels(GRID, ratio, torch.Generator().manual_seed(9))
    ours, theirs = (synthetic_log_perplexity(GRID, x).mean() for x in (levels, chance))
    assert ours < theirs - 0.03


def test_small_models_are_refused_instead_of_searched_for_ever():
    with pytest.raises(InputError, match="10 policies"):
        check_evaluations(24, SMALL)
    check_evaluations(24, GRID)
    with pytest.raises(PPFError, match="too few"):
        initial_proposals(SMALL, 24, seed=0)


def test_next_proposals_of_an_exhausted_model_are_refused():
    grid = Grid(llama_structure(2, 48, 2, 1, 8, 32), 16)
    every = [p for p, _ in initial_proposals(grid, 20, seed=0)]
    measured = synthetic_rows(grid, grid.encode(every))
    fitted = learn(grid, measured, 0, torch.device("cpu"), effort=0.05)
    with pytest.raises(PPFError, match="too few"):
        next_proposals(fitted.agent, fitted.predictor, measured, 40, seed=0)


def test_proposals_for_a_model_whose_layers_differ():
    grid = Grid(irregular_structure(), 8)
    check_evaluations(24, grid)
    first = [policy for policy, _ in initial_proposals(grid, 60, seed=0)]
    rows = synthetic_rows(grid, grid.encode(first))
    fitted = learn(grid, rows, 0, torch.device("cpu"), effort=0.05)
    following = [policy for policy, _ in next_proposals(fitted.agent, fitted.predictor, rows, 20, seed=1)]
    assert len(set(first + following)) == 80
    for policy in following:
        grid.check(policy)

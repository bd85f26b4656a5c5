"""How long the agent is trained: as long as ever for large models and many rows, less where there is less to learn."""

import pytest
from structures import llama_structure

from ppf.choose import agent as agent_kinds
from ppf.fitting.learning import agent_steps
from ppf.model.grid import Grid

SMALL = Grid(llama_structure(8, 128, 4, 2, 16, 384), 64)  # 79 levels to decide on
MIDDLE = Grid(llama_structure(16, 256, 4, 2, 32, 768), 64)  # a 14M Llama's
LARGE = Grid(llama_structure(32, 4096, 8, 4, 128, 14336), 64)


@pytest.mark.parametrize("grid", [MIDDLE, LARGE])
@pytest.mark.parametrize("rows", [250, 4000])
@pytest.mark.parametrize(("effort", "steps"), [(0.5, 200), (2.0, 800)])
def test_full_length_where_it_was_found(grid, rows, effort, steps):
    assert agent_steps(grid, rows, "pathwise", effort) == steps


@pytest.mark.parametrize("effort", [0.5, 1.0, 2.0])
def test_less_for_small_models_and_few_rows(effort):
    by_rows = [agent_steps(SMALL, rows, "pathwise", effort) for rows in (24, 60, 120, 250, 1000)]
    assert by_rows == sorted(by_rows) and by_rows[-1] == by_rows[-2] < 400 * effort * 0.5
    assert 50 <= by_rows[0] < agent_steps(LARGE, 24, "pathwise", 2 * effort)


def test_never_more_than_asked_for():
    assert agent_steps(LARGE, 24, "pathwise", 0.05) == 20


def test_every_way_of_training_but_the_default_takes_its_full_length():
    for kind in set(agent_kinds.TRAINERS) - {agent_kinds.DEFAULT}:
        assert agent_steps(SMALL, 24, kind, 1.0) == 400

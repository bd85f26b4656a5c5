"""Waves of policies: shared beginnings, moves, and what happens when memory ends."""

import pytest
import torch
from factories import dense_weights, random_ranking, tokens
from test_evaluation import population

from ppf.errors import InputError
from ppf.fast import layer_major
from ppf.fast.layer_major import LayerMajor
from ppf.fast.one_by_one import OneByOne
from ppf.fast.permute import permuted
from ppf.fast.plan import executed, order, shared
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid

IDS = tokens(5, 24)


def model() -> tuple[Decoder, Grid, list[list[int]]]:
    _, decoder = dense_weights()
    grid = Grid(decoder.structure, 8)
    levels = [executed(row) for row in grid.encode(population(grid)).tolist()]
    return permuted(decoder, random_ranking(decoder.structure)), grid, levels


class Counting(OneByOne):
    """Counts the sub-layers that are run."""

    runs = 0

    def advance(self, index, kind, states, moves):
        self.runs += sum(level > 0 for _, level in moves)
        return super().advance(index, kind, states, moves)


class Full(OneByOne):
    """Has memory for so many states only."""

    limit = 3

    def advance(self, index, kind, states, moves):
        if sum(len(states[source]) for source, _ in moves) > self.limit:
            raise torch.OutOfMemoryError
        return super().advance(index, kind, states, moves)


def test_every_distinct_beginning_is_run_once():
    decoder, grid, levels = model()
    stepper = Counting(decoder, grid, None)
    engine = LayerMajor(decoder, grid, IDS, stepper)
    engine.losses(levels)
    dense = executed(grid.maximum)
    start = min(shared(dense, row) for row in levels)
    beginnings = {tuple(row[:depth]) for row in levels for depth in range(start + 1, len(dense) + 1) if row[depth - 1]}
    assert stepper.runs == len(beginnings) + start < sum(sum(level > 0 for level in row) for row in levels)
    assert order([[1, 2], [3, 0], [1, 3]]) == [1, 2, 0]


@pytest.mark.parametrize("wave", [1, 2, 5, 100])
def test_waves_of_any_size_give_the_same(wave):
    decoder, grid, levels = model()
    engine = LayerMajor(decoder, grid, IDS, OneByOne(decoder, grid, None))
    expected = engine.losses(levels)
    engine.wave = wave
    assert torch.equal(engine.losses(levels), expected)
    assert len(set(expected.tolist())) > 4


def test_a_wave_that_does_not_fit_is_halved():
    decoder, grid, levels = model()
    expected = LayerMajor(decoder, grid, IDS, OneByOne(decoder, grid, None)).losses(levels)
    stepper = Full(decoder, grid, None)
    stepper.limit = 2 * len(IDS)
    engine = LayerMajor(decoder, grid, IDS, stepper)
    with pytest.warns(UserWarning, match=rf"ppf: {len(levels)} policies at once do not fit .* going on with"):
        found = engine.losses(levels)
    assert torch.equal(found, expected) and engine.wave <= 4


def test_so_is_the_text_of_one_policy():
    decoder, grid, levels = model()
    expected = LayerMajor(decoder, grid, IDS, OneByOne(decoder, grid, None)).losses(levels)
    engine = LayerMajor(decoder, grid, IDS, Full(decoder, grid, None))
    with pytest.warns(UserWarning, match="5 sequences of one policy do not fit .* going on with 3 at once"):
        found = engine.losses(levels)
    assert [len(part) for part in engine.parts] == [3, 2]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:ppf")
def test_one_sequence_that_does_not_fit_is_an_error():
    decoder, grid, levels = model()
    stepper = Full(decoder, grid, None)
    stepper.limit = 0
    with pytest.raises(InputError, match="sequence-length = 24 tokens: .* --weights host"):
        LayerMajor(decoder, grid, IDS, stepper).losses(levels)


def test_memory_sets_the_size_of_a_wave(monkeypatch):
    decoder, grid, _ = model()
    state = IDS.numel() * grid.structure.hidden * 4
    monkeypatch.setattr("ppf.memory.room", lambda _: 100 * state)
    engine = LayerMajor(decoder, grid, IDS, OneByOne(decoder, grid, None))
    assert engine.wave == 30 and engine._deepest == 10
    assert layer_major._LARGEST_WAVE > 30

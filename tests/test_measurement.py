"""Measuring many policies: in order, each once, the same rows wherever a call was interrupted."""

from dataclasses import replace

import pytest
import torch
from factories import dense_weights, random_ranking, tokens

from ppf.choose.candidates.sampling import random_levels
from ppf.errors import PPFError
from ppf.fast.permute import permuted
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.evaluation.measurement import measure, measure_many
from ppf.fitting.experience import Experience
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting(Evaluator):
    calls = 0
    dies_after = None
    chunk = 3

    def log_perplexities(self, policies, tokens=None):
        self.calls += 1
        if self.dies_after is not None and self.calls > self.dies_after:
            raise KeyboardInterrupt
        return super().log_perplexities(policies, tokens)


@pytest.fixture
def evaluator() -> Counting:
    _, decoder = dense_weights()
    return Counting(permuted(decoder, random_ranking(decoder.structure)), Grid(decoder.structure, 8), tokens(2, 12))


@pytest.fixture
def policies(evaluator):
    generator = torch.Generator().manual_seed(3)
    return evaluator.grid.decode(random_levels(evaluator.grid, torch.linspace(0.1, 0.6, 10), generator))


def plain(store: Experience) -> list:
    return [replace(row, seconds=0.0) for row in store.rows()]


def test_values_and_rows_stand_in_the_order_asked(tmp_path, evaluator, policies):
    store = Experience(tmp_path / "store")
    known = measure(evaluator, store, policies[4], 0, "random")
    asked = [*policies, policies[2]]
    sources = [f"s{index}" for index in range(len(asked))]
    values = measure_many(evaluator, store, asked, 1, sources)
    assert values[4] == known and values[-1] == values[2] and len(set(values)) == len(policies)
    assert values[:-1] == [evaluator.log_perplexity(policy) for policy in policies]
    rows = store.rows()
    assert [row.policy for row in rows] == [policies[4], *policies[:4], *policies[5:]]
    assert [row.source for row in rows] == ["random", "s0", "s1", "s2", "s3", "s5", "s6", "s7", "s8", "s9"]
    assert all(row.ratio == evaluator.grid.ratio(row.policy) and row.seconds > 0 for row in rows)
    before = evaluator.calls
    assert measure_many(evaluator, store, asked, 2, "again") == values and evaluator.calls == before


def test_an_interrupted_call_ends_with_the_same_rows(tmp_path, evaluator, policies):
    whole, killed = Experience(tmp_path / "whole"), Experience(tmp_path / "killed")
    measure_many(evaluator, whole, policies, 0, "random")
    evaluator.calls, evaluator.dies_after = 0, 2
    with pytest.raises(KeyboardInterrupt):
        measure_many(evaluator, killed, policies, 0, "random")
    assert len(killed) == 6
    evaluator.dies_after, evaluator.chunk = None, 4
    measure_many(evaluator, killed, policies, 0, "random")
    assert plain(killed) == plain(whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_overflow_is_an_error_and_not_a_row(tmp_path, monkeypatch, evaluator, policies, value):
    monkeypatch.setattr(evaluator, "log_perplexities", lambda these: [3.0] * (len(these) - 1) + [value])
    store = Experience(tmp_path / "store")
    with pytest.raises(PPFError, match="bfloat16 or float32"):
        measure_many(evaluator, store, policies, 0, "random")
    assert [row.policy for row in store.rows()] == policies[:2]

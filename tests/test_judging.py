"""Tasks in a comparison: the models that are judged are those whose perplexities stand in the cells; kept figures."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from factories import config_of, llama, write_text
from torch import Tensor

import ppf
from ppf.fitting.evaluation.scoring import model_log_perplexity
from ppf.fitting.reader import Reader
from ppf.fitting.session import Session
from ppf.lab.comparison import compare, parse_methods
from ppf.lab.comparison.asis import _cut
from ppf.lab.comparison.judging import Judge
from ppf.lab.comparison.page import tasks_table_of
from ppf.lab.peers import PeerStatistics
from ppf.progress import silent
from ppf.storage.sealed import Sealed

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = parse_methods("wanda-sp as is,flap as is,shortgpt,dynamic")


@dataclass(frozen=True)
class Nats(ppf.Tasks):
    """A harness with tasks of one kind: nats a token of ``sequences``, by the model itself."""

    sequences: Tensor
    calls: list

    def check(self, context: int, resident: bool) -> None:
        assert context >= self.sequences.shape[1] and resident

    def asked(self, name: str) -> dict:
        return {"limit": self.limit, "task": name}

    def score(self, model, tokenizer, progress=silent) -> dict:
        self.calls.append(tuple(self.found))
        value = model_log_perplexity(model, self.sequences[: self.limit])
        figures = {"nats": {"value": value, "stderr": 0.25}, "twice": {"value": 2 * value, "stderr": None}}
        return {name: {"figures": figures, "items": self.limit} for name in self.found}


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    shutil.copytree(tiny_run / "run", folder / "run")
    write_text(folder / "report.txt", words=300, seed=5)
    return folder


@pytest.fixture(scope="module")
def session(folder):
    return Session(ppf.Run(folder / "run"), "cpu")


@pytest.fixture(scope="module")
def report(session, folder) -> Tensor:
    return Reader.of(session.run.model_path, 32).sequences(folder / "report.txt")


def tasks(report: Tensor, names: str, limit: int | None = None) -> Nats:
    return Nats(dict.fromkeys(names.split(",")), None, limit, 8, report, [])


@pytest.fixture(scope="module")
def judged(folder, session, report):
    """A comparison's data and what was asked of the harness for it."""
    asked = tasks(report, "a")
    return compare(session, folder / "report.txt", folder / "out", METHODS, [0.4], tasks=asked), asked.calls


def test_what_is_judged_is_what_was_measured(judged, session, report):
    """Of every method: refitted or not, with a ranking of its own or with FLAP's biases."""
    data, calls = judged
    assert len(data["cells"]) == len(METHODS) and calls == [("a",)] * (1 + len(METHODS))
    for cell in data["cells"]:
        found = cell["tasks"]["a"]["figures"]["nats"]["value"]
        assert found == pytest.approx(cell["log_perplexity"], abs=1e-4), cell["label"]
    measured = session.evaluator(sequences=report).log_perplexity(session.run.grid.dense())
    dense = data["dense_tasks"]["a"]["figures"]["nats"]["value"]
    assert dense == pytest.approx(measured, abs=1e-4)
    assert len({round(cell["log_perplexity"], 3) for cell in data["cells"]} | {round(dense, 3)}) == 1 + len(METHODS)


def test_judging_leaves_the_sessions_weights_alone(judged, session):
    before = ppf.evaluate(session.materialize(session.run.grid.dense(), refit=False), session.run.sequences())
    again = ppf.evaluate(session.run.model_path, session.run.sequences(), device="cpu")
    assert before["log_perplexity"] == pytest.approx(again["log_perplexity"], abs=1e-5)


def test_json_page_and_table_show_the_figures(judged, folder):
    data, _ = judged
    assert json.loads((folder / "out" / "comparison.json").read_text()) == data
    headers, rows = tasks_table_of(data)
    assert headers == ["method", "removed", "a nats", "a twice"] and rows[0][:2] == ["dense", "0%"]
    assert len(rows) == 1 + len(data["cells"]) and tasks_table_of({"cells": []}) is None
    page = (folder / "out" / "comparison.html").read_text()
    for cell in data["cells"]:
        assert f"{cell['tasks']['a']['figures']['nats']['value']:.3f} ± 0.250" in page


def test_what_was_judged_is_not_judged_again(judged, session, report, folder):
    data, _ = judged
    kept = folder / "again"
    kept.mkdir()
    files = Sealed(kept, "a question", "output", "Remove this file")
    for file in (folder / "out" / "tasks").iterdir():
        files.write_json(file.name, json.loads(file.read_text()))
    moments = PeerStatistics.of_run(session.run, session.evaluator(), 0).moments

    def cells(names: str, limit: int | None = None) -> tuple[list, list]:
        asked = tasks(report, names, limit)
        return Judge(session, lambda: moments, asked, files).cells(data["cells"]), asked.calls

    assert cells("a") == (data["cells"], [])
    (one,) = kept.glob("shortgpt-*.json")
    one.unlink()
    more, calls = cells("a,b")
    assert sorted(calls) == [("a",)] + [("b",)] * len(METHODS)
    assert [cell["tasks"]["a"] for cell in more] == [cell["tasks"]["a"] for cell in data["cells"]]
    assert all(list(cell["tasks"]) == ["a", "b"] and cell["tasks"]["a"] == cell["tasks"]["b"] for cell in more)
    fewer, calls = cells("a", limit=3)
    assert len(calls) == len(METHODS) and fewer[0]["tasks"]["a"]["items"] == 3
    other = json.loads(one.read_text())
    other["policy"] = {"attention": [1], "ffn": [8]}
    files.write_json(one.name, other)  # of a cell that has been computed again since
    assert cells("a", limit=3)[1] == [("a",)]
    files.write_json(one.name, {"policy": 3})
    with pytest.raises(ppf.InputError, match="policy"):
        cells("a")
    one.write_text('{"policy": 3}')
    with pytest.raises(ppf.InputError, match="Remove this file"):
        cells("a")


@torch.no_grad()
def test_outputs_with_biases_of_their_own_are_cut():
    """What an output gives of the columns that stay, with both biases; of none, the one given, which has both in it."""
    config = config_of("llama", attention_bias=True, mlp_bias=True)
    x, bias = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, config.hidden_size)
    for kept, given in ((24, None), (24, bias), (0, None), (0, bias)):
        output = llama(config).model.layers[0].mlp.down_proj
        output.bias.normal_(generator=torch.Generator().manual_seed(1))
        own, weight = output.bias.clone(), output.weight.clone()
        _cut(output, kept, given)
        expected = x[:, :kept] @ weight[:, :kept].T
        expected = expected + (own if kept else 0) + (0 if given is None else given)
        torch.testing.assert_close(output(x), expected)

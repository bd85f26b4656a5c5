"""The report card: scores by hand, held-out policies that are new, a killed report that resumes, a page on its own."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cli_cases import answer, ppf
from factories import rewrite_manifest, synthetic_log_perplexity
from structures import llama_structure

from ppf.choose.candidates.sampling import random_levels, random_ratios
from ppf.choose.predictor import make_predictor
from ppf.errors import InputError
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.run import Run
from ppf.fitting.session import Session
from ppf.lab.report import baselines, heldout, report
from ppf.lab.report.metrics import by_ratio, scores
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = Grid(llama_structure(4, 48, 3, 2, 8, 64), 16)


class Killed(BaseException):
    """What stops a report in the middle; no handler of errors may catch it."""


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return random_levels(GRID, random_ratios(count, generator), generator)


@pytest.fixture
def copied(tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_run / "run", tmp_path / "run"))


def test_scores_of_a_case_worked_out_by_hand():
    truth = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = scores(torch.tensor([1.1, 3.0, 2.0, 4.0]), truth, torch.tensor([0.1, 0.1, 1.0, 0.1]))
    assert found["spearman"] == pytest.approx(0.8) and found["kendall"] == pytest.approx(4 / 6)
    assert found["mse"] == pytest.approx((0.01 + 1 + 1) / 4) and found["mae"] == pytest.approx(2.1 / 4)
    assert found["coverage"] == 0.75 and found["policies"] == 4 and found["regret"] == 0
    assert found["spread"] == pytest.approx(1.25**0.5)


def test_regret_is_what_picking_the_ten_best_looking_loses():
    truth = torch.linspace(1, 2, 40)
    assert scores(truth, truth)["regret"] == 0
    backwards = scores(-truth, truth)
    assert backwards["regret"] == pytest.approx(float(truth[30].exp() - truth[0].exp()), rel=1e-5)
    assert backwards["spearman"] == -1 and scores(torch.ones(40), truth)["spearman"] is None


def test_ratios_are_scored_apart():
    """Levels that differ between the ratios rank nothing within them."""
    group = torch.arange(2).repeat_interleave(30)
    truth = torch.randn(60, generator=torch.Generator().manual_seed(0)) + 10 * group
    within = by_ratio(10.0 * group + torch.rand(60), truth, group, [0.2, 0.5])
    assert [s["ratio"] for s in within] == [0.2, 0.5]
    assert all(abs(s["spearman"]) < 0.5 for s in within)
    assert scores(10.0 * group + torch.rand(60), truth)["spearman"] > 0.7


def additive_truth(levels: torch.Tensor) -> torch.Tensor:
    lost = 1 - levels.double() / torch.tensor(GRID.maximum)
    return 3 + (torch.linspace(0.1, 1, GRID.sublayers) * lost.square()).sum(-1)


def test_the_additive_baseline_is_exact_for_what_is_additive():
    values = additive_truth(GRID.encode(baselines.single_policies(GRID))).tolist()
    table = baselines.sensitivity(GRID, values)
    levels = drawn(50)
    torch.testing.assert_close(baselines.additive(table, values[-1], levels), additive_truth(levels))
    assert table[0, 0].isnan()  # layer 0 keeps attention
    assert (table[range(GRID.sublayers), list(GRID.maximum)] == 0).all()


def test_unmeasured_levels_are_interpolated():
    grid = Grid(llama_structure(1, 16, 1, 1, 16, 400), 16)  # 25 levels of the FFN
    levels = baselines.single_levels(grid)
    assert levels[0] == [] and len(levels[1]) == 12 and levels[1][0] == 0
    values = (25 - grid.encode(baselines.single_policies(grid))[:, 1].double()).tolist()
    torch.testing.assert_close(baselines.sensitivity(grid, values)[1], 25 - torch.arange(26.0, dtype=torch.float64))


def test_baselines_learn_what_they_can():
    train, unseen = drawn(300), drawn(100, seed=1)
    values, truth = synthetic_log_perplexity(GRID, train).double(), synthetic_log_perplexity(GRID, unseen).double()
    scale = make_predictor("gp", GRID)
    scale.standardise(values)
    found = {
        "parameters": baselines.parameters(GRID, train, values, unseen),
        "ridge": baselines.ridge(GRID, train, values, unseen, scale),
    }
    if baselines.has_xgboost():
        found["xgboost"] = baselines.xgboost(train, values, unseen, scale, seed=0)
    errors = {name: float((mean - truth).square().mean() / truth.var()) for name, mean in found.items()}
    assert 0.02 < errors["parameters"] < 0.6 and errors["ridge"] < 0.1
    assert errors.get("xgboost", 0) < 0.25


def test_held_out_policies_are_new_distinct_and_at_their_ratio(tiny_run):
    run = Run(tiny_run / "run")
    groups = heldout.held_out_policies(run, [0.2, 0.5], 20)
    trained = {row.policy for row in heldout.training_rows(run)}
    step = max(run.grid.step_cost) / run.structure.decoder_parameters
    for group, size in (("random", 20), ("visited", 10)):
        for ratio, policies in zip([0.2, 0.5], groups[group], strict=True):
            assert len(set(policies)) == len(policies) == size and not trained & set(policies)
            assert all(abs(run.grid.ratio(policy) - ratio) <= step / 2 + 1e-6 for policy in policies)
    assert heldout.held_out_policies(Run(tiny_run / "run"), [0.2, 0.5], 20) == groups


@pytest.fixture(scope="module")
def card(tiny_run, tmp_path_factory) -> dict:
    """A report that was killed after its third chunk and then made twice, the second time from stored measurements."""
    folder = tmp_path_factory.mktemp("report")
    run = Path(shutil.copytree(tiny_run / "run", folder / "run"))
    calls: list[int] = []
    original = Evaluator.log_perplexities

    def counting(self, policies, tokens=None):
        if len(calls) == 3 and not (folder / "killed").exists():
            (folder / "killed").touch()
            raise Killed
        calls.append(len(policies))
        return original(self, policies, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "log_perplexities", counting)
        with pytest.raises(Killed):
            report(Session(Run(run), "cpu"), folder / "out", held_out=20)
        assert not (folder / "out").exists()
        first = report(Session(Run(run), "cpu"), folder / "out", held_out=20, kinds=("mlp",))
        measured = sum(calls)
        second = report(Session(Run(run), "cpu"), folder / "out", held_out=20)
    return {"folder": folder, "run": run, "first": first, "second": second, "measured": measured, "calls": sum(calls)}


def test_a_killed_report_resumes_and_a_second_one_measures_nothing(card):
    rows = Run(card["run"]).store(Path(card["run"]) / heldout.STORE).rows()
    assert card["measured"] == card["calls"] == len(rows) == len({row.policy for row in rows})
    for name in ("scores", "points", "sensitivity", "evaluations", "dense_log_perplexity"):
        assert card["first"][name] == card["second"][name]


def test_what_a_report_holds(card):
    data = card["first"]
    assert data == json.loads(json.dumps(data, allow_nan=False))
    assert json.loads((card["folder"] / "out" / "report.json").read_text()) == card["second"]
    assert {"parameters", "additive", "ridge", "mlp"} <= set(data["rivals"])
    for group, size in (("random", 20), ("visited", 10)):
        assert [s["ratio"] for s in data["scores"][group]] == data["ratios"] == [0.2, 0.3, 0.4, 0.5]
        assert all(s["policies"] == size and 0 <= s["coverage"] <= 1 for s in data["scores"][group])
    rows = heldout.training_rows(Run(card["run"]))
    assert [point["evaluations"] for point in data["curve"]] == [len(rows)] and data["evaluations"] == len(rows)
    assert data["latency"]["milliseconds"] > 0 and data["latency"]["times_faster"] > 0
    evaluator = Session(Run(card["run"]), "cpu").evaluator()
    assert evaluator.log_perplexity(evaluator.grid.dense()) == pytest.approx(data["dense_log_perplexity"], rel=1e-6)


def test_the_page_stands_alone(card):
    html = (card["folder"] / "out" / "report.html").read_text()
    assert html.count("<svg") >= 4 and "<script" not in html
    assert not re.search(r'(?:src|href)="(?!#|data:)', html) and "@import" not in html
    for words in ("Random policies", "Learning curve", "ridge", "What each layer can lose"):
        assert words in html


def test_the_command_prints_one_object(card, tmp_path):
    data = answer("report", card["run"], "--held-out", 20, "--output", tmp_path / "out", "--device", "cpu")
    assert data["scores"] == card["first"]["scores"] and (tmp_path / "out" / "report.html").exists()
    shown = ppf("report", card["run"], "--held-out", 20, "--output", tmp_path / "out", "--device", "cpu").stdout
    assert "random policies, gp" in shown and "Spearman" in shown and "report.html" in shown


@pytest.mark.parametrize(
    ("arguments", "field"), [({"held_out": 19}, "held-out"), ({"kinds": ("forest",)}, "predictor")]
)
def test_mistakes_are_refused_before_any_work(copied, tmp_path, arguments, field):
    with pytest.raises(InputError) as caught:
        report(Session(Run(copied), "cpu"), tmp_path / "out", **arguments)
    assert caught.value.field == field
    assert not (tmp_path / "out").exists() and not (copied / heldout.STORE).exists()


def test_more_policies_than_there_are_is_refused(copied, monkeypatch):
    monkeypatch.setattr(heldout, "_PATIENCE", 1)
    with pytest.raises(InputError, match="held-out = .*too few .* policies") as caught:
        report(Session(Run(copied), "cpu"), held_out=20_000)
    assert caught.value.field == "held-out" and not (copied / heldout.STORE).exists()


def test_an_unfinished_run_has_no_report(copied):
    rewrite_manifest(copied, state="fitting")
    with pytest.raises(InputError, match="not finished"):
        report(Session(Run(copied), "cpu"), held_out=20)

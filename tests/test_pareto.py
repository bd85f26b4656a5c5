"""ppf pareto: the agent's policies and the measured frontier, on every axis there is."""

import json
import math
import shutil

import pytest
from cli_cases import answer, ppf, refusal

from ppf.choose.budget import Profile
from ppf.choose.budget.profile import save_profile
from ppf.fast.timing import Workload
from ppf.fitting.experience import Evaluation
from ppf.fitting.run import Run
from ppf.fitting.session import Session
from ppf.lab.pareto import frontier
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


def row(ratio: float, value: float) -> Evaluation:
    return Evaluation(Policy([1], [8]), value, ratio, 0, "random", 0.0)


def test_the_frontier_is_what_nothing_beats():
    rows = [row(0.2, 3.0), row(0.1, 2.5), row(0.3, 2.9), row(0.3, 3.5), row(0.05, 2.6), row(0.5, 4.0)]
    assert [(r.ratio, r.log_perplexity) for r in frontier(rows)] == [(0.1, 2.5), (0.3, 2.9), (0.5, 4.0)]
    assert frontier([]) == []


def test_figures_are_the_runs(tiny_run, tmp_path):
    data = answer("pareto", tiny_run / "run", "--output", tmp_path / "out")
    run = Run(tiny_run / "run")
    assert json.loads((tmp_path / "out" / "pareto.json").read_text()) == data and list(data["axes"]) == ["weights"]
    assert (tmp_path / "out" / "pareto.html").read_text().count("<svg") >= 1
    for point in data["predicted"][::9]:
        policy = Policy.from_dict(point["policy"])
        assert point["ratio"] == pytest.approx(run.grid.ratio(policy))
        low, high = point["predicted_range"]
        assert low <= point["predicted_perplexity"] <= high
        assert math.log(point["predicted_perplexity"]) == pytest.approx(float(run.predict(policy).mean), abs=1e-4)
    dense = sum(tensor.nbytes for tensor in Session(run, "cpu").decoder.state().values()) / 1e9
    for point in data["measured"]:
        assert point["weights"] <= dense
        assert math.log(point["perplexity"]) == pytest.approx(run.experience.lookup(Policy.from_dict(point["policy"])))


def test_a_profile_adds_latencies(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    grid = Run(tmp_path / "run").grid
    attention, ffn = tuple(range(grid.maximum[0] + 1)), tuple(0.5 * n for n in range(grid.maximum[-1] + 1))
    profiles = [Profile(Workload(phase, 1, 8), 2.0, attention, ffn) for phase in ("prefill", "decode")]
    save_profile(Run(tmp_path / "run").files, {}, profiles)
    data = answer("pareto", tmp_path / "run")
    assert list(data["axes"]) == ["weights", "prompt_pass", "decode_step"]
    point = data["predicted"][0]
    policy = Policy.from_dict(point["policy"])
    steps = sum(policy.attention) + 0.5 * sum(policy.ffn) / 8
    assert point["prompt_pass"] == pytest.approx(2 + steps)
    assert (tmp_path / "run" / "pareto.html").exists()
    assert "prompt pass" in ppf("pareto", tmp_path / "run").stdout


def test_no_run_no_curve(tmp_path):
    refusal("pareto", tmp_path / "none", field="run")

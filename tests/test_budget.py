"""Budgets in every unit: never more than asked, as near as the grid allows, and honest about what can be had."""

import json
import shutil

import pytest
import torch
from cli_cases import answer as told
from cli_cases import refusal

import ppf
from ppf.choose.budget import limit_budget, ratio_budget
from ppf.choose.budget.costs import Costs, parameters, token_flops, weight_bytes
from ppf.choose.budget.projection import Projector
from ppf.cli.prune import budget_line
from ppf.deliver.profiling import Profile, Workload
from ppf.deliver.request import PROFILE, Request, answer, save_profile, verified, weight_costs
from ppf.errors import InputError
from ppf.fitting.run import Run
from ppf.model.grid import Grid
from ppf.model.structure import Structure

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = Grid(Structure(4, 48, 3, 2, 8, 64), 8)


def uneven_profile(grid: Grid, constant: float = 2.0) -> Profile:
    """Milliseconds that jump, stand still and grow again, as measured ones do."""
    attention = tuple(0.11 * n + 0.2 * (n > 1) for n in range(grid.maximum[0] + 1))
    ffn = tuple(0.05 * (n // 2 * 2) + 0.013 * n for n in range(grid.maximum[-1] + 1))
    return Profile(Workload("prefill", 1, 64), constant, attention, ffn)


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A run of one's own, with a profile."""
    folder = tmp_path_factory.mktemp("budget")
    shutil.copytree(tiny_run / "run", folder / "run")
    run = Run(folder / "run")
    prefill = uneven_profile(run.grid)
    decode = Profile(Workload("decode", 4, 64), 0.5, prefill.attention, prefill.ffn)
    save_profile(run.path / PROFILE, {"device": "somewhere"}, [prefill, decode])
    return run


def all_policies(grid: Grid, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    high, low = torch.tensor(grid.maximum), torch.tensor(grid.minimum)
    return (torch.rand(count, grid.sublayers, generator=generator) * (high - low + 1)).long() + low


def test_costs_are_those_of_the_formulas():
    s, levels = GRID.structure, all_policies(GRID, 20)
    assert torch.equal(parameters(GRID).of(levels).long(), GRID.kept(levels))
    assert torch.equal(weight_bytes(GRID, 2, 100).of(levels).long(), 2 * GRID.kept(levels) + 200)
    groups = levels[:, : s.layers].sum(1)
    flops = 2 * GRID.kept(levels) + 4 * 10 * s.group_rows * groups + 2 * s.hidden * 7
    assert torch.equal(token_flops(GRID, 10, 7).of(levels).long(), flops)


def test_weight_bytes_are_those_of_the_checkpoint(run):
    costs = weight_costs(run)
    dense = sum(p.nbytes for p in run.dense.parameters())
    assert costs.range(run.grid)[1] == dense
    policy = run.policy(0.4).policy
    model = run.materialize(policy)
    # Norms of absent sub-layers go too, which no budget counts on.
    absent = policy.attention.count(0) + policy.ffn.count(0)
    expected = sum(p.nbytes for p in model.parameters()) + absent * run.structure.hidden * 4
    assert float(costs.of(run.grid.encode([policy]))[0]) == expected


@pytest.mark.parametrize("costs", [weight_bytes(GRID, 2, 5000), token_flops(GRID, 64, 258)], ids=["bytes", "flops"])
def test_limits_are_kept_within_one_step(costs):
    least, most = costs.range(GRID)
    step = float(costs.table.diff(dim=1)[GRID.structure.layers :].min())
    for share in torch.linspace(0.02, 0.98, 25).tolist():
        limit = least + share * (most - least)
        budget = limit_budget(GRID, "memory-gb", limit, costs, limit)
        levels = budget.levels(torch.randn(8, GRID.sublayers, GRID.levels, generator=torch.Generator().manual_seed(1)))
        found = costs.of(levels)
        assert (found <= limit).all() and (found >= limit - step * (1 + 1e-9)).all()


def test_measured_tables_are_met_closely():
    costs = uneven_profile(GRID).costs(GRID)
    least, most = costs.range(GRID)
    for share in torch.linspace(0.1, 0.95, 18).tolist():
        limit = least + share * (most - least)
        budget = limit_budget(GRID, "latency-ms", limit, costs, limit)
        levels = budget.levels(torch.randn(8, GRID.sublayers, GRID.levels, generator=torch.Generator().manual_seed(2)))
        assert (levels >= torch.tensor(GRID.minimum)).all() and (levels <= torch.tensor(GRID.maximum)).all()
        found = costs.of(levels)
        assert (found <= limit * (1 + 1e-9)).all() and found.median() >= 0.985 * limit and found.min() >= 0.95 * limit


def test_better_utilities_get_the_milliseconds():
    """The dearest sub-layers to prune are kept, whatever the table."""
    costs = uneven_profile(GRID).costs(GRID)
    utility = torch.arange(GRID.levels).float().expand(1, GRID.sublayers, -1).clone()
    utility[0, 5] *= 50
    utility[0, 2] *= 40
    levels = Projector(GRID, costs).meet(utility, torch.tensor([0.5 * float(costs.table[:, -1].sum())]))
    assert levels[0, 5] == GRID.maximum[5] and levels[0, 2] == GRID.maximum[2]
    assert levels[0].sum() < sum(GRID.maximum) - 8


def test_profiles_become_monotone_tables():
    noisy = Profile(Workload("decode", 1, 8), 1.0, (0.0, 0.5, 0.4, 0.9), (0.0, -0.1, 0.2, 0.1, 0.3, 0.3, 0.3, 0.3, 0.4))
    table = noisy.costs(GRID).table
    assert (table.diff(dim=1) >= 0).all() and table[0].tolist()[:4] == [0, 0.5, 0.5, 0.9]
    assert table[7].tolist() == [0, 0, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3, 0.4]
    assert Profile.from_dict(json.loads(json.dumps(noisy.to_dict()))) == noisy


def test_ratio_budgets_are_the_agents_own(run):
    assert answer(run, ratio_budget(run.grid, 0.37)).policy == run.policy(0.37).policy


@pytest.mark.parametrize("kind", ["memory-gb", "flops", "latency-ms", "tokens-per-second"])
def test_answers_in_every_unit(run, kind):
    name = kind.replace("-", "_")
    whole = {
        "memory-gb": lambda: sum(p.nbytes for p in run.dense.parameters()) / 1e9,
        "flops": lambda: token_flops(run.grid, 2048, run.dense.config.vocab_size).range(run.grid)[1],
        "latency-ms": lambda: uneven_profile(run.grid).costs(run.grid).range(run.grid)[1],
        "tokens-per-second": lambda: 4e3 / uneven_profile(run.grid, 0.5).costs(run.grid).range(run.grid)[1],
    }[kind]()
    asked = whole * (1.4 if kind == "tokens-per-second" else 0.7)
    budget = Request(**{name: asked}).budget(run)
    found = answer(run, budget)
    report = verified(run, budget, found.policy, run.materialize(found.policy))
    assert report["predicted"] == pytest.approx(asked, rel=0.03) and report["requested"] == asked
    if kind == "tokens-per-second":
        assert report["predicted"] >= asked * (1 - 1e-9)
    elif kind == "memory-gb":
        assert report["measured"] <= report["predicted"] <= asked and report["within_tolerance"]
    elif kind == "flops":
        assert report["predicted"] <= asked and report["measured"] is None
    data = told("policy", run.path, f"--{kind}", asked)
    assert data["policy"] == {"attention": list(found.policy.attention), "ffn": list(found.policy.ffn)}
    assert data["budget"]["kind"] == kind and data["requested_ratio"] is None


@pytest.mark.parametrize("slower, fine", [(1.0, True), (1.04, True), (1.2, False), (0.8, False)])
def test_a_result_that_is_off_is_said_aloud(run, monkeypatch, slower, fine):
    budget = Request(latency_ms=0.7 * uneven_profile(run.grid).costs(run.grid).range(run.grid)[1]).budget(run)
    policy = answer(run, budget).policy
    monkeypatch.setattr("ppf.deliver.request.milliseconds", lambda *_: slower * budget.delivered(policy))
    report = verified(run, budget, policy, run.materialize(policy))
    assert report["within_tolerance"] is fine and report["off"] == pytest.approx(slower - 1)
    assert ("profile again" in budget_line(report)) is not fine


def test_memory_can_be_searched(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    run = Run(tmp_path / "run")
    asked = 0.7 * sum(p.nbytes for p in run.dense.parameters()) / 1e9
    given = "prune", run.path, "--memory-gb", asked, "--search", 4, "--device", "cpu", "--output", tmp_path / "out"
    report = told(*given)
    assert report["source"] == "search" and report["budget"]["measured"] <= asked
    assert report["requested_ratio"] is None
    assert ppf.load(tmp_path / "out").num_parameters() == report["parameters"]["pruned"]


def test_what_cannot_be_had_is_refused_with_the_range(run, tmp_path):
    for kind in ("memory-gb", "flops", "latency-ms"):
        for value in (1e-12, 1e15, -1):
            message = refusal("policy", run.path, f"--{kind}", value, field=kind)
            assert "from" in message and "below" in message
    for value in (1e-9, 1e9, 0):
        assert "dense model" in refusal("policy", run.path, "--tokens-per-second", value, field="tokens-per-second")
    refusal("policy", run.path, field="ratio")
    message = refusal("policy", run.path, "--ratio", 0.3, "--flops", 1e6, field="budget")
    assert "exactly one" in message
    refusal("prune", run.path, "--flops", 1e6, "--search", 5, "--output", tmp_path / "o", field="search")
    refusal("policy", run.path, "--flops", 1e6, "--context", -1, field="context")


def test_latency_needs_a_readable_profile(tiny_run, run, tmp_path):
    assert "ppf profile" in refusal("policy", tiny_run / "run", "--latency-ms", 3, field="latency-ms")
    shutil.copytree(run.path, tmp_path / "run")
    other = Grid(Structure(4, 48, 3, 2, 8, 64), 16)
    for text in ("{", json.dumps({"profiles": {"prefill": uneven_profile(other).to_dict()}})):
        (tmp_path / "run" / PROFILE).write_text(text)
        refusal("policy", tmp_path / "run", "--latency-ms", 3, field="latency-ms")


def test_a_table_without_freedom_is_no_budget():
    flat = Costs(parameters(GRID).table, 0.0, "parameters")
    with pytest.raises(InputError):
        limit_budget(GRID, "memory-gb", 0, flat, 0)

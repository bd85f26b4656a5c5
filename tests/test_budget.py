"""Budgets in every unit: never more than asked, as near as the grid allows, and honest about what can be had."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from cli_cases import answer as told
from cli_cases import refusal
from factories import dense_weights
from structures import irregular_structure, llama_structure

import ppf
from ppf.choose.budget import (
    BUDGETS,
    PROFILE,
    FlopsBudget,
    LatencyBudget,
    MemoryBudget,
    Profile,
    RatioBudget,
    weight_costs,
)
from ppf.choose.budget.costs import Costs, parameters, token_flops, weight_bytes
from ppf.choose.budget.profile import require_equal_layers, save_profile
from ppf.choose.budget.projection import Projector
from ppf.cli.prune import budget_line
from ppf.deliver.request import Request
from ppf.deliver.results import choose_for, deliver
from ppf.errors import InputError, PPFError
from ppf.fast.permute import identity
from ppf.fast.timing import Workload
from ppf.fitting.materialize import materialize
from ppf.fitting.run import Run
from ppf.fitting.session import Session
from ppf.model.build import policy_of
from ppf.model.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = Grid(llama_structure(4, 48, 3, 2, 8, 64), 8)


def uneven_profile(grid: Grid, constant: float = 2.0) -> Profile:
    """Milliseconds that jump, stand still and grow again, as measured ones do."""
    attention = tuple(0.11 * n + 0.2 * (n > 1) for n in range(grid.maximum[0] + 1))
    ffn = tuple(0.05 * (n // 2 * 2) + 0.013 * n for n in range(grid.maximum[-1] + 1))
    return Profile(Workload("prefill", 1, 64), constant, attention, ffn)


@pytest.fixture(scope="module")
def session(tiny_run, tmp_path_factory):
    """A run of one's own, with a profile and its weights."""
    folder = tmp_path_factory.mktemp("budget")
    shutil.copytree(tiny_run / "run", folder / "run")
    run = Run(folder / "run")
    prefill = uneven_profile(run.grid)
    decode = Profile(Workload("decode", 4, 64), 0.5, prefill.attention, prefill.ffn)
    save_profile(run.files, {"device": "somewhere"}, [prefill, decode])
    return Session(run, "cpu")


@pytest.fixture
def run(session):
    return session.run


def dense_bytes(session: Session) -> int:
    return sum(tensor.nbytes for tensor in session.decoder.state().values())


def all_policies(grid: Grid, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    high, low = torch.tensor(grid.maximum), torch.tensor(grid.minimum)
    return (torch.rand(count, grid.sublayers, generator=generator) * (high - low + 1)).long() + low


def test_costs_are_those_of_the_formulas():
    s, levels = GRID.structure, all_policies(GRID, 20)
    assert torch.equal(parameters(GRID).of(levels).long(), GRID.kept(levels))
    assert torch.equal(weight_bytes(GRID, 2, 100).of(levels).long(), 2 * GRID.kept(levels) + 200)
    groups = levels[:, : s.layers].sum(1)
    flops = 2 * GRID.kept(levels) + 4 * 10 * s.attention[0].columns * groups + 2 * s.hidden * 7
    assert torch.equal(token_flops(GRID, 10, 7).of(levels).long(), flops)


def test_costs_of_layers_that_differ_are_those_of_each_layer():
    grid = Grid(irregular_structure(), 8)
    levels = all_policies(grid, 20)
    assert torch.equal(weight_bytes(grid, 2, 100).of(levels).long(), 2 * grid.kept(levels) + 200)
    assert weight_bytes(grid, 2, 0).range(grid)[1] == 2 * grid.structure.decoder_parameters


def test_weight_bytes_are_those_of_the_checkpoint(session, run):
    costs = weight_costs(run)
    assert costs.range(run.grid)[1] == dense_bytes(session)
    policy = run.policy(0.4).policy
    model = session.materialize(policy)
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
        budget = MemoryBudget(GRID, limit / 1e9, costs)
        levels = budget.levels(torch.randn(8, GRID.sublayers, GRID.levels, generator=torch.Generator().manual_seed(1)))
        found = costs.of(levels)
        assert (found <= limit).all() and (found >= limit - step * (1 + 1e-9)).all()


def test_measured_tables_are_met_closely():
    costs = uneven_profile(GRID).costs(GRID)
    least, most = costs.range(GRID)
    for share in torch.linspace(0.1, 0.95, 18).tolist():
        limit = least + share * (most - least)
        budget = LatencyBudget(GRID, limit, uneven_profile(GRID))
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
    found, expected = run.answer(RatioBudget(run.grid, 0.37)), run.policy(0.37)
    assert replace(found, milliseconds=0) == replace(expected, milliseconds=0)


def test_every_budget_can_be_asked_for():
    assert {kind.name for kind in BUDGETS} == {"ratio", "memory-gb", "flops", "latency-ms", "tokens-per-second"}
    for kind in BUDGETS:
        assert Request(**{kind.name.replace("-", "_"): 0.5}).given == {kind.name: 0.5}


@pytest.mark.parametrize("kind", [kind.name for kind in BUDGETS])
def test_answers_in_every_unit(session, run, kind):
    name = kind.replace("-", "_")
    whole = {
        "ratio": lambda: 0.5,
        "memory-gb": lambda: dense_bytes(session) / 1e9,
        "flops": lambda: token_flops(run.grid, 2048, session.decoder.config.vocab_size).range(run.grid)[1],
        "latency-ms": lambda: uneven_profile(run.grid).costs(run.grid).range(run.grid)[1],
        "tokens-per-second": lambda: 4e3 / uneven_profile(run.grid, 0.5).costs(run.grid).range(run.grid)[1],
    }[kind]()
    asked = whole * (1.4 if kind == "tokens-per-second" else 0.7)
    budget = Request(**{name: asked}).budget(run)
    found = run.answer(budget)
    report = budget.report(found.policy, session.materialize(found.policy))
    assert report["predicted"] == pytest.approx(asked, rel=0.03) and report["requested"] == asked
    assert report["kind"] == kind and report["delivered"] > 0
    if kind == "tokens-per-second":
        assert report["predicted"] >= asked * (1 - 1e-9)
    elif kind == "ratio":
        assert report["delivered"] == pytest.approx(found.delivered_ratio, abs=1e-12) and report["within_tolerance"]
    elif kind == "memory-gb":  # the norms of absent sub-layers go too
        assert report["delivered"] <= report["predicted"] <= asked and report["within_tolerance"]
    elif kind == "flops":
        assert report["delivered"] == report["predicted"] <= asked and report["context"] == 2048
    data = told("policy", run.path, f"--{kind}", asked)
    assert data["policy"] == found.policy.to_dict() and data["budget"]["predicted"] == report["predicted"]
    assert data["budget"]["kind"] == kind and data["requested_ratio"] == (asked if kind == "ratio" else None)


@pytest.mark.parametrize("slower, fine", [(1.0, True), (1.04, True), (1.2, False), (0.8, False)])
def test_a_result_that_is_off_is_said_aloud(session, run, monkeypatch, slower, fine):
    budget = Request(latency_ms=0.7 * uneven_profile(run.grid).costs(run.grid).range(run.grid)[1]).budget(run)
    policy = run.answer(budget).policy
    monkeypatch.setattr("ppf.choose.budget.timed.milliseconds", lambda *_: slower * budget.cost(policy))
    report = budget.report(policy, session.materialize(policy))
    assert report["within_tolerance"] is fine and report["off"] == pytest.approx(slower - 1)
    assert ("profile again" in budget_line(report)) is not fine


def test_memory_can_be_searched(tiny_run, session, tmp_path):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    run = Run(tmp_path / "run")
    asked = 0.7 * dense_bytes(session) / 1e9
    given = "prune", run.path, "--memory-gb", asked, "--search", 4, "--device", "cpu", "--output", tmp_path / "out"
    report = told(*given)
    assert report["policy_from"] == "search" and report["budget"]["delivered"] <= asked
    assert report["requested_ratio"] is None
    assert ppf.load(tmp_path / "out").num_parameters() == report["parameters"]["pruned"]


def test_a_result_over_its_limit_is_not_delivered(run, session, tmp_path, monkeypatch):
    """Whatever goes wrong: what is counted in the result decides, and nothing is left of it."""
    asked = 0.7 * dense_bytes(session) / 1e9
    choice = choose_for(session, Request(memory_gb=asked).budget(run))
    monkeypatch.setattr(MemoryBudget, "delivered", lambda self, model: asked * (1 + 1e-9))
    with pytest.raises(PPFError, match="more than"):
        deliver(session, choice, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_had_is_refused_with_the_range(session, run, tmp_path):
    for kind in ("memory-gb", "flops", "latency-ms"):
        for value in (1e-12, 1e15, -1):
            message = refusal("policy", run.path, f"--{kind}", value, field=kind)
            assert "(the smallest policy)" in message and "(the dense model)" in message
    for value in (1e-9, 1e9, 0):
        assert "dense model" in refusal("policy", run.path, "--tokens-per-second", value, field="tokens-per-second")
    most = dense_bytes(session) / 1e9
    assert f"{most:.6g} (the dense model)" in refusal("policy", run.path, "--memory-gb", 9, field="memory-gb")
    refusal("policy", run.path, field="ratio")
    message = refusal("policy", run.path, "--ratio", 0.3, "--flops", 1e6, field="budget")
    assert "exactly one" in message
    refusal("prune", run.path, "--flops", 1e6, "--search", 5, "--output", tmp_path / "o", field="search")
    refusal("policy", run.path, "--flops", 1e6, "--context", -1, field="context")


def test_latency_needs_a_readable_profile(tiny_run, run, tmp_path):
    assert "ppf profile" in refusal("policy", tiny_run / "run", "--latency-ms", 3, field="latency-ms")
    shutil.copytree(run.path, tmp_path / "run")
    other = Grid(llama_structure(4, 48, 3, 2, 8, 64), 16)
    Run(tmp_path / "run").files.write_json(PROFILE, {"profiles": {"prefill": uneven_profile(other).to_dict()}})
    assert "another grid" in refusal("policy", tmp_path / "run", "--latency-ms", 3, field="latency-ms")
    for profiles in ({}, {"prefill": uneven_profile(run.grid).to_dict() | {"constant": "0.1"}}):
        Run(tmp_path / "run").files.write_json(PROFILE, {"profiles": profiles})
        refusal("policy", tmp_path / "run", "--latency-ms", 3, field="run" if profiles else "latency-ms")
    (tmp_path / "run" / PROFILE).write_text("{")
    message = refusal("policy", tmp_path / "run", "--latency-ms", 3, field="run", value=PROFILE)
    assert "damaged" in message and "ppf profile" in message


def test_a_table_without_freedom_is_no_budget():
    flat = Costs(parameters(GRID).table, 0.0, "parameters")
    with pytest.raises(InputError):
        MemoryBudget(GRID, 0, flat)


def coarse_grid() -> Grid:
    """Attention that goes as a whole, in steps that are dearer than all FFNs together."""
    fine = llama_structure(3, 48, 6, 2, 8, 8)
    return Grid(replace(fine, attention=tuple(replace(a, step=a.units) for a in fine.attention)), 8)


@pytest.mark.parametrize("grid", [coarse_grid(), Grid(irregular_structure(), 8)], ids=["coarse", "irregular"])
def test_a_limit_is_never_passed_whatever_the_steps(grid):
    costs = weight_bytes(grid, 2, 0)
    least, most = costs.range(grid)
    utility = torch.randn(64, grid.sublayers, grid.levels, generator=torch.Generator().manual_seed(3))
    for share in torch.linspace(0.01, 0.99, 25).tolist():
        limit = least + share * (most - least)
        levels = MemoryBudget(grid, limit / 1e9, costs).levels(utility)
        assert (costs.of(levels) <= limit).all()
        assert (levels >= torch.tensor(grid.minimum)).all() and (levels <= torch.tensor(grid.maximum)).all()


def test_layers_that_differ_have_no_latency():
    require_equal_layers(GRID.structure, "latency-ms", "RUN")
    with pytest.raises(InputError, match="layers of this model differ; latency budgets need equal layers"):
        require_equal_layers(irregular_structure(), "latency-ms", "RUN")


def test_budgets_of_any_family_count_what_is_there():
    """The flops of a result are those of its own structure, and its bytes those of its own tensors."""
    _, decoder = dense_weights(family="qwen2")
    grid = Grid(decoder.structure, 8)
    model = materialize(decoder, identity(decoder), grid, grid.decode(all_policies(grid, 1))[0])
    policy = policy_of(model.config)
    ratio = RatioBudget(grid, 0.5)
    assert ratio.delivered(model) == pytest.approx(grid.ratio(policy), abs=1e-12)
    flops = FlopsBudget(grid, 0.5 * token_flops(grid, 64, 258).range(grid)[1], 64, 258)
    assert flops.delivered(model) == flops.cost(policy)

"""Portable policies: what the grid allows, what they cost, and that every export accepts the result."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cli_cases import answer, ppf, refusal
from factories import quick_learning, write_checkpoint, write_text
from structures import irregular_structure, llama_structure

from ppf.choose.budget.projection import projector_of
from ppf.choose.candidates.sampling import mutate, random_levels, uniform_policy
from ppf.deliver import price as price_module
from ppf.deliver.export import open_source, to_deci, to_gguf, to_hf, to_vllm
from ppf.deliver.export.routes import routes
from ppf.deliver.portable import choose_portable, portable_grid
from ppf.errors import InputError
from ppf.fitting.run import Run, Settings
from ppf.fitting.run.settings import portable_settings
from ppf.fitting.session import Session
from ppf.fitting.stages import fit
from ppf.model.grid import PORTABLE_MULTIPLE, Grid, portable_multiple
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
STRUCTURE = llama_structure(4, 48, 3, 2, 8, 1024)
GRID = Grid(STRUCTURE, 256, portable=True)
QUICK = ("--evaluations", 40, "--sequence-length", 32, "--calibration-tokens", 2048, "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of 1,024 channels with an ordinary run of it."""
    from export_cases import bpe_tokenizer

    folder = tmp_path_factory.mktemp("portable")
    changes = {"intermediate_size": 1024, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    write_checkpoint(folder / "model", **changes)
    bpe_tokenizer().save_pretrained(folder / "model")
    write_text(folder / "text.txt", words=1500)
    settings = Settings(evaluations=40, sequence_length=32, calibration_tokens=2048)
    with pytest.MonkeyPatch.context() as patch:
        quick_learning(patch)
        fit(folder / "model", folder / "text.txt", folder / "run", settings=settings, device="cpu")
    return folder


def is_portable(policy: Policy, groups: int = 3, step: int = 256) -> bool:
    return set(policy.attention) == {groups} and not any(width % step for width in policy.ffn)


@pytest.mark.parametrize(("channels", "step"), [(11008, 256), (768, 256), (384, 192), (64, 64), (1000, 250)])
def test_multiple(channels, step):
    structure = llama_structure(2, 64, 4, 1, 16, channels)
    assert portable_multiple(structure) == step
    assert portable_settings(Settings(), structure).ffn_multiple in (step, 64)
    assert portable_settings(Settings(), structure).ffn_multiple % step == 0


def test_everything_that_makes_policies_stays_on_the_portable_grid():
    generator = torch.Generator().manual_seed(0)
    ratio = torch.linspace(0.1, 0.6, 40)
    levels = random_levels(GRID, ratio, generator)
    mutants = mutate(levels, GRID, generator, ratio=ratio)
    for policy in [*GRID.decode(levels), *GRID.decode(mutants), uniform_policy(GRID, 0.3), GRID.dense()]:
        assert is_portable(policy)
        GRID.check(policy)
    # Budgets are met within half a step of the FFN, the only one there is.
    target = (1 - ratio.double()) * STRUCTURE.decoder_parameters
    assert (GRID.kept(mutants) - target).abs().max() <= 256 * STRUCTURE.ffn[0].cost / 2 + 1
    assert len({tuple(row) for row in levels.tolist()}) > 20


def test_maximum_ratio_leaves_all_attention():
    attention = sum(sublayer.units * sublayer.cost for sublayer in STRUCTURE.attention)
    assert GRID.maximum_ratio == pytest.approx(1 - attention / STRUCTURE.decoder_parameters)
    with pytest.raises(InputError, match="all attention"):
        uniform_policy(GRID, GRID.maximum_ratio + 0.01)
    assert projector_of(GRID, torch.device("cpu")).minimum.tolist() == [3] * 4 + [0] * 4


@pytest.mark.parametrize("policy", [Policy([3, 3, 2, 3], [256] * 4), Policy([3] * 4, [256, 64, 256, 256])])
def test_other_policies_are_off_the_portable_grid(policy):
    with pytest.raises(InputError, match="off the grid"):
        GRID.check(policy)


def test_pruning_an_ordinary_run_portably_says_what_it_costs(folder, tmp_path):
    report = answer("prune", folder / "run", "--ratio", 0.35, "--portable", "--output", tmp_path / "out")
    policy, session = Policy.from_dict(report["policy"]), Session(Run(folder / "run"), "cpu")
    assert is_portable(policy) and report["policy_from"] == "portable" and abs(report["delivered_ratio"] - 0.35) < 0.04
    assert report["requested_ratio"] == 0.35 and report["budget"]["delivered"] == report["delivered_ratio"]
    cost, free = report["portable"], Policy.from_dict(report["portable"]["unrestricted"]["policy"])
    assert free == session.run.policy(report["delivered_ratio"]).policy
    assert not is_portable(free, step=64) and abs(session.run.grid.ratio(free) - report["delivered_ratio"]) < 0.01
    evaluator = session.evaluator()
    assert cost["perplexity"] == pytest.approx(math.exp(evaluator.log_perplexity(policy)), rel=1e-4)
    assert cost["unrestricted"]["perplexity"] == pytest.approx(math.exp(evaluator.log_perplexity(free)), rel=1e-4)
    assert cost["cost"] == pytest.approx(cost["perplexity"] / cost["unrestricted"]["perplexity"] - 1)
    assert report["measured"]["perplexity"] == pytest.approx(cost["perplexity"], rel=1e-3)
    assert report["routes"] == dict.fromkeys(("hf", "gguf", "vllm", "deci"))
    shown = ppf("prune", folder / "run", "--ratio", 0.35, "--portable", "--output", tmp_path / "out", "--force").stdout
    assert f"{cost['cost']:+.1%} perplexity" in shown and "export to deci" in shown
    source = open_source(tmp_path / "out")
    for write in (to_hf, to_gguf, to_vllm, to_deci):
        write(source, tmp_path / write.__name__)


def test_the_best_of_what_was_measured_is_chosen_and_the_same_again(folder):
    run = Run(folder / "run")
    choice, again = (choose_portable(Session(opened, "cpu"), 0.4) for opened in (run, Run(folder / "run")))
    assert (choice.policy, choice.portable) == (again.policy, again.portable)
    near = [row for row in run.experience.rows() if is_portable(row.policy) and abs(row.ratio - 0.4) < 0.03]
    assert len(near) >= 3 and choice.portable["perplexity"] == pytest.approx(
        math.exp(min(row.log_perplexity for row in near))
    )


def test_a_portable_fit_learns_portable_policies_only(folder, tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    arguments = ("fit", folder / "model", "--text", folder / "text.txt", "--output", tmp_path / "run", *QUICK)
    facts = answer(*arguments, "--portable")
    assert facts["settings"]["portable"] is True and facts["settings"]["ffn_multiple"] == PORTABLE_MULTIPLE
    run = Run(tmp_path / "run")
    assert all(is_portable(row.policy) for row in run.experience.rows())
    check_prices(run, facts["portable"])
    assert answer(*arguments, "--portable")["portable"] == facts["portable"]  # resumed: measured once
    report = answer("prune", tmp_path / "run", "--ratio", 0.4, "--search", 6, "--output", tmp_path / "out")
    assert is_portable(Policy.from_dict(report["policy"])) and report["routes"]["deci"] is None
    refusal(*arguments, field="output", value="run")  # resuming it without --portable is another question


def check_prices(run: Run, prices: list[dict]) -> None:
    """The portable figure is the run's own answer; the other one is lower, and of a policy off the portable grid."""
    assert [round(price["ratio"], 1) for price in prices] == [0.3, 0.5]
    session = Session(run, "cpu")
    free = price_module._free(session)
    assert free.grid == Grid(run.structure, 64)
    for price, ratio in zip(prices, (0.3, 0.5), strict=True):
        answer = run.policy(ratio)
        assert price["perplexity"] == pytest.approx(
            math.exp(session.evaluator().log_perplexity(answer.policy)), rel=1e-5
        )
        assert price["ratio"] == answer.delivered_ratio and price["evaluations"] == 8
        assert price["cost"] == pytest.approx(price["perplexity"] / price["unrestricted"] - 1) and price["cost"] >= 0
    assert any(price["cost"] > 0 for price in prices)
    # The library serves the widths of both grids: the evaluators agree where both can look.
    policy = run.policy(0.4).policy
    assert free.log_perplexity(policy) == pytest.approx(session.evaluator().log_perplexity(policy), rel=1e-5)


@pytest.mark.parametrize("extra", [("--search", 5), ("--memory-gb", 0.001)])
def test_what_an_ordinary_run_cannot_do_portably_is_refused(folder, tmp_path, extra):
    size = () if "--memory-gb" in extra else ("--ratio", 0.3)
    arguments = ("prune", folder / "run", *size, "--portable", *extra, "--output", tmp_path / "out")
    result = ppf(*arguments)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()


def test_a_run_whose_widths_miss_the_portable_ones_is_refused():
    class Missing:
        structure, grid = STRUCTURE, Grid(STRUCTURE, 512)

    assert portable_grid(Missing).ffn_multiple == 512
    Missing.structure = llama_structure(4, 48, 3, 2, 8, 384)
    Missing.grid = Grid(Missing.structure, 128)
    with pytest.raises(InputError, match="--portable"):
        portable_grid(Missing)


def test_portable_policies_of_layers_that_differ_keep_what_attention_there_is():
    grid = Grid(irregular_structure(), 16, portable=True)
    generator = torch.Generator().manual_seed(0)
    for policy in grid.decode(random_levels(grid, torch.linspace(0.05, 0.3, 20), generator)):
        assert policy.attention == (2, 3, 3, 0, 0, 1) and not any(width % 16 for width in policy.ffn)


def test_routes_say_what_each_reader_would_refuse(tmp_path):
    from export_cases import write_random

    found = routes(open_source(write_random(tmp_path / "in", Policy([3, 0, 1, 3], [64, 40, 0, 64]))))
    assert found["hf"] is None and found["gguf"] is None and found["vllm"] is None
    assert "layer 2" in found["deci"]

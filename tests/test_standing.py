"""The same command again, when its output is complete and just that, says so and ends well; any other is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from checkpoint_cases import edit_json, edit_report
from cli_cases import ppf, refusal
from factories import quick_learning

from ppf.deliver.recovery.state import Unfinished
from ppf.storage import locks


def again(*command: object) -> None:
    """The command succeeds, and its output is what it was, to the moment of writing."""
    output = command[command.index("--output") + 1]
    before = {file.name: file.stat().st_mtime_ns for file in output.iterdir()}
    with pytest.warns(UserWarning, match="holds exactly this already: nothing was "):
        result = ppf(*command)
    assert result.exit_code == 0, result.stderr
    assert {file.name: file.stat().st_mtime_ns for file in output.iterdir()} == before


def first(*command: object) -> None:
    assert ppf(*command).exit_code == 0
    again(*command)


def refuse(*command: object) -> None:
    assert "exists and is not empty" in refusal(*command, field="output")


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    return shutil.copytree(tiny_run / "run", tmp_path_factory.mktemp("standing") / "run")


@pytest.fixture(scope="module")
def pruned(run):
    out = run.parent / "out"
    assert ppf("prune", run, "--ratio", "0.3", "--output", out, "--device", "cpu").exit_code == 0
    return out


def test_a_pruned_checkpoint(run, pruned, tmp_path):
    command = ["prune", run, "--ratio", "0.3", "--output", pruned, "--device", "cpu"]
    (pruned.parent / ".out.ppf-lock").write_text("{}")  # as of a command that was killed at its very end
    again(*command)
    assert sorted(place.name for place in pruned.parent.iterdir()) == ["out", "run"]
    for other in (["--ratio", "0.30000001"], ["--memory-gb", "0.0003"], ["--ratio", "0.3", "--search", "4"]):
        refuse("prune", run, *other, "--output", pruned, "--device", "cpu")
    changed = shutil.copytree(pruned, tmp_path / "changed")
    (changed / "generation_config.json").write_text("{}")
    refuse(*[changed if part is pruned else part for part in command])


def test_a_searched_one(run, tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    first("prune", run, "--ratio", "0.5", "--search", "3", "--output", tmp_path / "out", "--device", "cpu")
    refuse("prune", run, "--ratio", "0.5", "--search", "4", "--output", tmp_path / "out", "--device", "cpu")
    refuse("prune", run, "--ratio", "0.5", "--output", tmp_path / "out", "--device", "cpu")


def test_an_export(pruned, tmp_path):
    command = ["export", pruned, "--to", "hf", "--output", tmp_path / "hf"]
    first(*command)
    refuse("export", pruned, "--to", "vllm", "--output", tmp_path / "hf")
    other = shutil.copytree(pruned, tmp_path / "other")
    edit_report(other, policy_from="given")
    refuse("export", other, "--to", "hf", "--output", tmp_path / "hf")
    edit_json(tmp_path / "hf" / "ppf.json", policy_from="given")  # what says no more what was written
    refuse(*command)


def test_a_recovered_one_also_if_its_state_is_still_there(tiny_run, pruned, tmp_path):
    command = [
        "recover", pruned, "--text", tiny_run / "text.txt", "--output", tmp_path / "out", "--tokens", 512,
        "--batch-tokens", 256, "--sequence-length", 32, "--method", "norms", "--device", "cpu",
    ]  # fmt: skip
    first(*command)
    question = json.loads((tmp_path / "out" / "ppf.json").read_text())["recovery"]["question"]
    Unfinished(tmp_path / "out", question).begin()  # as if killed when the result stood
    again(*command)
    assert [place.name for place in tmp_path.iterdir()] == ["out"]
    refuse(*command, "--seed", 1)


def test_a_fit(tiny_run):
    again(
        "fit", tiny_run / "model", "--text", tiny_run / "text.txt", "--output", tiny_run / "run", "--evaluations", 40,
        "--ffn-multiple", 8, "--sequence-length", 32, "--calibration-tokens", 2048, "--device", "cpu",
    )  # fmt: skip


def test_wait_is_heard_by_the_lock(run, pruned):
    command = ["prune", run, "--ratio", "0.3", "--output", pruned, "--device", "cpu"]
    for option, patient in ([], False), (["--wait"], True), ([], False):
        assert ppf(*command, *option).exit_code == 0
        assert locks._patient.get() is patient

"""The command line on a tiny run: what each command prints and writes."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from cli_cases import answer, fit_arguments, ppf, rows
from factories import quick_learning

from ppf import checkpoint
from ppf.checkpoint import hashes
from ppf.errors import printable
from ppf.fitting.run import Run
from ppf.fitting.session import Session
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_learning(monkeypatch)


@pytest.fixture
def run(tiny_run) -> Path:
    return tiny_run / "run"


@pytest.fixture(scope="module")
def pruned(tiny_run, tmp_path_factory) -> Path:
    """A result at 30 %; do not change it."""
    output = tmp_path_factory.mktemp("pruned") / "out"
    assert ppf("prune", tiny_run / "run", "--ratio", 0.3, "--output", output).exit_code == 0
    return output


def test_fit_reports_the_run(tiny_run, tmp_path):
    facts = answer(*fit_arguments(tiny_run / "model", tiny_run / "text.txt", tmp_path / "run"))
    assert facts["state"] == "complete" and facts["experience"]["rows"] == 40 and facts["seconds"] > 0
    assert rows(tmp_path / "run") == rows(tiny_run / "run")  # the same question has the same answer


def test_policy_is_the_runs_answer(run):
    data, expected = answer("policy", run, "--ratio", 0.37), Run(run).policy(0.37)
    assert Policy.from_dict(data["policy"]) == expected.policy and data["milliseconds"] > 0
    assert data["delivered_ratio"] == Run(run).grid.ratio(expected.policy) and data["requested_ratio"] == 0.37
    assert data["predicted"]["log_perplexity"] == pytest.approx(expected.predicted_log_perplexity)
    text = ppf("policy", run, "--ratio", 0.37).stdout
    assert "0.37 requested" in text and f"{data['predicted']['perplexity']:.2f}" in text
    assert sum("█" in line or "░" in line for line in text.splitlines()) == 4  # one bar line a layer


def test_prune_writes_a_checkpoint_with_its_facts(run, pruned, tiny_run):
    report = json.loads((pruned / "ppf.json").read_text())
    session, policy = Session(Run(run), "cpu"), Policy.from_dict(report["policy"])
    opened, answer = session.run, session.run.policy(0.3)
    assert (policy, report["policy_from"]) == (answer.policy, answer.source) and report["source"] is None
    assert report["requested_ratio"] == 0.3 and report["delivered_ratio"] == opened.grid.ratio(policy)
    assert report["seed"] == 0 and report["settings"] == opened.settings.to_dict() and report["versions"]["torch"]
    protocol = report["measured"]["protocol"]
    assert protocol["text"] == str(tiny_run / "text.txt") and protocol["sequence_length"] == 32
    assert protocol["tokens"] == opened.sequences().numel()
    assert report["measured"]["log_perplexity"] == pytest.approx(session.evaluator().log_perplexity(policy), rel=1e-5)
    assert report["dense"]["log_perplexity"] == opened.experience.lookup(opened.grid.dense())
    assert report["predicted"]["log_perplexity"] == pytest.approx(float(opened.predict(policy).mean))
    sizes = {"dense": checkpoint.load(tiny_run / "model"), "pruned": checkpoint.load(pruned)}
    assert report["parameters"] == {name: model.num_parameters() for name, model in sizes.items()}
    assert report["budget"]["requested"] == 0.3 and report["budget"]["delivered"] == report["delivered_ratio"] != 0.3


def test_search_finds_at_least_the_agents_policy(run, pruned, tiny_run, tmp_path):
    own = Path(shutil.copytree(run, tmp_path / "run"))
    before = len(rows(own))
    found = answer("prune", own, "--ratio", 0.3, "--search", 12, "--output", tmp_path / "found")
    assert found["policy_from"] == "search" and found["search_evaluations"] == 12
    agents = json.loads((pruned / "ppf.json").read_text())
    assert found["measured"]["perplexity"] <= agents["measured"]["perplexity"] * (1 + 1e-6)
    assert before < len(rows(own)) <= before + 12


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_policy_of_ones_own(run, tmp_path, wrapped):
    policy = Policy([3, 2, 0, 1], [64, 0, 8, 32]).to_dict()
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"policy": policy} if wrapped else policy))
    report = answer("prune", run, "--policy", file, "--output", tmp_path / "out")
    assert report["policy"] == policy and report["policy_from"] == "given"
    assert report["requested_ratio"] is None and report["budget"] is None
    assert answer("info", tmp_path / "out")["policy"] == policy


def test_force_replaces_a_result(run, tmp_path):
    output = tmp_path / "out"
    first = answer("prune", run, "--ratio", 0.2, "--output", output)
    second = answer("prune", run, "--ratio", 0.5, "--output", output, "--force")
    assert json.loads((output / "ppf.json").read_text())["policy"] == second["policy"] != first["policy"]


def test_eval_agrees_with_what_prune_measured(run, pruned, tiny_run, tmp_path):
    """On the run's own evaluation text, the reloaded checkpoint scores what the model scored before it was saved."""
    opened = Run(run)
    tokenizer = checkpoint.load_tokenizer(tiny_run / "model")
    text = tmp_path / "evaluation.txt"
    text.write_text("".join(tokenizer.decode(ids) for ids in opened.sequences()))
    data = answer("eval", pruned, "--text", text, "--sequence-length", 32)
    report = json.loads((pruned / "ppf.json").read_text())
    assert data["log_perplexity"] == pytest.approx(report["measured"]["log_perplexity"], rel=1e-6)
    assert data["perplexity"] == math.exp(data["log_perplexity"])
    assert (data["dtype"], data["device"]) == ("float32", "cpu") and data["seconds"] > 0


def test_eval_names_its_protocol(tiny_run):
    text = tiny_run / "text.txt"
    data = answer("eval", tiny_run / "model", "--text", text, "--sequence-length", 64, "--tokens", 640)
    protocol = data["protocol"]
    assert (protocol["tokens"], protocol["sequence_length"], protocol["text"]) == (640, 64, str(text))
    assert protocol["sha256"] == hashes.sha256_of(text) and "evenly spaced" in protocol["part"]
    shown = ppf("eval", tiny_run / "model", "--text", text, "--sequence-length", 64, "--tokens", 640).stdout
    for fact in ("640", "64", "text.txt", "float32", f"{data['perplexity']:.4f}", f"{data['log_perplexity']:.6f}"):
        assert fact in shown


def test_eval_computes_in_the_dtype_asked_for(tiny_run, monkeypatch):
    arguments = ("eval", tiny_run / "model", "--text", tiny_run / "text.txt", "--sequence-length", 64, "--tokens", 640)
    full, half = answer(*arguments), answer(*arguments, "--dtype", "bfloat16")
    assert half["dtype"] == "bfloat16" and half["log_perplexity"] != full["log_perplexity"]
    assert half["log_perplexity"] == pytest.approx(full["log_perplexity"], rel=0.02)


def test_generate_is_what_the_model_says(pruned):
    data = answer("generate", pruned, "--prompt", "the river", "--max-new-tokens", 9)
    model, tokenizer = checkpoint.load(pruned), checkpoint.load_tokenizer(pruned)
    ids = tokenizer("the river", return_tensors="pt")["input_ids"]
    for _ in range(data["tokens"]):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    assert data["text"] == tokenizer.decode(ids[0], skip_special_tokens=True) and 1 <= data["tokens"] <= 9
    # A terminal gets control characters, which a small model is capable of, as escapes.
    shown = ppf("generate", pruned, "--prompt", "the river", "--max-new-tokens", 9).stdout
    assert shown == printable(data["text"]) + "\n"


def test_a_full_gpu_is_one_line(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Session, "pruned_tensors", full)
    failed = ppf("prune", run, "--ratio", 0.3, "--output", tmp_path / "out")
    told = [line for line in failed.stderr.splitlines() if line.startswith("Error: ")]
    assert failed.exit_code == 1 and len(told) == 1 and "--weights host" in told[0]
    assert "Traceback" not in failed.stderr and not (tmp_path / "out").exists()


def test_generate_samples_by_seed(pruned):
    def text(seed: int) -> str:
        return answer("generate", pruned, "--prompt", "the", "--temperature", 2, "--seed", seed)["text"]

    assert text(1) == text(1) != text(2)


def test_info_about_runs_and_checkpoints(run, pruned, tiny_run):
    facts = answer("info", run)
    assert facts["kind"] == "run" and facts["experience"]["rows"] == 40 and facts["settings"]["ffn_multiple"] == 8
    assert sum(facts["experience"]["sources"].values()) == 40
    for entry in facts["experience"]["best"]:
        near = [row.log_perplexity for row in rows(run) if abs(row.ratio - entry["near"]) <= 0.02]
        assert entry["perplexity"] == math.exp(min(near))
    assert {0.1, 0.2, 0.3, 0.4, 0.5} <= {entry["near"] for entry in facts["experience"]["best"]}
    assert "40 measured policies" in ppf("info", run).stdout
    facts = answer("info", pruned)
    assert facts["kind"] == "checkpoint" and facts["parameters"] == facts["report"]["parameters"]["pruned"]
    assert facts["structure"] == Run(run).structure.to_dict()
    dense = answer("info", tiny_run / "model")
    assert dense["report"] is None and dense["policy"] == Policy([3] * 4, [64] * 4).to_dict()
    assert "64/64" in ppf("info", tiny_run / "model").stdout and "measured" in ppf("info", pruned).stdout


def test_help_and_version():
    shown = ppf("--help").stdout
    for name in ("fit", "policy", "prune", "eval", "generate", "info", "demo"):
        assert f" {name} " in shown and ppf(name, "--help").exit_code == 0
    assert ppf("--version").stdout.startswith("ppf 0.")

"""The command line on a tiny run: what each command prints, writes and refuses."""

import itertools
import json
import math
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_cases import answer, interrupted, ppf, refusal
from factories import quick_learning, rewrite_manifest, write_checkpoint, write_text
from safetensors.torch import load_file, save_file

from ppf import checkpoint
from ppf.checkpoint import hashes, writing
from ppf.errors import printable
from ppf.fitting.run import Run
from ppf.fitting.session import Session
from ppf.model.policy import Policy
from ppf.storage import files

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ("--sequence-length", 32)
QUICK = ("--evaluations", 40, "--ffn-multiple", 8, "--sequence-length", 32, "--calibration-tokens", 2048)  # as tiny_run


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


@pytest.fixture
def model(tiny_run, tmp_path) -> Path:
    """A copy of the dense model that a test may damage."""
    return Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))


def fit_arguments(model: Path, text: Path, output: Path) -> list:
    return ["fit", model, "--text", text, "--output", output, "--device", "cpu", *QUICK]


def rows(run: Path) -> list:
    return [replace(row, seconds=0.0) for row in Run(run).experience.rows()]


# What commands answer


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
    opened = session.run
    assert policy == opened.policy(0.3).policy and report["policy_from"] == "agent" and report["source"] is None
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


# What commands refuse


def test_a_misspelt_option_is_one_line(run):
    result = ppf("policy", run, "--ratio", "much")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and "--ratio" in result.stderr
    result = ppf("policy", run, "--ratio", "much", "--json")
    assert result.exit_code == 2 and "--ratio" in json.loads(result.stdout)["error"]["problem"]


def no_fit(model: Path, text: Path, output: Path, *extra: object, field: str, value: object = "") -> str:
    """A fit that is refused and leaves nothing behind."""
    before = sorted(output.parent.iterdir())
    message = refusal(*fit_arguments(model, text, output), *extra, field=field, value=value)
    assert sorted(output.parent.iterdir()) == before and not output.exists()
    return message


def test_no_such_folder(tiny_run, tmp_path):
    missing = tmp_path / "missing"
    assert "no such folder" in no_fit(
        missing, tiny_run / "text.txt", tmp_path / "run", field="checkpoint", value=missing
    )
    for command in (
        ["policy", missing, "--ratio", 0.3],
        ["prune", missing, "--ratio", 0.3, "--output", tmp_path / "o"],
    ):
        assert "no such folder" in refusal(*command, field="run", value=missing)
    refusal("eval", missing, "--text", tiny_run / "text.txt", field="checkpoint", value=missing)
    refusal("generate", missing, "--prompt", "the", field="checkpoint", value=missing)
    refusal("info", missing, field="checkpoint", value=missing)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_family(model, tiny_run, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    message = no_fit(model, tiny_run / "text.txt", tmp_path / "run", field="model_type", value="gpt2")
    assert "Known: gemma2, gemma3_text" in message and "docs/families.md" in message


def test_truncated_weights(model, tiny_run, tmp_path):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    no_fit(model, tiny_run / "text.txt", tmp_path / "run", field="safetensors file", value=file)
    refusal("eval", model, "--text", tiny_run / "text.txt", *SHORT, field="safetensors file", value=file)


def test_a_flipped_bit(model, pruned, tiny_run, tmp_path):
    """In a source's header it is seen at once; in a result's weights by the recorded SHA-256."""
    file = model / "model.safetensors"
    flip(file, 40)
    no_fit(model, tiny_run / "text.txt", tmp_path / "run", field="safetensors file", value=file)
    damaged = Path(shutil.copytree(pruned, tmp_path / "damaged"))
    flip(damaged / "model.safetensors", -1000)
    weights = damaged / "model.safetensors"
    message = refusal("eval", damaged, "--text", tiny_run / "text.txt", *SHORT, field="file", value=weights)
    assert "SHA-256" in message


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0x80
    file.write_bytes(data)


def test_a_missing_shard(model, tiny_run, tmp_path):
    loaded = checkpoint.load(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="100KB")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    no_fit(model, tiny_run / "text.txt", tmp_path / "run", field="shard", value=shard)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_weights(model, tiny_run, tmp_path, value):
    file = model / "model.safetensors"
    state = load_file(file)
    state["model.layers.2.mlp.up_proj.weight"][3, 5] = value
    save_file(state, file, metadata={"format": "pt"})
    message = no_fit(model, tiny_run / "text.txt", tmp_path / "run", field="weights", value=file)
    assert "model.layers.2.mlp.up_proj.weight" in message


def test_a_tokenizer_larger_than_the_model(tiny_run, tmp_path):
    """It may know more tokens than the model has rows; a text that yields one is refused."""
    # Byte-level tokenizers write a space as a late token.
    small, plain = write_checkpoint(tmp_path / "small", vocab_size=200, bos_token_id=0, eos_token_id=1), "plain.txt"
    (tmp_path / plain).write_text("river" * 100)
    assert answer("eval", small, "--text", tmp_path / plain, *SHORT)["perplexity"] > 1
    assert "token 220" in refusal("eval", small, "--text", tiny_run / "text.txt", *SHORT, field="text")
    no_fit(small, tiny_run / "text.txt", tmp_path / "run", field="text")


@pytest.mark.parametrize(
    ("content", "problem"), [("", "empty"), (" \n", "empty"), ("short", "shorter"), (None, "read")]
)
def test_unusable_text(tiny_run, tmp_path, content, problem):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_text(content)
    model = tiny_run / "model"
    assert problem in no_fit(model, text, tmp_path / "run", field="text")
    assert problem in refusal("eval", model, "--text", text, *SHORT, field="text")
    if content is not None:
        message = refusal(
            *fit_arguments(model, tiny_run / "text.txt", tmp_path / "run"), "--eval-text", text, field="text"
        )
        assert problem in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("ratio", [0, -0.1, 1, 1.5, math.nan, math.inf, 0.99])
def test_impossible_ratios(run, tmp_path, ratio):
    for extra in ((), ("--search", 5)):
        message = refusal(
            "prune", run, "--ratio", ratio, "--output", tmp_path / "out", *extra, field="ratio", value=ratio
        )
        assert list(tmp_path.iterdir()) == []
        if ratio == 0.99:
            possible = math.floor(1e4 * Run(run).grid.maximum_ratio) / 1e4  # never more than there is
            assert f"{possible:.4f}" in message
    refusal("policy", run, "--ratio", ratio, field="ratio", value=ratio)


def test_an_output_that_is_taken(run, tiny_run, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    prune = ("prune", run, "--ratio", 0.3, "--output")
    assert "--force" in refusal(*prune, output, field="output", value=output)
    assert [file.name for file in output.iterdir()] == ["mine.txt"]
    refusal(*prune, output / "mine.txt", field="output")
    for precious in (tiny_run, run, tiny_run / "model"):  # --force never takes the run or the dense model away
        refusal(*prune, precious, "--force", field="output", value=precious)
    refusal(*fit_arguments(tiny_run / "model", tiny_run / "text.txt", output), field="output", value=output)
    refusal("demo", "--output", output, field="output", value=output)
    assert (output / "mine.txt").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "tpu", "nonsense"])
def test_a_device_that_is_not_there(run, tiny_run, tmp_path, device):
    model, text = tiny_run / "model", tiny_run / "text.txt"
    no_fit(model, text, tmp_path / "run", "--device", device, field="device", value=device)
    out = tmp_path / "out"
    refusal("prune", run, "--ratio", 0.3, "--output", out, "--device", device, field="device", value=device)
    refusal("eval", model, "--text", text, "--device", device, field="device", value=device)
    refusal("generate", model, "--prompt", "the", "--device", device, field="device", value=device)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("evaluations", 0), ("evaluations", -5), ("sequence-length", 0), ("sequence-length", 1), ("ffn-multiple", 0),
        ("ffn-multiple", 24), ("ffn-multiple", 128), ("calibration-tokens", 0), ("evaluation-tokens", 0), ("seed", -1),
        ("ranking", "best"),
    ],
)  # fmt: skip
def test_impossible_settings(tiny_run, tmp_path, option, value):
    model, text = tiny_run / "model", tiny_run / "text.txt"
    no_fit(model, text, tmp_path / "run", f"--{option}", value, field=option, value=value)


def test_impossible_requests_to_eval_and_generate(tiny_run, tmp_path):
    model, text = tiny_run / "model", tiny_run / "text.txt"
    for option, value in (("sequence-length", 0), ("sequence-length", 500), ("tokens", 0), ("dtype", "int8")):
        refusal("eval", model, "--text", text, *SHORT, f"--{option}", value, field=option, value=value)
    for option, value in (("max-new-tokens", 0), ("max-new-tokens", 500), ("temperature", -1), ("temperature", "nan")):
        refusal("generate", model, "--prompt", "the", f"--{option}", value, field=option, value=value)
    for prompt in ("", "  "):
        assert "is empty" in refusal("generate", model, "--prompt", prompt, field="prompt")


def test_a_run_of_another_question(run, tiny_run, tmp_path):
    own = Path(shutil.copytree(run, tmp_path / "run"))
    before = rows(own)
    model, text = tiny_run / "model", tiny_run / "text.txt"
    other = write_checkpoint(tmp_path / "other", seed=1)
    assert "another model" in refusal(*fit_arguments(other, text, own), field="output", value=own)
    other_text = write_text(tmp_path / "other.txt", seed=1)
    assert "another text" in refusal(*fit_arguments(model, other_text, own), field="output", value=own)
    assert "seed = 0, not 1" in refusal(*fit_arguments(model, text, own), "--seed", 1, field="output", value=own)
    assert rows(own) == before


def test_a_run_whose_model_changed(tmp_path, tiny_run):
    folder = Path(shutil.copytree(tiny_run, tmp_path / "moved"))
    rewrite_manifest(folder / "run", model=str(folder / "model"))
    flip(folder / "model" / "model.safetensors", -1000)
    out = tmp_path / "out"
    message = refusal("prune", folder / "run", "--ratio", 0.3, "--output", out, field="model", value=folder / "model")
    assert "fitted on" in message and not out.exists()


@pytest.mark.parametrize(
    ("content", "field", "value"),
    [
        (Policy([3, 3, 3], [64] * 4).to_dict(), "policy.attention", [3, 3, 3]),
        (Policy([3] * 4, [64] * 5).to_dict(), "policy.ffn", [64] * 5),
        (Policy([3] * 4, [64, 64, 60, 64]).to_dict(), "policy.ffn[2]", 60),
        (Policy([3] * 4, [64, 64, 72, 64]).to_dict(), "policy.ffn[2]", 72),
        (Policy([3, 4, 3, 3], [64] * 4).to_dict(), "policy.attention[1]", 4),
        (Policy([0, 3, 3, 3], [64] * 4).to_dict(), "policy.attention[0]", 0),
        (Policy([3, -1, 3, 3], [64] * 4).to_dict(), "policy.attention[1]", -1),
        (Policy([3] * 4, [64] * 4, experts=[8] * 4).to_dict(), "policy", "experts"),
        ({"attention": [3] * 4, "ffn": [64] * 4}, "policy", "format 1"),
        ({"policy": {"attention": [3] * 4, "ffn": [64] * 4}}, "policy", "format 1"),
        ({"format": 3, "widths": {"attention": [3] * 4, "ffn": [64] * 4}}, "policy.format", 3),
        ({"format": 2, "widths": {"attention": [3] * 4}}, "policy.widths", "attention"),
        ({"format": 2, "widths": {"attention": [3.5] * 4, "ffn": [64] * 4}}, "policy.widths.attention", 3.5),
        ([3, 3], "policy.format", "list"),
        ("{", "policy", "policy.json"),
        (None, "policy", "policy.json"),
    ],
)  # fmt: skip
def test_policies_that_do_not_fit(run, tmp_path, content, field, value):
    file = tmp_path / "policy.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    refusal("prune", run, "--policy", file, "--output", tmp_path / "out", field=field, value=value)
    assert not (tmp_path / "out").exists()


def test_requests_that_contradict_each_other(run, tmp_path):
    output = ("--output", tmp_path / "out")
    refusal("prune", run, *output, field="ratio")
    refusal("prune", run, *output, "--policy", "p.json", "--ratio", 0.3, field="ratio", value=0.3)
    refusal("prune", run, *output, "--policy", "p.json", "--search", 9, field="search", value=9)
    refusal("prune", run, *output, "--ratio", 0.3, "--search", 0, field="search", value=0)


def test_no_space_left(run, tiny_run, tmp_path):
    """A real file system of 64 KB: a result and a run do not fit, and leave nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        arguments = ("prune", run, "--ratio", 0.3, "--output", disk / "out")
        assert "no space left" in refusal(*arguments, field="output", value=disk / "out")
        with pytest.MonkeyPatch.context() as patch:  # the estimate passes, the writing fails
            patch.setattr(writing, "require_space", lambda *_: None)
            assert "no space left" in refusal(*arguments, field="output", value=disk / "out")
        assert list(disk.iterdir()) == []
        fit = fit_arguments(tiny_run / "model", tiny_run / "text.txt", disk / "run")
        assert "no space left" in refusal(*fit, field="output", value=disk / "run")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_the_disk_says_is_one_line(run, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, "rename", broken)
    result = ppf("prune", run, "--ratio", 0.3, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "Input/output error" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_fit_resumes(tiny_run, tmp_path, kind):
    """Ctrl-C and kill -9 in a real process: no row is lost or doubled, and the finished run is as if never stopped."""
    output = tmp_path / "run"
    arguments = fit_arguments(tiny_run / "model", tiny_run / "text.txt", output)
    code, errors = interrupted(arguments, output, 15, kind)
    kept = rows(output)
    assert 15 <= len(kept) < 40 and kept == rows(tiny_run / "run")[: len(kept)]
    if kind is signal.SIGINT:
        assert code == 130 and "Traceback" not in errors
        assert [line for line in errors.splitlines() if "Start the same command again" in line]
    else:
        assert code == -signal.SIGKILL
    assert "ppf fit" in refusal("policy", output, "--ratio", 0.3, field="run", value=output)  # not finished yet
    assert answer(*arguments)["state"] == "complete"
    assert rows(output) == rows(tiny_run / "run")


def test_interrupting_another_command_writes_nothing(run, tmp_path, monkeypatch):
    tensors = Session.pruned_tensors

    def interrupted(self, policy):
        """Ctrl-C once some have been written."""
        yield from itertools.islice(tensors(self, policy), 9)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "pruned_tensors", interrupted)
    arguments = ("prune", run, "--ratio", 0.3, "--output", tmp_path / "out")
    result = ppf(*arguments)
    assert result.exit_code == 130 and result.stderr.splitlines()[-1].startswith("Interrupted. Nothing was written")
    assert json.loads(ppf(*arguments, "--json").stdout)["error"]["problem"] == "interrupted"
    assert list(tmp_path.iterdir()) == []

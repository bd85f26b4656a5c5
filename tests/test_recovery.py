"""Recovery training: what it trains, what it writes, that it resumes to the same result, and what it refuses."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_cases import edit_report
from cli_cases import answer, ppf, refusal
from factories import (
    byte_tokenizer,
    llama,
    model_of,
    quick_learning,
    tokens,
    write_checkpoint,
    write_text,
)
from fresh import TESTS
from safetensors.torch import load_file

from ppf import InputError, PPFError, RecoverySettings, Run, Session, Settings, checkpoint, fit, recover
from ppf.checkpoint.report import OWN
from ppf.deliver.recovery import training
from ppf.deliver.recovery.corpus import Corpus
from ppf.deliver.recovery.head import Head, hidden_states
from ppf.deliver.recovery.methods import Student
from ppf.deliver.recovery.objective import Objective
from ppf.deliver.results import Choice, choose, deliver
from ppf.families import family_of
from ppf.fitting.evaluation.scoring import model_log_perplexity
from ppf.fitting.reader import Reader
from ppf.model.build import pruned_config
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
POLICIES = {
    "non-uniform": Policy([3, 2, 0, 1], [64, 0, 8, 32]),  # with absent sub-layers
    "uniform": Policy([2] * 4, [32] * 4),
}
# Half of the text: the dense model is random, and alone would teach nothing about it.
SMALL = {"tokens": 4096, "sequence_length": 32, "batch_tokens": 256, "distillation": 0.5}
FLAGS = ("--tokens", 4096, "--sequence-length", 32, "--batch-tokens", 256, "--distillation", 0.5, "--device", "cpu")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="no peft")
needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="no accelerate")

# The command in a real process that saves after every step, and pauses after it: time to be killed.
_SLOW_PPF = """
import time
from ppf.cli import main
from ppf.deliver.recovery import training
training._SAVE_SECONDS, training._SAVE_SHARE = 0.0, 1.0
save = training.Training._save
training.Training._save = lambda self: (save(self), time.sleep(0.2))
main()
"""


@pytest.fixture(scope="module")
def pruned(tiny_run, tmp_path_factory) -> Path:
    """A folder with a checkpoint of each of POLICIES; do not change them."""
    folder, session = tmp_path_factory.mktemp("pruned"), Session(Run(tiny_run / "run"), "cpu")
    for name, policy in POLICIES.items():
        deliver(session, Choice(policy, "given"), folder / name)
    return folder


@pytest.fixture
def text(tiny_run) -> Path:
    return tiny_run / "text.txt"


def state(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    ours, theirs = state(before), state(after)
    assert set(ours) == set(theirs)
    assert all(ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape for name in ours)
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


# Stock tools


def example(length: int = 24) -> dict:
    ids = tokens(1, length)[0]
    return {"input_ids": ids, "labels": ids}


@needs_accelerate
@pytest.mark.parametrize("kind", POLICIES)
def test_the_stock_trainer_trains_and_saves_it(pruned, tmp_path, kind):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(pruned / kind, dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=12, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=[example()] * 8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = tokens(2, 16)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@needs_peft
@pytest.mark.parametrize("kind", POLICIES)
def test_stock_peft_adapts_saves_and_merges_it(pruned, tmp_path, kind):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = checkpoint.load(pruned / kind, dtype="float32")
    ids = tokens(2, 16)
    before = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = adapted.eval()(ids).logits
    assert not torch.allclose(after, before, atol=1e-2)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(checkpoint.load(pruned / kind, dtype="float32"), tmp_path / "adapter")
    assert torch.equal(loaded.eval()(ids).logits, after)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, after, rtol=1e-4, atol=1e-4)


# What a recovery does


@pytest.fixture(scope="module")
def recovered(pruned, tiny_run, tmp_path_factory, one_thread) -> Path:
    """A folder with the non-uniform checkpoint recovered by each method; do not change them."""
    folder = tmp_path_factory.mktemp("recovered")
    for method in ("lora", "full", "norms"):
        if method != "lora" or importlib.util.find_spec("peft"):
            settings = RecoverySettings(method, **SMALL)
            recover(pruned / "non-uniform", tiny_run / "text.txt", folder / method, settings=settings, device="cpu")
    return folder


@pytest.mark.parametrize("method", [pytest.param("lora", marks=needs_peft), "full", "norms"])
def test_each_method_trains_its_weights_and_no_others(pruned, recovered, method):
    names = changed(pruned / "non-uniform", recovered / method)
    norms = {name for name in state(pruned / "non-uniform") if "norm" in name}
    expected = {
        "norms": norms,
        "full": set(state(pruned / "non-uniform")),
        "lora": {name for name in state(pruned / "non-uniform") if "_proj" in name},
    }[method]
    assert names == expected and names


@pytest.mark.parametrize("method", [pytest.param("lora", marks=needs_peft), "full", "norms"])
def test_the_result_is_a_checkpoint_with_a_longer_report(pruned, recovered, text, method):
    old, report = (json.loads((p / "ppf.json").read_text()) for p in (pruned / "non-uniform", recovered / method))
    for name in ("policy", "policy_from", "delivered_ratio", "structure", "model", "settings", "parameters"):
        assert report[name] == old[name]
    recovery, measured = report["recovery"], report["measured"]
    assert recovery["settings"]["method"] == method and recovery["tokens"] == 4096 and recovery["steps"] == 16
    assert recovery["teacher"] == old["model"]["path"] and recovery["loss"]["last"] < recovery["loss"]["first"]
    assert recovery["pruned"]["measured"] == old["measured"] and report["predicted"] is None
    assert measured["perplexity"] < 0.9 * recovery["before"]["perplexity"]
    model = checkpoint.load(recovered / method)  # the hashes in the report are those of the new files
    held_out = _held_out(recovered / method, text)
    assert measured["protocol"]["tokens"] == held_out.numel() and measured["protocol"]["text"] == str(text)
    assert measured["log_perplexity"] == pytest.approx(model_log_perplexity(model, held_out), rel=1e-6)
    assert not (recovered / f"{method}.unfinished").exists()


def test_distillation_brings_it_nearer_to_the_dense_model(pruned, tiny_run, text, tmp_path):
    dense, distances = checkpoint.load(tiny_run / "model"), {}
    ids = _held_out(pruned / "uniform", text)
    for share in (0.0, 1.0):
        settings = RecoverySettings("full", **(SMALL | {"distillation": share}))
        recover(pruned / "uniform", text, tmp_path / str(share), settings=settings, device="cpu")
        with torch.no_grad():
            recovered = checkpoint.load(tmp_path / str(share))
            distances[share] = float(Objective(Head.of(dense), 1.0)(recovered, ids, hidden_states(dense, ids)))
    assert distances[1.0] < 0.9 * distances[0.0]


def test_a_uniform_result_stays_an_ordinary_llama(pruned, text, tmp_path):
    settings = RecoverySettings("full", **SMALL)
    recover(pruned / "uniform", text, tmp_path / "out", settings=settings, device="cpu")
    script = "import sys; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1]); "
    script += "assert 'ppf' not in sys.modules; print(type(m).__name__)"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr[-2000:]


def test_bf16_checkpoints_stay_bf16_and_rotary_stays_exact(pruned, text, tmp_path):
    merged = Student(checkpoint.load(pruned / "uniform", dtype="bfloat16"), RecoverySettings("full")).merged()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in merged.buffers()} == {torch.float32}  # rotary frequencies
    model = checkpoint.load(pruned / "non-uniform", dtype="bfloat16")
    checkpoint.save(model, checkpoint.load_tokenizer(pruned / "non-uniform"), tmp_path / "bf16", {})
    settings = RecoverySettings("norms", **(SMALL | {"distillation": 0.0}))
    report = recover(tmp_path / "bf16", text, tmp_path / "out", settings=settings, device="cpu")
    assert {tensor.dtype for tensor in state(tmp_path / "out").values()} == {torch.bfloat16}
    again = model_log_perplexity(checkpoint.load(tmp_path / "out", dtype="float32"), _held_out(tmp_path / "out", text))
    assert report["measured"]["log_perplexity"] == pytest.approx(again, rel=5e-3)
    assert report["recovery"]["teacher"] is None and report["dense"] is None


def _held_out(folder: Path, text: Path) -> torch.Tensor:
    return Corpus.of(Reader.of(folder, 32).sequences(text)).held_out


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "olmo2"])
@pytest.mark.parametrize("method", [pytest.param("lora", marks=needs_peft), "norms"])
def test_results_of_other_families_recover(text, tmp_path, family, method):
    """Biases, sandwich norms, fused projections, norms behind; absent sub-layers in each."""
    dense, ids = model_of(family), tokens(2, 16)
    whole = family_of(family).attention.whole
    config = pruned_config(dense.config, Policy([3, 3 if whole else 2, 0, 3], [64, 0, 8, 32]))
    model = llama(config)
    before = model(ids).logits
    for name, part in (("dense", dense), ("pruned", model)):
        checkpoint.save(part, byte_tokenizer(), tmp_path / name, {})
    settings = RecoverySettings(method, **(SMALL | {"tokens": 1024}))
    out, dense = tmp_path / "out", tmp_path / "dense"
    report = recover(tmp_path / "pruned", text, out, settings=settings, teacher=dense, device="cpu")
    assert report["measured"]["perplexity"] < report["recovery"]["before"]["perplexity"]
    assert report["measured"]["protocol"]["begin"] == (256 if family == "gemma2" else None)
    part = "norm" if method == "norms" else "_proj"
    biases = {name for name in state(out) if name.endswith(".bias")}
    expected = {name for name in state(out) if part in name} | biases
    assert changed(tmp_path / "pruned", out) == (expected if method == "norms" else expected - biases)
    again = checkpoint.load(out)
    assert again.config.model_type == f"ppf_{family}" and not torch.allclose(again(ids).logits, before, atol=1e-3)


def test_prune_recover_and_prune_again(pruned, tiny_run, text, tmp_path, monkeypatch):
    """The second result keeps the whole chain, counts its ratio from the first, and is taught by the dense model."""
    quick_learning(monkeypatch)
    first, second, last = (tmp_path / name for name in ("first", "second", "last"))
    small = SMALL | {"tokens": 1024}
    recover(pruned / "non-uniform", text, first, settings=RecoverySettings("norms", **small), device="cpu")
    recover(first, text, second, settings=RecoverySettings("full", **small), device="cpu")
    settings = Settings(evaluations=24, ffn_multiple=8, sequence_length=32, calibration_tokens=2048)
    run = fit(second, text, tmp_path / "run", settings=settings, device="cpu")
    session = Session(run, "cpu")
    deliver(session, choose(session, 0.2), tmp_path / "again")
    report, source = (json.loads((folder / "ppf.json").read_text()) for folder in (tmp_path / "again", second))
    source = {name: value for name, value in source.items() if name not in OWN}
    assert report["source"] == source and source["source"] is None
    assert source["recovery"]["settings"]["method"] == "full" and source["recovery"]["from"] == str(first)
    assert source["recovery"]["earlier"]["settings"]["method"] == "norms"
    assert report["model"]["path"] == str(second) and source["model"]["path"] == str(tiny_run / "model")
    policy = Policy.from_dict(report["policy"])
    before = POLICIES["non-uniform"]
    assert all(new <= old for kind in policy for new, old in zip(policy[kind], before[kind], strict=True))
    removed = sum(
        (old - new) * sublayer.cost
        for kind in policy
        for new, old, sublayer in zip(policy[kind], before[kind], run.structure.of(kind), strict=True)
    )
    assert report["delivered_ratio"] == pytest.approx(removed / run.structure.decoder_parameters) and removed
    shown = ppf("info", tmp_path / "again").stdout
    assert f"{second}, pruned from {tiny_run / 'model'}" in shown
    report = recover(tmp_path / "again", text, last, settings=RecoverySettings("norms", **small), device="cpu")
    assert report["recovery"]["teacher"] == str(tiny_run / "model") and report["source"] == source


# Resuming


@pytest.mark.parametrize("method", [pytest.param("lora", marks=needs_peft), "full"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(pruned, recovered, text, tmp_path, monkeypatch, method):
    monkeypatch.setattr(training, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "_SAVE_SHARE", math.inf)
    settings, advance, stops = RecoverySettings(method, **SMALL), training.Training._advance, [6, 1]

    def interrupted(self):
        advance(self)
        if self.step == stops[-1]:
            raise KeyboardInterrupt  # after the step, before it is saved

    while stops:
        monkeypatch.setattr(training.Training, "_advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recover(pruned / "non-uniform", text, tmp_path / "out", settings=settings, device="cpu")
        assert not (tmp_path / "out").exists() and (tmp_path / "out.unfinished").is_dir()
        stops.pop()
    saved = load_file(tmp_path / "out.unfinished" / "state.safetensors")
    assert int(saved["step"]) == 5
    monkeypatch.setattr(training.Training, "_advance", advance)
    recover(pruned / "non-uniform", text, tmp_path / "out", settings=settings, device="cpu")
    assert changed(recovered / method, tmp_path / "out") == set()
    reports = [
        json.loads((p / "ppf.json").read_text())["recovery"]["loss"] for p in (recovered / method, tmp_path / "out")
    ]
    assert reports[0] == reports[1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_killed_process_is_resumed_by_the_same_command(pruned, recovered, text, tmp_path):
    output, unfinished = tmp_path / "out", tmp_path / "out.unfinished"
    arguments = ["recover", pruned / "non-uniform", "--text", text, "--method", "full", "--output", output, *FLAGS]
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _SLOW_PPF, *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not (unfinished / "state.safetensors").exists() and time.monotonic() < deadline:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
    assert int(load_file(unfinished / "state.safetensors")["step"]) < 16 and not output.exists()
    report = answer(*arguments)
    assert changed(recovered / "full", output) == set() and not unfinished.exists()
    assert report["recovery"]["steps"] == 16


def test_another_question_does_not_go_on_with_an_unfinished_one(pruned, text, tmp_path, monkeypatch):
    output = tmp_path / "out"
    arguments = ("recover", pruned / "non-uniform", "--text", text, "--output", output, *FLAGS)
    monkeypatch.setattr(training.Training, "_advance", _interrupt)
    result = ppf(*arguments, "--method", "norms")
    assert result.exit_code == 130 and "same command again" in result.stderr
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "out.unfinished").iterdir())
    assert "another settings" in refusal(*arguments, "--method", "full", field="output")
    other = write_text(tmp_path / "other.txt", seed=5)
    changed_text = ("recover", pruned / "non-uniform", "--text", other, "--output", output, *FLAGS, "--method", "norms")
    assert "another text" in refusal(*changed_text, field="output")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "out.unfinished").iterdir()) == before


def _interrupt(self):
    raise KeyboardInterrupt


def test_a_damaged_state_and_foreign_folders_are_refused(pruned, text, tmp_path):
    arguments = ("recover", pruned / "non-uniform", "--text", text, "--output", tmp_path / "out", *FLAGS)
    arguments += ("--method", "norms")
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "mine.txt").write_text("mine")
    refusal(*arguments, field="output", value="out.unfinished")
    assert (tmp_path / "out.unfinished" / "mine.txt").read_text() == "mine"


def test_a_diverged_training_says_so_and_keeps_the_last_good_state(pruned, text, tmp_path, monkeypatch):
    monkeypatch.setattr(Objective, "__call__", lambda self, student, ids, taught: student(ids).logits.sum() * math.nan)
    settings = RecoverySettings("norms", **SMALL)
    with pytest.raises(PPFError, match="no longer finite.*learning-rate"):
        recover(pruned / "non-uniform", text, tmp_path / "out", settings=settings, device="cpu")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished" / "state.safetensors").exists()


def test_micro_batches_change_nothing_but_rounding(pruned, text, tmp_path):
    results = []
    for index, micro in enumerate((None, 32)):
        settings = RecoverySettings("full", micro_tokens=micro, **(SMALL | {"tokens": 1024}))
        recover(pruned / "uniform", text, tmp_path / str(index), settings=settings, device="cpu")
        results.append(state(tmp_path / str(index)))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-2, atol=2e-3)


# The command line, and what it refuses


def test_the_command_tells_what_it_did_and_info_repeats_it(pruned, text, tmp_path):
    output = tmp_path / "out"
    arguments = ("recover", pruned / "non-uniform", "--text", text, "--output", output, "--method", "norms", *FLAGS)
    shown = ppf(*arguments)
    assert shown.exit_code == 0
    report = json.loads((output / "ppf.json").read_text())
    told = f"{report['recovery']['before']['perplexity']:.2f} before, {report['measured']['perplexity']:.2f} after"
    assert told in shown.stdout and told in ppf("info", output).stdout and "not trained on" in shown.stdout
    refusal(*arguments, "--seed", 7, field="output", value=output)  # never over a result...
    assert answer(*arguments, "--force")["measured"] == report["measured"]  # ...unless told so
    generated = answer("generate", output, "--prompt", "the river", "--max-new-tokens", 4, "--device", "cpu")
    assert generated["tokens"] == 4


REFUSALS = {
    "unknown method": (("--method", "magic"), "method", "magic"),
    "no tokens": (("--tokens", 0), "tokens", 0),
    "less than a sequence": (("--tokens", 31), "tokens", 31),
    "batch below a sequence": (("--batch-tokens", 8), "batch-tokens", 8),
    "micro-batch below a sequence": (("--micro-tokens", 8), "micro-tokens", 8),
    "no rate": (("--learning-rate", 0), "learning-rate", 0.0),
    "rate not finite": (("--learning-rate", "inf"), "learning-rate", "inf"),
    "no share": (("--distillation", 1.5), "distillation", 1.5),
    "share nan": (("--distillation", "nan"), "distillation", "nan"),
    "rank of norms": (("--rank", 4), "rank", 4),
    "no rank": (("--method", "lora", "--rank", 0), "rank", 0),
    "negative seed": (("--seed", -1), "seed", -1),
    "beyond the context": (("--sequence-length", 256, "--batch-tokens", 256), "sequence-length", 256),
    "short sequence": (("--sequence-length", 1), "sequence-length", 1),
    "no text": (("--text", "/nowhere.txt"), "text", "/nowhere.txt"),
    "no teacher there": (("--teacher", "/nowhere"), "checkpoint", "/nowhere"),
    "teacher not needed": (("--teacher", "{model}", "--distillation", 0), "teacher", "model"),
    "no such device": (("--device", "cuda:99"), "device", "cuda:99"),
    "over its own input": (("--output", "{pruned}", "--force"), "output", "non-uniform"),
    "over the dense model": (("--output", "{model}", "--force"), "output", "model"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_is_refused_before_any_work(pruned, tiny_run, text, tmp_path, case):
    extra, field, value = REFUSALS[case]
    places = {"{model}": tiny_run / "model", "{pruned}": pruned / "non-uniform"}
    extra = [places.get(word, word) for word in extra]
    arguments = ["--text", text, "--output", tmp_path / "out", "--method", "norms", *FLAGS, *extra]
    refusal("recover", pruned / "non-uniform", *arguments, field=field, value=value)
    assert list(tmp_path.iterdir()) == []


def test_teachers_that_cannot_teach_are_refused(pruned, text, tmp_path):
    """Gone, changed, with another vocabulary; and a checkpoint that names none."""
    arguments = ("--text", text, "--output", tmp_path / "out", "--method", "norms", *FLAGS)
    student = Path(shutil.copytree(pruned / "non-uniform", tmp_path / "student"))
    report = json.loads((student / "ppf.json").read_text())

    def refused(model: object, value: object = "") -> str:
        edit_report(student, model=model)
        return refusal("recover", student, *arguments, field="teacher", value=value)

    assert "is not there" in refused({"path": "/nowhere", "fingerprint": ""}, "/nowhere")
    other = write_checkpoint(tmp_path / "other", seed=9)
    assert "no longer the model" in refused({"path": str(other), "fingerprint": report["model"]["fingerprint"]}, other)
    assert "--distillation 0" in refused(None)
    larger = write_checkpoint(tmp_path / "larger", vocab_size=300)
    assert "300" in refusal("recover", student, *arguments, "--teacher", larger, field="teacher", value=larger)
    assert answer("recover", student, *arguments, "--teacher", other)["recovery"]["teacher"] == str(other)


def test_lora_without_peft_names_the_extra(pruned, text, tmp_path, monkeypatch):
    monkeypatch.setattr("ppf.deliver.recovery.methods.importlib.util.find_spec", lambda name: None)
    arguments = ("recover", pruned / "non-uniform", "--text", text, "--output", tmp_path / "out", *FLAGS)
    assert "pip install 'ppf[train]'" in refusal(*arguments, field="method", value="lora")
    assert list(tmp_path.iterdir()) == []


def test_a_text_of_one_sequence_and_a_full_disk_are_refused(pruned, text, tmp_path, monkeypatch):
    short = tmp_path / "short.txt"
    short.write_text("the river ran past old stone walls at dawn")
    settings = RecoverySettings("norms", **SMALL)
    with pytest.raises(InputError, match="too short"):
        recover(pruned / "uniform", short, tmp_path / "out", settings=settings, device="cpu")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10_000))
    with pytest.raises(InputError, match="no space"):
        recover(pruned / "uniform", text, tmp_path / "out", settings=settings, device="cpu")
    assert [entry.name for entry in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.gpu
@pytest.mark.parametrize("method", [pytest.param("lora", marks=needs_peft), "full", "norms"])
def test_it_recovers_on_a_gpu_too(pruned, text, tmp_path, method):
    settings = RecoverySettings(method, **SMALL)
    report = recover(pruned / "non-uniform", text, tmp_path / "out", settings=settings, device="cuda")
    assert report["measured"]["perplexity"] < 0.9 * report["recovery"]["before"]["perplexity"]
    on_cpu = model_log_perplexity(checkpoint.load(tmp_path / "out"), _held_out(tmp_path / "out", text))
    assert report["measured"]["log_perplexity"] == pytest.approx(on_cpu, rel=1e-3)

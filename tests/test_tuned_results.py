"""Results that were trained and saved by transformers, elsewhere or in place, and how they differ from damaged ones."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_cases import as_an_older_ppf, edit_report, flip_bit
from cli_cases import answer, ppf
from factories import quick_learning
from transformers import AutoModelForCausalLM

import ppf as product
from ppf.checkpoint import load, verify
from ppf.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ("--sequence-length", 32, "--device", "cpu")
TRAINING = (*SHORT, "--tokens", 64, "--batch-tokens", 64, "--method", "norms")
PLACES = pytest.mark.parametrize("place", ["elsewhere", "in-place"])


@pytest.fixture(scope="module")
def result(tiny_run, tmp_path_factory) -> Path:
    """A result with widths of its own in every layer; do not change it."""
    output = tmp_path_factory.mktemp("tuned") / "out"
    product.Run(tiny_run / "run").prune(ratio=0.4).save_pretrained(output)
    return output


@pytest.fixture(scope="module")
def tuned(result, tmp_path_factory) -> Path:
    """A folder with the result trained "elsewhere" and "in-place"; do not change them."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(result, folder / "in-place")
    model = AutoModelForCausalLM.from_pretrained(result)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    for place in ("elsewhere", "in-place"):
        model.save_pretrained(folder / place)
    for file in result.glob("tokenizer*"):
        shutil.copy(file, folder / "elsewhere")
    return folder


@PLACES
def test_every_command_takes_them(place, tuned, tiny_run, tmp_path, monkeypatch):
    folder, text = tuned / place, tiny_run / "text.txt"
    model = load(folder)
    assert torch.equal(model.model.norm.weight, AutoModelForCausalLM.from_pretrained(folder).model.norm.weight)
    assert answer("eval", folder, "--text", text, *SHORT)["perplexity"] > 0
    assert answer("generate", folder, "--prompt", "ab", "--max-new-tokens", 2)["tokens"] == 2
    teacher = ("--teacher", tiny_run / "model") if place == "elsewhere" else ()
    recovered = answer("recover", folder, "--text", text, "--output", tmp_path / "recovered", *TRAINING, *teacher)
    assert recovered["recovery"]["teacher"] == str((tiny_run / "model").resolve())
    assert ppf("export", folder, "--to", "hf", "--output", tmp_path / "hf").exit_code == 0
    assert verify(tmp_path / "hf") and not verify(folder)
    report = json.loads((tmp_path / "hf" / "ppf.json").read_text())
    assert "measured" not in report and report["export"]["format"] == "hf"


def test_one_is_fitted_and_pruned_again(tuned, tiny_run, tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    settings = product.Settings(evaluations=24, ffn_multiple=8, sequence_length=32, calibration_tokens=1024)
    run = product.fit(tuned / "in-place", tiny_run / "text.txt", tmp_path / "run", settings=settings, device="cpu")
    run.prune(ratio=0.2).save_pretrained(tmp_path / "again")
    report = json.loads((tmp_path / "again" / "ppf.json").read_text())
    assert report["source"]["saved_again"] and "measured" not in report["source"] and "measured" in report
    assert "made from" in ppf("info", tmp_path / "again").stdout


def test_info_says_what_holds_and_what_is_out_of_date(result, tuned):
    honest = answer("info", result)
    for place in ("elsewhere", "in-place"):
        facts = answer("info", tuned / place)
        assert all(facts[name] == honest[name] for name in ("policy", "structure", "parameters", "architecture"))
        assert facts["saved_again"] == (place == "in-place")
    said = ppf("info", tuned / "in-place").stdout
    assert "out of date" in said and "measured" in said and "perplexity" not in said
    assert "out of date" not in ppf("info", result).stdout and "perplexity" in ppf("info", result).stdout


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_what_nobody_saved_again_is_damaged(name, result, tmp_path):
    folder = Path(shutil.copytree(result, tmp_path / "out"))
    flip_bit(folder / name, -3)
    for command in (("eval", folder, "--text", tmp_path), ("generate", folder, "--prompt", "a")):
        done = ppf(*command)
        assert done.exit_code == 2 and "write it again" not in done.stderr
    with pytest.raises(InputError, match=r"changed since PPF wrote it.*trained or edited it, remove its ppf"):
        verify(folder)


def test_no_flipped_bit_of_the_mark_passes_for_training(result, tmp_path):
    folder = Path(shutil.copytree(result, tmp_path / "out"))
    file = folder / "model.safetensors"
    honest = file.read_bytes()
    start = honest.index(b'"__metadata__"')
    end = honest.index(b"}", start)
    for position in range(start, end + 1):
        for bit in range(8):
            damaged = bytearray(honest)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            with pytest.raises(InputError, match="changed since PPF wrote it"):
                verify(folder)


def test_a_result_without_a_mark_is_not_believed_to_be_trained(tuned, result, tmp_path):
    """Exports of models that PPF did not write: nothing tells training from damage."""
    folder = Path(shutil.copytree(tuned / "in-place", tmp_path / "out"))
    edit_report(folder, marked=...)
    with pytest.raises(InputError, match="changed since PPF wrote it"):
        load(folder)
    (folder / "ppf.json").unlink()
    load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"measured": 5}, {"measured": {}}, {"structure": {"hidden": 1}}, {"structure": {"attention": []}},
        {"files": {"config.json": 1}}, {"files": ["x"]}, {"predicted": {"log_perplexity": 1e9}}, {"model": "x"},
        {"requested_ratio": float("nan")}, {"recovery": {"from": 1}}, {"dense": "none"}, {"parameters": {"dense": -1}},
    ],
    ids=str,
)  # fmt: skip
def test_an_odd_report_is_refused_by_its_field(changes, result, tmp_path):
    """Also one that has its checksum, or is so old that it needs none."""
    folder = Path(shutil.copytree(result, tmp_path / "out"))
    for write in (edit_report, as_an_older_ppf):
        if write is edit_report and changes.get("requested_ratio"):  # NaN, for which there is no checksum
            continue
        write(folder, **changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = ppf("info", folder)
        assert done.exit_code == 2 and "ppf.json" in done.stderr and "remove" in done.stderr
        assert "checksum" not in done.stderr


def test_links_out_of_a_result_are_not_exported(result, tmp_path):
    folder = Path(shutil.copytree(result, tmp_path / "out"))
    (tmp_path / "secret.txt").write_text("of this user only")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    for to in ("hf", "vllm"):
        done = ppf("export", folder, "--to", to, "--output", tmp_path / to)
        assert done.exit_code == 2 and "notes.txt" in done.stderr and "link" in done.stderr
        assert not (tmp_path / to).exists()
    (folder / "notes.txt").unlink()
    (folder / "notes.txt").symlink_to("config.json")  # inside is fine
    assert ppf("export", folder, "--to", "hf", "--output", tmp_path / "hf").exit_code == 0

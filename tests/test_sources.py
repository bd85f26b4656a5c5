"""What may be named as a model: repositories of a hub (one on 127.0.0.1), models in memory, folders of other things."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import edit_json, refusal
from cli_cases import answer, ppf
from factories import TINY, byte_tokenizer, model_of, quick_learning, write_checkpoint, write_text
from local_hub import COMMIT, serving

import ppf as package
from ppf.checkpoint import check_checkpoint, load, local_folder, locate, recall, sources
from ppf.errors import InputError
from ppf.fitting.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"evaluations": 24, "ffn_multiple": 8, "sequence_length": 32, "calibration_tokens": 2048}

# huggingface_hub reads its environment when it is imported: each of these is a process of its own.
_ASK = """
import json, sys
from typer.testing import CliRunner
from ppf.cli import app
for name in sys.argv[1:]:
    result = CliRunner().invoke(app, ["info", name, "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    print(json.dumps(json.loads(result.stdout)))
"""


def ask(home: Path, address: str, *names: str, **environment: str) -> list[dict]:
    """What ``ppf info NAME --json`` says of each, one after the other in a new process."""
    own = {"HF_HOME": str(home), "HF_ENDPOINT": address, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", _ASK, *names]
    done = subprocess.run(command, env=inherited | own | environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """The bundled model, with what else lies in published repositories."""
    folder = tmp_path_factory.mktemp("repository") / "tiny"
    shutil.copytree(TINY, folder)
    for name in ("README.md", "modeling_own.py", "pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (folder / name).write_text("not to be asked for")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


def test_a_hub_is_asked_once_and_for_little_and_then_the_cache_serves(repository, tmp_path):
    """Online, online again (one question: is this still the commit?), offline, and with the hub gone."""
    home = tmp_path / "home"
    with serving({"org/tiny": repository}) as hub:
        first, again = ask(home, hub.address, "org/tiny@v1.0", "org/tiny@v1.0")
        assert first["from"] == {"kind": "hub", "id": "org/tiny", "revision": COMMIT} and first == again
        assert hub.files == {
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja",
        }  # fmt: skip
        assert sum("/revision/" in path for path in hub.asked) == 1
        hub.asked.clear()
        assert ask(home, hub.address, "org/tiny@v1.0") == [first] and hub.files == set()
        hub.asked.clear()
        unknown, known = ask(home, hub.address, "org/other", "org/tiny@v1.0", HF_HUB_OFFLINE="1")
        assert "HF_HUB_OFFLINE" in unknown["error"]["problem"] and known == first and hub.asked == []
    gone, other = ask(home, hub.address, f"org/tiny@{COMMIT}", "org/other")
    assert gone == first | {"path": f"org/tiny@{COMMIT}"}
    assert "cannot be reached" in other["error"]["problem"] and hub.address in other["error"]["problem"]


def test_what_a_hub_refuses_is_one_line_that_says_what_to_do(repository, tmp_path):
    folders = {name: tmp_path / name for name in ("gguf", "pickled", "adapter")}
    for name, file in (("gguf", "m.gguf"), ("pickled", "pytorch_model.bin"), ("adapter", "adapter_config.json")):
        folders[name].mkdir()
        (folders[name] / file).write_text("{}")
    others = {f"org/{name}": folder for name, folder in folders.items()}
    with serving({"org/tiny": repository, "org/gated": repository, "org/private": repository} | others) as hub:
        names = "org/gated", "org/private", "org/none", "org/tiny@v2", *others
        errors = [found["error"] for found in ask(tmp_path / "home", hub.address, *names)]
        mine = ask(tmp_path / "home", hub.address, "org/private", HF_TOKEN=hub.token)[0]
    assert [error["value"] for error in errors] == list(names)
    gated, private, none, revision, gguf, pickled, adapter = errors
    assert "granted access" in gated["problem"] and "hf auth login" in gated["remedy"]
    assert (
        "no such model" in private["problem"]
        and "HF_TOKEN" in private["remedy"]
        and private == none | {"value": "org/private"}
    )
    assert "not this revision" in revision["problem"] and "tag" in revision["remedy"]
    assert "GGUF" in gguf["problem"] and "hf download org/gguf" in gguf["remedy"]
    assert "pickled" in pickled["problem"] and "adapter" in adapter["problem"]
    assert mine["from"]["id"] == "org/private"


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, tmp_path / "org" / "tiny")
    assert locate("org/tiny").source == {"kind": "folder"} and check_checkpoint("org/tiny").model_type == "llama"
    assert "no such folder" in refusal(local_folder, tmp_path / "org" / "other")


def test_other_objects_are_refused():
    assert "merge peft's adapters" in refusal(local_folder, torch.nn.Linear(1, 1))


def test_a_model_that_is_gone_is_got_again(tmp_path, monkeypatch):
    """From wherever it came; where nobody knows, the folder is named as it was."""
    asked = []
    monkeypatch.setattr(sources, "_locate", lambda name: asked.append(name) or sources.Located(TINY, {}))
    monkeypatch.setattr(sources, "_known", {})
    gone = tmp_path / "gone"
    source = {"kind": "hub", "id": "org/tiny", "revision": COMMIT}
    assert recall(TINY, source) == TINY and recall(gone, None) == recall(gone, {"kind": "folder"}) == gone
    assert asked == []
    assert recall(gone, source) == TINY and asked == [f"org/tiny@{COMMIT}"]


def test_adapters_pickles_and_quantised_weights_are_named_with_what_to_do(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "adapter of org/base" in (said := refusal(check_checkpoint, adapter)) and "merge_and_unload" in said
    pickled = Path(shutil.copytree(TINY, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pytorch_model.bin" in (said := refusal(check_checkpoint, pickled)) and "save_pretrained" in said
    (pickled / "pytorch_model.bin").rename(pickled / "m.gguf")
    assert f"such as {pickled / 'm.gguf'}" in refusal(check_checkpoint, pickled)
    for method, remedy in (("fp8", "FineGrainedFP8Config"), ("bitsandbytes", "dequantize()"), ("awq", "made from")):
        quantised = Path(shutil.copytree(TINY, tmp_path / method))
        edit_json(quantised / "config.json", quantization_config={"quant_method": method})
        assert f"quantization_config = {method}" in (said := refusal(check_checkpoint, quantised)) and remedy in said


def test_a_model_in_memory_becomes_part_of_its_run(tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    model, text, run = model_of("qwen3"), write_text(tmp_path / "text.txt"), tmp_path / "run"
    with pytest.raises(InputError, match="tokenizer"):
        package.fit(model, text, run, device="cpu", **QUICK)
    with pytest.raises(InputError, match="empty"):  # refused later: nothing may be left
        (tmp_path / "nothing.txt").write_text("")
        package.fit(model, tmp_path / "nothing.txt", run, tokenizer=byte_tokenizer(), device="cpu", **QUICK)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["nothing.txt", "text.txt"]
    package.fit(model, text, run, tokenizer=byte_tokenizer(), device="cpu", **QUICK)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load(run / "model").state_dict().items())
    again = package.fit(model, text, run, tokenizer=byte_tokenizer(), device="cpu", **QUICK)
    assert again.is_complete and sorted(file.name for file in tmp_path.iterdir()) == ["nothing.txt", "run", "text.txt"]
    with pytest.raises(InputError, match="another model"):
        package.fit(model_of("qwen3", seed=1), text, run, tokenizer=byte_tokenizer(), device="cpu", **QUICK)
    moved = shutil.move(run, tmp_path / "moved")  # with its model
    output = tmp_path / "out"
    assert answer("prune", moved, "--ratio", 0.3, "--output", output, "--device", "cpu")["model"]["source"] == {
        "kind": "memory"
    }
    assert Run(moved).model_path == tmp_path / "moved" / "model"
    assert load(output).num_parameters() < model.num_parameters()


def test_a_fit_from_memory_that_was_killed_at_its_start_goes_on(tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    model, text, run = model_of("llama"), write_text(tmp_path / "text.txt"), tmp_path / "run"
    write_checkpoint(run / "model")  # the same weights
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    package.fit(model, text, run, tokenizer=byte_tokenizer(), device="cpu", **QUICK)
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before
    write_checkpoint(tmp_path / "other" / "model", seed=1)
    with pytest.raises(InputError, match="not empty"):
        package.fit(model, text, tmp_path / "other", tokenizer=byte_tokenizer(), device="cpu", **QUICK)
    assert load(tmp_path / "other" / "model").num_parameters() == model.num_parameters()


def test_every_command_takes_what_is_no_folder(tiny_run, tmp_path):
    missing = ppf("eval", tmp_path / "none.gguf", "--text", tiny_run / "text.txt")
    assert missing.exit_code == 2 and "no such file" in missing.stderr

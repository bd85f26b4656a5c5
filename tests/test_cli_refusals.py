"""The command line on a tiny run: what each command refuses, in one line that names it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from cli_cases import answer, fit_arguments, ppf, refusal, rows
from factories import quick_learning, rewrite_manifest, write_checkpoint, write_text
from safetensors.torch import load_file, save_file

from ppf import checkpoint
from ppf.fitting.run import Run
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ("--sequence-length", 32)


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
        ("evaluations", 1), ("evaluations", -5), ("sequence-length", 0), ("sequence-length", 1), ("ffn-multiple", 0),
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

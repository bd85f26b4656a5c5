"""Exports that are Hugging Face folders, opened by processes that know nothing but the folder; and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_cases import answer, ppf, refusal
from export_cases import (
    FAMILIES,
    POLICIES,
    UNIFORM,
    even,
    prune_to,
    python,
    sample_ids,
    transformers_logits,
    uneven,
    write_random,
    write_tower,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ppf.checkpoint import load, verify
from ppf.deliver.export import open_source, to_deci, to_gguf, to_hf, to_vllm
from ppf.deliver.export.configuration_decilm import DeciLMConfig
from ppf.deliver.export.routes import routes
from ppf.errors import InputError
from ppf.families import family_of
from ppf.model.policy import Policy
from ppf.storage import files

pytestmark = pytest.mark.usefixtures("one_thread")
# Of the portable kind: attention whole or absent, FFN widths multiples of 256.
PORTABLE = Policy([3, 3, 0, 3], [512, 0, 256, 0])

# What readers do: open folders, some trusting the code in them, and say what they see or what they complain of.
_READER = """
import sys, json, torch
{before}
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
answers = []
for folder, trust, ids in json.loads(sys.argv[1]):
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        if config.model_type == "nemotron-nas":
            answers.append([str(block.ffn.ffn_mult) for block in config.block_configs])
            continue
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust)
        logits = model(torch.tensor([ids])).logits.detach()[0].double()
        new = model.generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        assert new.shape[1] == len(ids) + 8
        answers.append([type(model).__name__, str(logits.sum().item()), str(logits.abs().max().item())])
    except (ValueError, OSError) as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def read_by(cases: list[tuple[Path, bool]], cache: Path, before: str) -> list:
    """How a fresh process opens folders: class, sum and maximum of its logits, one case after another."""
    ids = sample_ids(cases[0][0])
    asked = json.dumps([(str(folder), trust, ids) for folder, trust in cases])
    done = python(_READER.format(before=before), asked, HF_MODULES_CACHE=str(cache))
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def fingerprint(folder: Path) -> list[str]:
    logits = transformers_logits(folder, sample_ids(folder))
    return [str(logits.double().sum().item()), str(logits.double().abs().max().item())]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """tiny-2m at 50 %, not uniform; do not change it."""
    return prune_to(tmp_path_factory.mktemp("pruned") / "out", POLICIES[0.5])


@pytest.fixture(scope="module")
def uniform(tmp_path_factory) -> Path:
    return prune_to(tmp_path_factory.mktemp("uniform") / "out", UNIFORM)


@pytest.fixture(scope="module")
def portable(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("portable") / "out"
    return write_random(output, PORTABLE, intermediate_size=512)


# Hugging Face


def test_hf_is_the_same_checkpoint(pruned, tmp_path):
    facts = to_hf(open_source(pruned), tmp_path / "hf")
    assert facts == {"format": "hf", "self_contained": False}
    assert not list((tmp_path / "hf").glob("*.py")) and verify(tmp_path / "hf")
    assert fingerprint(tmp_path / "hf") == fingerprint(pruned)
    report = json.loads((tmp_path / "hf" / "ppf.json").read_text())
    assert report["export"]["source"] == str(pruned) and report["policy"] == POLICIES[0.5].to_dict()


def test_fresh_process_with_import_ppf(pruned, tmp_path):
    to_hf(open_source(pruned), tmp_path / "plain")
    to_hf(open_source(pruned), tmp_path / "code", self_contained=True)
    # With ppf, its own code is used and nobody has to trust the folder's.
    cases = [(tmp_path / "plain", False), (tmp_path / "code", False)]
    assert read_by(cases, tmp_path, "import ppf") == [["PPFLlamaForCausalLM", *fingerprint(pruned)]] * 2
    assert torch.equal(load(tmp_path / "code").lm_head.weight, load(pruned).lm_head.weight)


def test_fresh_process_without_ppf(pruned, uniform, portable, tmp_path):
    assert to_hf(open_source(pruned), tmp_path / "code", self_contained=True)["self_contained"]
    assert verify(tmp_path / "code")
    assert not to_hf(open_source(uniform), tmp_path / "uniform", self_contained=True)["self_contained"]
    assert not list((tmp_path / "uniform").glob("*.py"))
    to_deci(open_source(portable), tmp_path / "deci")
    cases = [(tmp_path / "code", True), (tmp_path / "code", False), (pruned, False)]
    cases += [(tmp_path / "uniform", False), (tmp_path / "deci", True)]
    found, untrusted, unknown, stock, blocks = read_by(cases, tmp_path, "sys.modules['ppf'] = None")
    assert found == ["PPFLlamaForCausalLM", *fingerprint(pruned)]
    assert "trust_remote_code" in untrusted  # the reader decides
    assert "ppf_llama" in unknown  # negative control: without code there is no way in
    assert stock == ["LlamaForCausalLM", *fingerprint(uniform)]
    assert blocks == ["16.0", "None", "8.0", "None"]


def test_exporting_a_self_contained_folder_again_drops_its_code(pruned, tmp_path):
    to_hf(open_source(pruned), tmp_path / "first", self_contained=True)
    to_hf(open_source(tmp_path / "first"), tmp_path / "second")
    assert "auto_map" not in json.loads((tmp_path / "second" / "config.json").read_text())
    assert not list((tmp_path / "second").glob("*.py"))


def test_every_family_opens_without_ppf(tmp_path):
    """Its layers: whole, FFN only, attention only, neither; so also caches, and what a rotation is told."""
    sources = [write_random(tmp_path / family, uneven(family), family=family) for family in FAMILIES]
    for source in sources:
        to_hf(open_source(source), tmp_path / f"{source.name}-code", self_contained=True)
        (code,) = (tmp_path / f"{source.name}-code").glob("*.py")
        imported = {line.split()[1].split(".")[0] for line in code.read_text().splitlines() if _imports(line)}
        assert imported == {"__future__", "copy", "sys", "typing", "huggingface_hub", "torch", "transformers"}
    cases = [(tmp_path / f"{source.name}-code", True) for source in sources]
    found = read_by(cases, tmp_path / "cache", "sys.modules['ppf'] = None")
    names = [f"PPF{family_of(family).classes}ForCausalLM" for family in FAMILIES]
    assert found == [[name, *fingerprint(source)] for name, source in zip(names, sources, strict=True)]


def _imports(line: str) -> bool:
    return line.startswith(("import ", "from "))


def test_multimodal_models(tmp_path):
    """Copied whole; a text tower whose layers differ needs PPF, and has no other reader."""
    even_tower = write_tower(tmp_path / "even", even("gemma3_text"))
    facts = to_hf(open_source(even_tower), tmp_path / "hf", self_contained=True)
    assert not facts["self_contained"] and verify(tmp_path / "hf")
    stored = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").state_dict()
    original = AutoModelForImageTextToText.from_pretrained(even_tower).state_dict()
    assert stored.keys() == original.keys() and all(torch.equal(stored[name], original[name]) for name in stored)
    assert any("vision" in name for name in stored)
    source = open_source(write_tower(tmp_path / "uneven", uneven("gemma3_text")))
    for write, problem in (
        (lambda s, o: to_hf(s, o, self_contained=True), "open only where PPF is installed"),
        (to_vllm, "PPF's plugin for vLLM serves"),
        (to_deci, "llama and mistral only"),
    ):
        with pytest.raises(InputError, match=problem):
            write(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# DeciLM


def test_deci_blocks_say_what_the_layers_are(portable, tmp_path):
    assert to_deci(open_source(portable), tmp_path / "deci") == {"format": "deci"}
    written = json.loads((tmp_path / "deci" / "config.json").read_text())
    assert written["architectures"] == ["DeciLMForCausalLM"] and "per_layer_config" not in written
    config = DeciLMConfig.from_dict(written)
    for index, block in enumerate(config.block_configs):
        groups, channels = PORTABLE.attention[index], PORTABLE.ffn[index]
        assert block.attention.no_op == (groups == 0) and block.ffn.no_op == (channels == 0)
        if groups:  # as its readers compute it
            assert config.num_attention_heads // block.attention.n_heads_in_group == groups
        if channels:
            assert -(-int(2 * block.ffn.ffn_mult * config.hidden_size / 3) // 256) * 256 == channels
    assert config.hidden_size // config.num_attention_heads == config.head_dim
    assert DeciLMConfig.from_dict(config.to_dict()).block_configs == config.block_configs
    names = set(open_source(portable).stored)
    assert (tmp_path / "deci" / "model.safetensors").read_bytes() == (portable / "model.safetensors").read_bytes()
    assert not any(".2.self_attn" in name or ".1.mlp" in name for name in names)


@pytest.mark.parametrize("ratio", POLICIES)
def test_deci_refuses_other_widths(ratio, tmp_path):
    policy = {0.3: Policy([3, 1, 0, 3], [256] * 4), 0.5: Policy([3] * 4, [512, 64, 256, 0])}[ratio]
    source = write_random(tmp_path / "in", policy, intermediate_size=512)
    field = {0.3: "query heads of layer 1", 0.5: "FFN channels of layer 1"}[ratio]
    refusal("export", source, "--to", "deci", "--output", tmp_path / "out", field=field, value={0.3: 2, 0.5: 64}[ratio])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "kind", "changes", "problem"),
    [
        ("qwen2", even, {}, "layers of llama and mistral only"),
        ("gemma3_text", uneven, {}, "layers of llama and mistral only"),
        ("mistral", even, {}, "window"),
        ("llama", uneven, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
         "length-dependent rotation"),
        ("llama", even, {"attention_bias": True}, "no biases for DeciLM, this model has: attention output, key"),
    ],
)  # fmt: skip
def test_deci_refuses_what_is_not_a_plain_llama(family, kind, changes, problem, tmp_path):
    source = open_source(write_random(tmp_path / "in", kind(family), family=family, **changes))
    with pytest.raises(InputError, match=problem):
        to_deci(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "kind", "open_to"),
    [
        ("llama", even, {"hf", "gguf", "vllm"}),
        ("qwen2", uneven, {"hf", "gguf", "vllm"}),
        ("gemma3_text", even, {"hf", "gguf", "vllm"}),
        ("gemma3_text", uneven, {"hf"}),
        ("olmo2", uneven, {"hf"}),
        ("granite", uneven, {"hf", "gguf"}),
    ],
)
def test_routes_say_who_would_open_a_checkpoint(family, kind, open_to, tmp_path):
    found = routes(open_source(write_random(tmp_path / "in", kind(family), family=family)))
    assert {name for name, problem in found.items() if problem is None} == open_to
    assert all(problem is None or " = " in problem for problem in found.values())


# Every format


@pytest.mark.parametrize("write", [to_hf, to_gguf, to_vllm, to_deci])
def test_a_full_disk_and_a_used_folder_leave_nothing(write, portable, tmp_path, monkeypatch):
    source = open_source(portable if write is not to_vllm else write_random(tmp_path / "in"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write(source, tmp_path / "used")
    with pytest.raises(InputError, match="holds the checkpoint"):
        write(source, source.folder, force=True)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="no space left"):
        write(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "in") == ["used"]


def test_layer_0_without_attention_is_refused_with_the_remedy(tmp_path):
    folder = write_random(tmp_path / "in", Policy([1, 3, 3, 3], [64] * 4))
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"]["0"] |= {"num_attention_heads": 0, "num_key_value_heads": 0}
    (folder / "config.json").write_text(json.dumps(config))
    for to in ("hf", "gguf", "vllm", "deci"):
        line = refusal("export", folder, "--to", to, "--output", tmp_path / "out", field="attention heads of layer 0")
        assert "at least one kv-group" in line
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused(pruned, tmp_path):
    to_hf(open_source(pruned), tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    refusal("export", tmp_path / "hf", "--to", "gguf", "--output", tmp_path / "out", field="file", value="safetensors")


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (("--to", "onnx"), "to", "onnx"),
        (("--to", "gguf", "--dtype", "q4_k"), "dtype", "q4_k"),
        (("--to", "hf", "--dtype", "f16"), "dtype", "f16"),
        (("--to", "gguf", "--self-contained"), "self-contained", True),
        (("--to", "deci", "--tensor-parallel", 2), "tensor-parallel", 2),
        (("--to", "vllm", "--tensor-parallel", 0), "tensor-parallel", 0),
    ],
)
def test_the_command_refuses_what_makes_no_sense(arguments, field, value, portable, tmp_path):
    refusal("export", portable, *arguments, "--output", tmp_path / "out", field=field, value=value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "gguf", "vllm", "deci"])
def test_the_command_writes_every_format_and_says_how_to_open_it(to, tmp_path):
    source = write_random(tmp_path / "in", intermediate_size=512)
    data = answer("export", source, "--to", to, "--output", tmp_path / "out")
    assert data["format"] == to and (tmp_path / "out" / "ppf.json").is_file()
    shown = ppf("export", source, "--to", to, "--output", tmp_path / "out", "--force").stdout
    assert str(tmp_path / "out") in shown and "Next: " in shown


def test_our_own_auto_classes_never_trust_remote_code(pruned, tmp_path):
    to_hf(open_source(pruned), tmp_path / "hf", self_contained=True)
    for auto in (AutoConfig, AutoModelForCausalLM):
        assert type(auto.from_pretrained(tmp_path / "hf")).__module__ == "ppf.model.classes"

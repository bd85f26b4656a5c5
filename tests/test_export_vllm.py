"""The vLLM route, against stand-ins: registration, configuration, widths and weight names, and what is refused."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import vllm_stand_in
from cli_cases import answer, refusal
from export_cases import even, sample_ids, transformers_logits, uneven, write_random
from transformers import AutoConfig

from ppf.checkpoint import load
from ppf.deliver.export import open_source, to_vllm
from ppf.deliver.export.vllm import tensor_parallel_problem
from ppf.deliver.export.vllm_plugin import SERVED, ServedConfig
from ppf.errors import InputError
from ppf.model.classes import classes_of
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
POLICY = Policy([3, 0, 2, 0, 1, 1], [48, 16, 0, 0, 40, 64])
SERVABLE = Policy([3, 1, 2, 1], [64, 0, 32, 16])


@pytest.fixture
def vllm(monkeypatch):
    """vLLM's stand-ins with our plugin registered, as its entry point says; our results are ours again afterwards."""
    vllm_stand_in.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "ppf.deliver.export.vllm_model", raising=False)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    for name, value in project["project"]["entry-points"]["vllm.general_plugins"].items():
        for _ in range(2):  # vLLM may load plugins several times in a process
            EntryPoint(name, value, "vllm.general_plugins").load()()
    yield vllm_stand_in.ModelRegistry
    ours()
    sys.modules.pop("ppf.deliver.export.vllm_model", None)


def ours() -> None:
    """Give transformers back the configurations that the plugin replaces in vLLM's processes."""
    for config in SERVED:
        AutoConfig.register(config.model_type, classes_of(config.model_type)["Config"], exist_ok=True)


def served(folder: Path, registry) -> torch.nn.Module:
    """What vLLM does with a folder: configuration, class by its lazy name, weights."""
    config = AutoConfig.from_pretrained(folder)
    module, name = registry.models[config.architectures[0]].split(":")
    model = getattr(importlib.import_module(module), name)(vllm_config=vllm_stand_in.vllm_config(config))
    stored = open_source(folder).stored
    model.load_weights((name, load(folder).state_dict()[name]) for name in stored)
    return model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"layer_types": ["full_attention"] * 6}),
    ],
)
def test_served_model_computes_the_same_logits(vllm, family, changes, tmp_path):
    folder = write_random(tmp_path / "in", POLICY, family=family, num_hidden_layers=6, **changes)
    assert "ppf.deliver.export.vllm_model" not in sys.modules
    model, ids = served(folder, vllm), torch.tensor(sample_ids(folder, 24))
    ours()
    expected = transformers_logits(folder, ids.tolist())
    with torch.no_grad():
        torch.testing.assert_close(model(ids, torch.arange(24)), expected, rtol=1e-4, atol=1e-4)
        # Negative control: one kv-group's rows exchanged in the fused weight.
        rows = model.model.layers[0].self_attn.qkv_proj.weight.data
        rows[48:56], rows[56:64] = rows[56:64].clone(), rows[48:56].clone()
        assert (model(ids, torch.arange(24)) - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("gemma3_text", {}, "of ppf_llama, ppf_mistral, ppf_qwen2 only"),
        ("granite", {}, "of ppf_llama, ppf_mistral, ppf_qwen2 only"),
        ("mistral", {}, "window"),
        ("llama", {"hidden_act": "gelu"}, "activation"),
    ],
)
def test_layers_that_the_plugin_does_not_serve_are_refused(family, changes, problem, tmp_path):
    source = open_source(write_random(tmp_path / "in", uneven(family), family=family, **changes))
    with pytest.raises(InputError, match=problem):
        to_vllm(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "phi3"])
def test_uniform_results_are_vllms_own_models(family, tmp_path):
    source = write_random(tmp_path / "in", even(family), family=family)
    assert to_vllm(open_source(source), tmp_path / "out")["tensor_parallel_sizes"] == [1, 2, 4]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == family and "auto_map" not in written


def test_configuration_answers_what_vllm_reads(vllm, tmp_path):
    folder = write_random(tmp_path / "in", POLICY, num_hidden_layers=6)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is ServedConfig and not getattr(config, "is_heterogeneous", False)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (6, 3, 64)
    assert [block.attention.no_op for block in config.block_configs] == [not w for w in POLICY.attention]
    assert [block.ffn.intermediate_size for block in config.block_configs] == list(POLICY.ffn)
    assert config.block_configs[2].attention.num_attention_heads == 4 and config.architectures == [
        "PPFLlamaForCausalLM"
    ]
    # vLLM copies it, sends it to its workers and hashes its JSON.
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), ServedConfig.from_dict(config.to_dict())):
        assert other.block_configs == config.block_configs and other.block_configs[1].attention.no_op
    assert json.loads(config.to_json_string(use_diff=False))["block_configs"][1]["attention"]["no_op"] is True


def test_without_vllm_nothing_of_it_is_imported():
    assert "vllm" not in sys.modules and "ppf.deliver.export.vllm_model" not in sys.modules


def test_export_says_how_many_gpus_can_share_it(tmp_path):
    folder = write_random(tmp_path / "in", Policy([2, 1, 2, 1], [64, 0, 32, 16]), num_attention_heads=8, head_dim=8,
                          num_key_value_heads=2)  # fmt: skip
    data = answer("export", folder, "--to", "vllm", "--output", tmp_path / "out", "--tensor-parallel", 2)
    assert data["tensor_parallel"] == 2 and data["tensor_parallel_sizes"] == [1, 2, 4]
    report = json.loads((tmp_path / "out" / "ppf.json").read_text())
    assert report["export"]["tensor_parallel_sizes"] == [1, 2, 4]


@pytest.mark.parametrize(
    ("policy", "gpus", "field", "value", "problem"),
    [
        (POLICY, 1, "attention heads of layer 1", 0, "key/value cache"),
        (Policy([3] * 6, [64] * 6), 4, "tensor-parallel", 4, "layer 0 has 6 query heads"),
        (Policy([3] * 6, [64] * 6), 2, "tensor-parallel", 2, "layer 0 has 3 key/value heads"),
        (Policy([2] * 5 + [3], [64] * 6), 2, "tensor-parallel", 2, "layer 5 has 3 key/value heads"),
        (Policy([2] * 6, [64, 63, 64, 64, 64, 64]), 2, "tensor-parallel", 2, "layer 1 has 63 FFN channels"),
    ],
)
def test_what_vllm_would_refuse_is_refused(policy, gpus, field, value, problem, tmp_path):
    folder = write_random(tmp_path / "in", policy, num_hidden_layers=6)
    arguments = ("export", folder, "--to", "vllm", "--output", tmp_path / "out", "--tensor-parallel", gpus)
    line = refusal(*arguments, field=field, value=value)
    assert problem in line and not (tmp_path / "out").exists()


def test_fewer_kv_heads_than_gpus_are_copied_evenly_or_not_at_all(tmp_path):
    source = open_source(write_random(tmp_path / "in", SERVABLE))
    source.__dict__["widths"] = [(8, 2, 64), (4, 1, 0)]
    assert [tensor_parallel_problem(source, size) is None for size in (1, 2, 3, 4)] == [True, True, False, True]
    assert to_vllm(source, tmp_path / "out")["tensor_parallel_sizes"] == [1, 2, 4]

"""The vLLM route: what is refused before it is served. What vLLM makes of the rest: tests/test_serve_vllm.py."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from cli_cases import answer, refusal
from export_cases import even, uneven, write_random

from ppf.deliver.export import open_source, to_vllm
from ppf.deliver.export.vllm import tensor_parallel_problem
from ppf.errors import InputError
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
POLICY = Policy([3, 0, 2, 0, 1, 1], [48, 16, 0, 0, 40, 64])
SERVABLE = Policy([3, 1, 2, 1], [64, 0, 32, 16])


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


def test_a_uniform_qwen2_keeps_its_heads(tmp_path):
    """vLLM's own Qwen2 does not look at head_dim; where widths differ, our class does."""
    whole = write_random(tmp_path / "whole", Policy([3] * 4, [40] * 4), family="qwen2")
    assert to_vllm(open_source(whole), tmp_path / "out")["format"] == "vllm"
    fewer = write_random(tmp_path / "fewer", Policy([2] * 4, [40] * 4), family="qwen2")
    with pytest.raises(InputError, match="attention heads = 4: vLLM's own qwen2 takes the hidden size"):
        to_vllm(open_source(fewer), tmp_path / "other")
    mixed = write_random(tmp_path / "mixed", Policy([2] * 4, [40] * 3 + [32]), family="qwen2",
                         layer_types=["full_attention"] * 4)  # fmt: skip
    assert to_vllm(open_source(mixed), tmp_path / "third")["format"] == "vllm"


def test_without_vllm_nothing_of_it_is_imported():
    assert "vllm" not in sys.modules and "ppf.deliver.export.vllm_model" not in sys.modules
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    for name, value in project["project"]["entry-points"]["vllm.general_plugins"].items():
        assert callable(EntryPoint(name, value, "vllm.general_plugins").load())


def test_layers_without_attention_are_served(tmp_path):
    source = open_source(write_random(tmp_path / "in", POLICY, num_hidden_layers=6))
    assert to_vllm(source, tmp_path / "out")["tensor_parallel_sizes"] == [1]


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

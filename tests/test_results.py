"""Configurations and files of results: built, saved, opened, copied, and pruned again."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from model_cases import (
    BY_TYPE,
    LLAMA,
    ROPES,
    TINY,
    dense_config,
    difference,
    every_family,
    greedy,
    logits,
    outputs,
    per_layer,
    policy_for,
    pruned_model,
    tokens,
    zeroed,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ppf.errors import InputError
from ppf.fast.permute import identity
from ppf.fitting.family_check import random_model
from ppf.fitting.materialize import materialize
from ppf.model.build import build, expected_tensors, policy_of, pruned_config
from ppf.model.classes import classes_of, result_classes, stock_classes
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("changes", "groups", "model_type"),
    [
        ({}, 1, "llama"),  # two heads divide 24
        ({}, 3, "llama"),
        ({"hidden_size": 42}, 2, "mistral"),  # four do not divide 42
        ({"hidden_size": 42, "tie_word_embeddings": True}, 2, "mistral"),
        ({"hidden_size": 42, "attention_bias": True}, 2, "ppf_llama"),  # which Mistral has not
        ({"hidden_size": 42, "mlp_bias": True}, 2, "ppf_llama"),
        ({"attention_bias": True, "mlp_bias": True}, 1, "llama"),
        ({"hidden_size": 42, "hidden_act": "gelu"}, 2, "mistral"),
        ({"hidden_size": 42, "rope_parameters": ROPES["yarn"]}, 2, "mistral"),
    ],
)
def test_uniform_llamas(changes, groups, model_type):
    """Llama's configuration refuses head counts that do not divide the hidden size; Mistral's takes any."""
    dense = dense_config(**({"attention_bias": False, "mlp_bias": False} | changes))
    policy = Policy([groups] * 6, [7] * 6)
    config = pruned_config(dense, policy)
    assert config.model_type == model_type and policy_of(config) == policy
    assert getattr(config, "sliding_window", None) is None
    stock = random_model(dense, LLAMA)
    decoder = Decoder.of_model(stock)
    pruned = materialize(decoder, identity(decoder), Grid(decoder.structure, 1), policy)
    assert type(pruned) is classes_of(model_type)["ForCausalLM"]
    assert difference(logits(pruned, tokens()), logits(zeroed(stock, policy), tokens())) < 1e-5


@every_family
def test_saved_models_come_back_through_the_auto_classes(family, tmp_path):
    model = pruned_model(family)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    classes = result_classes(family)
    assert type(again) is classes["ForCausalLM"] and policy_of(again.config) == policy_for(family)
    again.set_attn_implementation(model.config._attn_implementation)  # build() chose it for capped scores
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert type(AutoConfig.from_pretrained(tmp_path)) is classes["Config"]
    body = AutoModel.from_pretrained(tmp_path).eval()
    body.set_attn_implementation(model.config._attn_implementation)
    assert type(body) is classes["Model"]
    found, wanted = (outputs(part, tokens()).last_hidden_state for part in (body, model.model))
    assert torch.equal(found, wanted)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == family.result_type and written["architectures"] == [classes["ForCausalLM"].__name__]
    assert written["per_layer_config"]["3"]["intermediate_size"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_dtypes_and_tied_heads_come_back(tmp_path, dtype, tied):
    model = pruned_model(dtype=dtype, tie_word_embeddings=tied, rope_parameters=ROPES["llama3"])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype and (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_a_new_process_needs_the_import_and_nothing_else(tmp_path):
    model = pruned_model()
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch\nimport ppf.model.classes as c; c.classes_of('ppf_llama')\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(float(model(torch.arange(9)[None]).logits.detach().double().sum()))"
    )
    result = _python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == float(logits(model, torch.arange(9)[None]).double().sum())
    stock = _python("import sys; from transformers import AutoConfig as A; A.from_pretrained(sys.argv[1])", tmp_path)
    assert stock.returncode != 0 and "ppf_llama" in stock.stderr


def _python(code: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # Without ppf_autoload, which would make the import needless.
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=120)


@every_family
def test_configurations_are_copied_and_pickled(family):
    config = pruned_config(dense_config(family), policy_for(family))
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(again) is type(config) and again.to_dict() == config.to_dict()
        assert policy_of(again) == policy_for(family)


def test_models_are_copied_and_pickled():
    model = pruned_model(BY_TYPE["qwen3"])
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model) and torch.equal(logits(again, tokens()), logits(model, tokens()))


@every_family
@pytest.mark.parametrize("uniform", [False, True], ids=["layers differ", "uniform"])
def test_a_result_is_a_source_again(family, uniform, tmp_path):
    """Prune, save, load, prune again: widths count from the source, and the logits are those of the first model with
    all that is gone set to zero."""
    first, second = Policy([3, 0, 2, 1, 3, 3], [10, 4, 0, 8, 7, 3]), Policy([1, 0, 2, 1, 0, 2], [9, 0, 0, 8, 2, 3])
    if family.attention.whole:
        first, second = Policy([3, 0, 3, 3, 3, 3], first.ffn), Policy([3, 0, 3, 0, 0, 3], second.ffn)
    if uniform:
        first = Policy([3 if family.attention.whole else 2] * 6, [9] * 6)
    dense = random_model(dense_config(family), family)
    decoder = Decoder.of_model(dense)
    materialize(decoder, identity(decoder), Grid(decoder.structure, 1), first).save_pretrained(tmp_path)
    source = Decoder.of_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert policy_of(source.config) == first
    assert [a.units for a in source.structure.attention] == list(first.attention)
    assert [f.units for f in source.structure.ffn] == list(first.ffn)
    again = materialize(source, identity(source), Grid(source.structure, 1), second)
    assert policy_of(again.config) == second and again.config.model_type.startswith("ppf_")
    expected = logits(zeroed(dense, second), tokens())
    if again.config._attn_implementation == "eager":
        again.set_attn_implementation("eager")
    assert difference(logits(again, tokens()), expected) < 1e-5
    assert torch.equal(greedy(again, tokens()), greedy(zeroed(dense, second), tokens()))


def test_a_source_whose_layers_differ_may_become_uniform():
    dense = dense_config(attention_bias=False, mlp_bias=False)
    source = pruned_config(dense, Policy([3, 2, 2, 1, 3, 3], [10, 4, 5, 8, 7, 4]))
    config = pruned_config(source, Policy([1] * 6, [4] * 6))
    assert type(config) is LlamaConfig and config.num_attention_heads == 2 and config.head_dim == 8
    for wider in (Policy([1] * 6, [5] * 6), Policy([2] * 6, [4] * 6)):
        with pytest.raises(InputError, match="cannot have this width"):
            pruned_config(source, wider)


def test_build_takes_tensors_over_and_carries_the_generation_config():
    dense = LlamaForCausalLM.from_pretrained(TINY)
    dense.generation_config.max_new_tokens = 17
    state = dense.state_dict()
    model = build(dense.config, state, dense.dtype, dense.generation_config)
    assert model.generation_config.max_new_tokens == 17 and model.generation_config.eos_token_id == 1
    assert model.generation_config is not dense.generation_config and not model.training
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == state[name].data_ptr()


@every_family
@pytest.mark.parametrize("pruned", [False, True], ids=["stock", "result"])
def test_build_computes_what_is_not_loaded(family, pruned):
    """Rotary frequencies and embedding scales are those of a model that transformers makes itself."""
    config = dense_config(family)
    made = stock_classes(family)["ForCausalLM"](config)
    model = random_model(pruned_config(config, policy_for(family)) if pruned else config, family)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    expected, found = dict(made.named_buffers()), dict(model.named_buffers())
    assert found.keys() == expected.keys() and expected
    for name, buffer in found.items():
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "head"])
def test_build_refuses_state_dicts_that_do_not_fit(change):
    config = dense_config(tie_word_embeddings=True)
    state, name = dict(random_model(config, LLAMA).state_dict()), "model.layers.2.self_attn.k_proj.weight"
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state[name := "model.layers.2.self_attn.q_norm.weight"] = torch.zeros(8)
    elif change == "shape":
        state[name] = state[name][:-1]
    else:
        state[name := "lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(InputError) as caught:
        build(config, state, torch.float32)
    assert caught.value.value == name and caught.value.remedy


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({0: {"num_attention_heads": 0, "num_key_value_heads": 0}}, "layer 0 has no attention"),
        ({1: {"num_attention_heads": 3, "num_key_value_heads": 2}}, "no multiple"),
        ({1: {"num_key_value_heads": 0}}, "no multiple"),
        ({1: {"intermediate_size": -1}}, "at least 0"),
        ({1: {"intermediate_size": 1.5}}, "expected int"),
        ({1: {"skip": ["mlp"]}}, "only"),
        ({1: {"head_dim": 4}}, "only"),
        ({6: {"intermediate_size": 4}}, "layer indices"),
    ],
)
def test_configurations_refuse_layers_that_cannot_be(model_type, layers, message):
    with pytest.raises(Exception, match=message):
        per_layer(dense_config(BY_TYPE[model_type]), layers)


@pytest.mark.parametrize(
    ("model_type", "policy", "field"),
    [
        ("llama", Policy([3] * 5, [10] * 6), "policy.attention"),
        ("llama", Policy([3] * 6, [10] * 7), "policy.ffn"),
        ("llama", Policy([0] + [3] * 5, [10] * 6), "policy.attention[0]"),
        ("llama", Policy([3] * 6, [10] * 5 + [11]), "policy.ffn[5]"),
        ("llama", Policy([3, -1] + [3] * 4, [10] * 6), "policy.attention[1]"),
        ("olmo2", Policy([3, 2] + [3] * 4, [10] * 6), "policy.attention[1]"),  # all or nothing
    ],
)
def test_pruned_config_refuses_widths_off_the_model(model_type, policy, field):
    with pytest.raises(InputError) as caught:
        pruned_config(dense_config(BY_TYPE[model_type]), policy)
    assert caught.value.field == field


@every_family
def test_pruned_config_keeps_everything_but_the_widths(family):
    """Of layers without attention the type says nothing; a result's first layer of each type has attention."""
    changes = {"rms_norm_eps": 3e-5, "tie_word_embeddings": True, "dtype": "bfloat16", "attention_dropout": 0.125}
    dense = dense_config(family, **changes)
    kept = set(dense.to_dict()) - {*family.width_fields, "model_type", "architectures", "transformers_version"}
    whole = 3 if family.attention.whole else 1
    for policy in (policy_for(family), Policy([whole] * 6, [8] * 6)):
        config = pruned_config(dense, policy)
        for field in kept - {"layer_types"}:
            assert getattr(config, field) == getattr(dense, field), field
        if getattr(dense, "layer_types", None):
            same = [i for i in range(6) if policy.attention[i]]
            assert [config.layer_types[i] for i in same] == [dense.layer_types[i] for i in same]
            assert all(policy.attention[config.layer_types.index(t)] for t in set(config.layer_types))


def test_expected_tensors_are_those_of_the_model_without_a_tied_head():
    for tied in (False, True):
        model = pruned_model(tie_word_embeddings=tied)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if tied:
            del expected["lm_head.weight"]
        assert expected_tensors(model.config) == expected

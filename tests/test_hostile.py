"""Configurations that are odd or hostile: one clear line that names the field, at once, whatever they hold."""

from __future__ import annotations

import copy
import gc
import json
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppf.checkpoint import check_checkpoint, load, load_generation_config
from ppf.errors import InputError
from ppf.families import families, family_of
from ppf.model.build import build, expected_tensors, policy_of, pruned_config
from ppf.model.classes import stock_classes
from ppf.model.policy import Policy

SIZES = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 128}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
POLICY = Policy([3, 0, 2], [16, 32, 0])
DEEP = [0]
for _ in range(100):
    DEEP = [DEEP]


def write(folder: Path, model_type: str = "llama", policy: Policy | None = None, **changes) -> Path:
    """A tiny random model, dense or pruned to ``policy``; ``changes`` go into its config.json afterwards."""
    config = stock_classes(family_of(model_type))["Config"](**SIZES, **IDS)
    if policy is not None:
        config = pruned_config(config, policy)
    state = {name: torch.randn(shape) * 0.2 for name, shape in expected_tensors(config).items()}
    build(config, state, torch.float32).save_pretrained(folder)
    return change(folder, **changes)


def change(folder: Path, **changes) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@contextmanager
def within_a_second() -> Iterator[None]:
    """What is done inside must take less than a second of its own. What other tests left in memory is kept from the
    garbage collector meanwhile: going through three thousand tests' objects took longer than what is measured."""
    gc.freeze()
    start = time.process_time()
    try:
        yield
    finally:  # also when it is a refusal that is timed
        spent = time.process_time() - start
        gc.unfreeze()
        assert spent < 1


def refusal(folder: Path) -> InputError:
    """The ``InputError`` about ``folder``; it must come within a second."""
    with pytest.raises(InputError) as caught, within_a_second():
        check_checkpoint(folder)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3n", "ppf_gpt2", "", None, 7, ["llama"], {}])
def test_unknown_model_types_get_the_list_and_the_way_to_add_one(model_type, tmp_path):
    error = refusal(change(write(tmp_path), model_type=model_type))
    assert error.field == "model_type" and error.value == model_type
    assert all(family.model_type in error.remedy for family in families()) and "register" in error.remedy


@pytest.mark.parametrize("names", [["LlamaForSequenceClassification"], ["LlamaModel"], "LlamaForCausalLM", 3, [None]])
def test_other_classes_of_a_known_model_type_are_refused(names, tmp_path):
    error = refusal(write(tmp_path, architectures=names))
    assert error.field == "architectures" and "LlamaForCausalLM" in error.remedy


@pytest.mark.parametrize("names", [None, [], ["LLaMAForCausalLM"]])
def test_classes_that_are_not_stated_or_spelt_as_once_are_accepted(names, tmp_path):
    assert check_checkpoint(write(tmp_path, architectures=names)).model_type == "llama"


@pytest.mark.parametrize("value", [10**12, 10**15, 10**30, 2**31, 47, 0, -1, 1.5, float("nan"), "four", None, [], True])
@pytest.mark.parametrize("policy", [None, POLICY], ids=["dense", "result"])
@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_absurd_sizes_are_compared_with_the_headers(field, policy, value, tmp_path):
    assert refusal(write(tmp_path, policy=policy, **{field: value})).field == field


@pytest.mark.parametrize("value", [10**12, 10**30, 2**31 + 1, 0, -1, 1.5, float("inf"), "four", [], True])
@pytest.mark.parametrize("policy", [None, POLICY], ids=["dense", "result"])
@pytest.mark.parametrize("field", ["intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"])
def test_absurd_widths_are_bounded_by_the_headers(field, policy, value, tmp_path):
    assert refusal(write(tmp_path, policy=policy, **{field: value})).field == field


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"0": {"intermediate_size": 10**12}}, "per_layer_config.intermediate_size"),
        ({"0": {"num_attention_heads": 0, "num_key_value_heads": 0}}, "per_layer_config"),
        ({"1": {"num_attention_heads": -2}}, "per_layer_config"),
        ({"1": {"hidden_size": 12}}, "per_layer_config"),
        ({"9": {"intermediate_size": 8}}, "per_layer_config"),
        ({"x": {}}, "per_layer_config"),
        ([1, 2], "per_layer_config"),
        ({"0": 5}, "per_layer_config"),
        ({}, "checkpoint"),
        (None, "checkpoint"),
    ],
)
def test_absurd_widths_of_a_layer(layers, named, tmp_path):
    assert refusal(write(tmp_path, policy=POLICY, per_layer_config=layers)).field.startswith(named)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", 4),
        ("quantization_config", {"quant_method": "gptq"}),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", float("nan")),
        ("hidden_act", "nothing"),
        ("pad_token_id", 64),
        ("bos_token_id", 10**6),
        ("eos_token_id", [2, -5]),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("rope_parameters", {"rope_type": "nothing"}),
        ("dtype", "sdpa"),
        ("sliding_window", "wide"),
        ("layer_types", ["full_attention"]),
        ("anything", DEEP),
        ("anything", {"a": {"b": 10**40}}),
    ],
)
def test_other_fields_are_named(field, value, tmp_path):
    assert refusal(write(tmp_path, **{field: value})).field.startswith(field)


@pytest.mark.parametrize("share", [10**9, 10**12, 0, -1, "half", [1]])
@pytest.mark.parametrize("model_type", ["phi3", "llama"])
def test_rotations_take_no_memory_that_a_head_does_not_have(model_type, share, tmp_path):
    rotation = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    assert "partial_rotary_factor" in str(refusal(write(tmp_path, model_type, rope_parameters=rotation)))


def test_what_would_replace_code_or_choose_it_is_left_out(tmp_path):
    """Attention by the name of a repository would be downloaded and run; a number of labels becomes as many strings."""
    junk = {"to_dict": 1, "__class__": "x", "__deepcopy__": 3, "num_labels": 10**9, "auto_map": {"AutoConfig": "x--y"}}
    junk |= {"attn_implementation": "somebody/kernel", "_attn_implementation": "x/y", "base_model_tp_plan": 5}
    honest, model = load(write(tmp_path / "a")), load(write(tmp_path / "b", **junk))
    assert model.config._attn_implementation == honest.config._attn_implementation
    assert model.config.to_json_string() == honest.config.to_json_string()
    assert model(torch.randint(3, 64, (1, 9))).logits.isfinite().all()


def test_pad_token_of_minus_one_is_none(tmp_path):
    """The first conversions of Llama wrote that."""
    assert check_checkpoint(write(tmp_path, pad_token_id=-1)).pad_token_id == -1


def test_huge_json_is_not_parsed(tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "x": [' + "[]," * 6_000_000 + "[]]}")
    assert "MiB" in str(refusal(tmp_path))


def test_a_model_without_its_embedding_is_named(tmp_path):
    state = load_file(write(tmp_path) / "model.safetensors")
    del state["model.embed_tokens.weight"]
    save_file(state, tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in str(refusal(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        {"max_new_tokens": "many"},
        {"to_dict": 5, "validate": 3, "update": None},
        {"watermarking_config": 5},
        {"temperature": float("nan")},
        {"cache_implementation": "nothing"},
        {"suppress_tokens": DEEP},
        {"__dict__": 1},
        {"__class__": 1},
    ],
)
def test_generation_settings_are_read_or_refused(content, tmp_path):
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    for call in (load_generation_config, load):
        try:
            call(tmp_path)
        except InputError as error:
            assert "generation_config.json" in str(error)


# What fields hold when nobody means well; and fields that are read somewhere deep inside transformers.
_VALUES = [
    *(None, True, False, -1, 0, 1, 3, 7, 64, 10**6, 10**9, 10**12, 10**15, 2**31, 2**62, 10**30, -(10**12)),
    *(0.0, 0.5, -1.5, 1e308, float("nan"), float("inf"), "", "four", "1", "silu", "sdpa", "somebody/kernel", "x" * 999),
    *([], [1], ["full_attention"] * 3, [0] * 3, [[[[]]]], {}, {"a": 1}, DEEP, {"0": 5}, {"a": {}}, {"5": {}}),
    *({"rope_type": kind, "factor": 0} for kind in ("yarn", "dynamic", "longrope", "linear", "llama3")),
    *({"rope_type": "default", "rope_theta": theta} for theta in (0, -5, 1e300, "x")),
    *({"0": {"intermediate_size": 5}}, {"0": {"num_attention_heads": 10**9}}),
]
_FIELDS = [
    *("head_dim", "rope_scaling", "rope_theta", "rope_parameters", "num_labels", "id2label", "label2id"),
    *("layer_types", "no_rope_layers", "no_rope_layer_interval", "sliding_window", "max_window_layers"),
    *("use_sliding_window", "attn_implementation", "to_dict", "validate", "_attn_implementation_internal"),
    *("__class__", "__dict__", "__deepcopy__", "per_layer_config", "quantization_config", "dtype", "skip"),
    *("tie_word_embeddings", "torch_dtype", "architectures", "model_type", "auto_map", "text_config"),
    *("attribute_map", "kv_sharing_modes", "partial_rotary_factor", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier", "logits_scaling"),
    *("original_max_position_embeddings", "hidden_act", "hidden_activation", "rms_norm_eps", "mlp_bias"),
    *("attention_bias", "use_bidirectional_attention", "sliding_window_pattern", "output_attentions"),
    *("is_encoder_decoder", "use_cache", "max_length", "allow_global_per_layer_attribute_access"),
    *("transformers_weights", "pad_token_id", "eos_token_id", "bos_token_id", "is_causal", "attention_chunk_size"),
    *("default_theta", "tokenizer_class"),
]


def mutated(draw: random.Random, data: dict) -> dict:
    """``data`` with one to three fields, at any depth, added, removed, or given another value."""
    data = json.loads(json.dumps(data))
    for _ in range(draw.choice([1, 1, 2, 3])):
        place, name = data, None
        while name is None or (isinstance(place.get(name), dict) and draw.random() < 0.7):
            place = data if name is None else place[name]
            name = draw.choice(sorted(place)) if place and draw.random() < 0.6 else draw.choice(_FIELDS)
        if draw.random() < 0.1:
            place.pop(name, None)
        else:
            place[name] = copy.deepcopy(draw.choice(_VALUES))
    return data


@pytest.mark.parametrize("policy", [None, POLICY], ids=["dense", "result"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_mutated_configurations_are_refused_or_work(model_type, policy, tmp_path):
    write(tmp_path, model_type, policy)
    honest = json.loads((tmp_path / "config.json").read_text())
    check_checkpoint(tmp_path)
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(24):
        changed = mutated(random.Random(seed), honest)
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            with within_a_second():
                config = check_checkpoint(tmp_path)
        except InputError as error:
            refused += 1
            assert error.field and len(str(error)) < 2000, seed
        else:
            # What passes can be pruned and computes: nothing is left to fail after hours.
            assert pruned_config(config, policy_of(config)).num_hidden_layers == 3, seed
            with torch.no_grad():
                load(tmp_path)(torch.randint(3, 60, (1, 10)))
    assert 6 < refused < 24
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB

"""Results as transformers models: for every family, the classes whose layers differ against the stock ones."""

import copy
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from ppf.errors import InputError
from ppf.families import KINDS, Family, families, family_of
from ppf.fast.permute import identity
from ppf.fitting.family_check import random_model, tiny_config
from ppf.fitting.materialize import materialize
from ppf.model.build import build, expected_tensors, policy_of, pruned_config
from ppf.model.classes import classes_of, result_classes, stock_classes
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.perlayer import Absent
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Path(__file__).parents[1] / "ppf" / "data" / "tiny-2m"
ALL = families()
BY_TYPE = {family.model_type: family for family in ALL}
LLAMA = BY_TYPE["llama"]
every_family = pytest.mark.parametrize("family", ALL, ids=list(BY_TYPE))
# Layers: dense, no attention, no FFN, neither, partly both, one kv-group.
FFN = [10, 4, 0, 0, 7, 1]
POLICY = Policy([3, 0, 2, 0, 1, 1], FFN)
# Every second layer is local in families that have both kinds: 1 and 3, without attention, are the first global ones.
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0],
    },
}  # fmt: skip


def policy_for(family: Family) -> Policy:
    """:data:`POLICY`, or where attention goes as a whole the nearest to it."""
    return Policy([3, 0, 3, 0, 3, 3], FFN) if family.attention.whole else POLICY


def dense_config(family: Family = LLAMA, **changes):
    return tiny_config(family, **({"num_hidden_layers": 6} | changes))


def pruned_model(family: Family = LLAMA, policy: Policy | None = None, dtype=torch.float32, **changes):
    config = pruned_config(dense_config(family, **changes), policy or policy_for(family))
    return random_model(config, family).to(dtype)


def per_layer(dense, layers: dict[int, dict[str, int]] | None = None):
    """``dense`` under the class whose layers may differ, with these differences."""
    fields = {k: v for k, v in dense.to_dict().items() if k not in ("model_type", "architectures")}
    return result_classes(family_of(dense.model_type))["Config"](**fields, per_layer_config=layers or {})


def tokens(batch: int = 2, length: int = 11, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def greedy(model, ids: torch.Tensor, **options) -> torch.Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    how = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12, "disable_compile": True}
    return model.generate(ids, attention_mask=mask, **(how | options))[:, ids.shape[1] :]


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one, as a share of the largest number expected."""
    return float((found - expected).abs().max() / expected.abs().max())


@cache
def dense_and_pruned(family: Family, **changes):
    """A stock model with the columns of what goes set to zero (and the output biases of what goes entirely), and the
    result that has these units no more."""
    config, policy = dense_config(family, **changes), policy_for(family)
    stock = random_model(config, family)
    decoder = Decoder.of_model(stock)
    pruned = materialize(decoder, identity(decoder), Grid(decoder.structure, 1), policy)
    return zeroed(stock, policy), pruned


@torch.no_grad()
def zeroed(stock, policy: Policy):
    """A copy of a stock model that computes what ``policy`` leaves of it."""
    decoder, state = Decoder.of_model(stock), {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    for kind in KINDS:
        for index, (width, sublayer) in enumerate(zip(policy[kind], decoder.structure.of(kind), strict=True)):
            name = f"model.layers.{index}.{decoder.family.parts[kind].output_name}"
            state[f"{name}.weight"][:, width * sublayer.columns :] = 0
            if not width and f"{name}.bias" in state:
                state[f"{name}.bias"].zero_()
    return build(stock.config, state, torch.float32)


@every_family
def test_absent_sublayers_have_no_weights_and_no_modules(family):
    model, policy = pruned_model(family), policy_for(family)
    decoder = Decoder.of_model(model)
    for kind, part in family.parts.items():
        for index, width in enumerate(policy[kind]):
            layer = model.model.layers[index]
            owned = [name for name in layer.state_dict() if part.owns(name)]
            module = layer.get_submodule(part.module)
            assert bool(owned) == bool(width) == (not isinstance(module, Absent))
            if not width:
                removed = [module, *(layer.get_submodule(norm) for norm in part.norms)]
                assert not any(True for one in removed for _ in (*one.parameters(), *one.buffers()))
            elif kind == "ffn":
                assert decoder.output(index, kind).shape == (24, width)
    assert list(model.model.layers[3].parameters()) == []  # neither
    assert policy_of(model.config) == policy


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_the_stock_models_with_what_goes_set_to_zero(family, attention):
    stock, pruned = dense_and_pruned(family)
    assert type(pruned) is result_classes(family)["ForCausalLM"]
    for model in (stock, pruned):
        model.set_attn_implementation(attention)
    assert pruned.model.layers[4].self_attn.config._attn_implementation == attention
    ids = tokens()
    expected = logits(stock, ids)
    assert difference(logits(pruned, ids), expected) < 1e-5
    # Negative control: one number of one pruned layer changed must not pass.
    weight = Decoder.of_model(pruned).output(4, "ffn")
    before, weight[3, 2] = float(weight[3, 2]), 5.0
    assert difference(logits(pruned, ids), expected) > 1e-3
    weight[3, 2] = before


def both_classes(config, dtype=torch.float32, layers=None):
    """A stock model, and the same weights under the class whose layers may differ."""
    stock = random_model(config, family_of(config.model_type)).to(dtype)
    return stock, build(per_layer(config, layers), stock.state_dict(), dtype)


@every_family
def test_the_dense_policy_is_bit_identical_to_the_stock_class(family):
    stock, ours = both_classes(dense_config(family))
    assert type(ours) is result_classes(family)["ForCausalLM"] and type(stock) is stock_classes(family)["ForCausalLM"]
    for model in (stock, ours):
        model.set_attn_implementation("eager")
    assert torch.equal(logits(ours, tokens()), logits(stock, tokens()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", ["default", "llama3"])
def test_every_dtype_is_bit_identical_to_llama(dtype, tied, rope):
    stock, ours = both_classes(dense_config(tie_word_embeddings=tied, rope_parameters=ROPES[rope]), dtype)
    assert ours.dtype == dtype and (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert torch.equal(logits(ours, tokens()), logits(stock, tokens()))


def test_the_dense_policy_is_bit_identical_on_the_bundled_model():
    dense = LlamaForCausalLM.from_pretrained(TINY)
    same = build(per_layer(dense.config), dense.state_dict(), dense.dtype)
    ids = tokens(length=200, vocabulary=2048)
    assert torch.equal(logits(same, ids), logits(dense, ids))


@every_family
def test_uniform_policies_give_the_stock_class_bit_identically(family):
    policy = Policy([3 if family.attention.whole else 2] * 6, [7] * 6)
    # Nothing that Mistral could not hold: four heads of eight do not fill 24 numbers.
    plain = {"attention_bias": False, "mlp_bias": False} if family is LLAMA else {}
    dense = dense_config(family, **plain)
    config = pruned_config(dense, policy)
    model_type = "mistral" if family is LLAMA else family.model_type
    assert config.model_type == model_type and policy_of(config) == policy
    assert type(config) is stock_classes(BY_TYPE[model_type])["Config"]
    uniform = random_model(config, BY_TYPE[model_type])
    layers = {
        i: {k: v for kind in KINDS for k, v in family.fields(kind, policy[kind][i], 2 if kind == "attention" else 1).items()}
        for i in range(6)
    }  # fmt: skip
    ours = build(per_layer(dense, layers), uniform.state_dict(), torch.float32)
    for model in (uniform, ours):
        model.set_attn_implementation("eager")
    assert torch.equal(logits(uniform, tokens()), logits(ours, tokens()))


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
def test_generate_gives_the_same_tokens_with_and_without_cache(family):
    """Growing, fixed and sliding caches, whose kind follows the layers' types; beams, which reorder them."""
    model, ids = pruned_model(family), tokens()
    plain = greedy(model, ids, use_cache=False)
    # Without disable_compile generate() would spend a minute compiling the static cache's step on a CPU.
    for cached in ("dynamic", "static"):
        assert torch.equal(greedy(model, ids, cache_implementation=cached), plain), cached
    assert torch.equal(greedy(model, ids, num_beams=3), greedy(model, ids, num_beams=3, use_cache=False))
    kinds = {type(layer).__name__ for layer in StaticCache(config=model.config, max_cache_len=23).layers}
    windows = {"mistral", "ministral3", "phi3"}, {"qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"}
    local, both = (family.model_type in names for names in windows)
    full, sliding = {"StaticLayer"}, {"StaticSlidingWindowLayer"}
    assert kinds == (sliding if local else full | sliding if both else full)


@pytest.mark.parametrize("cached", ["dynamic", "static"])
def test_generate_by_plain_matrix_products(cached):
    model, ids = pruned_model(), tokens()
    model.set_attn_implementation("eager")
    found = greedy(model, ids, cache_implementation=cached)
    assert torch.equal(found, greedy(model, ids, use_cache=False)) and len(set(found.flatten().tolist())) > 6


@every_family
def test_left_padded_batches_equal_unpadded_prompts(family):
    model, prompts = pruned_model(family), [tokens(1, 5), tokens(1, 11)]
    padded = torch.zeros(2, 11, dtype=torch.int64)
    padded[0, 6:], padded[1] = prompts[0], prompts[1]
    mask = (torch.arange(11) >= torch.tensor([[6], [0]])).long()
    alone = torch.cat([greedy(model, prompt) for prompt in prompts])
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(greedy(model, padded, attention_mask=mask, **how), alone), how


@every_family
def test_a_text_may_come_in_pieces(family):
    """What is in the cache and several new tokens: masks are as long as the caches of layers that have attention."""
    model, ids = pruned_model(family), tokens()
    with torch.no_grad():
        first = model(ids[:, :6], use_cache=True)
        second = model(ids[:, 6:], past_key_values=first.past_key_values)
    found = torch.cat((first.logits, second.logits), 1)
    assert difference(found, logits(model, ids)) < 1e-5


def test_static_cache_shapes_follow_the_layers():
    model = pruned_model()
    cache = StaticCache(config=model.config, max_cache_len=16)
    heads, head_dim = model._get_static_cache_init_shape()
    cache.early_initialization(batch_size=2, num_heads=heads, head_dim=head_dim, dtype=model.dtype, device=model.device)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, w, 16, 8) for w in POLICY.attention]
    with torch.no_grad():
        found = model(tokens(), past_key_values=cache, use_cache=True).logits
    assert difference(found, logits(model, tokens())) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3"])
def test_compiles_to_one_graph_with_the_same_logits(model_type):
    torch._dynamo.reset()
    # A layer without attention and one without FFN; three layers, because compiling costs seconds per layer.
    model = pruned_model(BY_TYPE[model_type], Policy([2, 0, 1], [7, 4, 0]), num_hidden_layers=3)
    ids = tokens()
    compiled = torch.compile(model, fullgraph=True)
    assert difference(logits(compiled, ids), logits(model, ids)) < 1e-5


@every_family
def test_gradients_reach_every_parameter(family):
    """With gradient checkpointing, too, which runs every layer again."""
    tied = family.model_type in ("llama", "gemma2")
    model, ids = pruned_model(family, tie_word_embeddings=tied), tokens()
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert plain and all(torch.count_nonzero(gradient) for gradient in plain.values())
    model.zero_grad()
    model.gradient_checkpointing_enable()
    calls, original = [], model.model.layers[0]._gradient_checkpointing_func
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = lambda *a, **k: calls.append(1) or original(*a, **k)
    model.train()(ids, labels=ids).loss.backward()
    assert len(calls) == 6
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


@every_family
def test_hidden_states_and_attentions(family):
    model, ids, policy = pruned_model(family), tokens(), policy_for(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 7
    assert torch.equal(out.hidden_states[3], out.hidden_states[4])  # layer 3 has neither sub-layer
    assert not torch.equal(out.hidden_states[4], out.hidden_states[5])
    assert [a.shape[1] for a in out.attentions if a is not None] == [2 * w for w in policy.attention if w]


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
    with torch.no_grad():
        assert torch.equal(body(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)
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


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("length", [11, 40], ids=["within", "beyond"])
def test_every_rotation_of_llama_builds_generates_and_reloads(tmp_path, rope, length):
    """Texts within the length that the rotation was made for and beyond it, where some compute other frequencies."""
    changes = {"rope_parameters": ROPES[rope], "max_position_embeddings": 64 if rope in ("yarn", "longrope") else 24}
    stock, pruned = dense_and_pruned(LLAMA, **changes)
    ids = tokens(length=length)
    expected = logits(stock, ids)
    assert difference(logits(pruned, ids), expected) < 1e-5
    plain, _ = dense_and_pruned(LLAMA)
    assert difference(logits(plain, ids), expected) > 1e-3  # the rotation matters
    assert torch.equal(greedy(pruned, ids), greedy(stock, ids))
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == stock.config.rope_parameters
    assert torch.equal(logits(again, ids), logits(pruned, ids))


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

"""The pruned Hugging Face classes and the layout of policies, on tiny models; all on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from ppf.errors import InputError
from ppf.model import PPFLlamaConfig, PPFLlamaForCausalLM, PPFLlamaModel, build, policy_of, pruned_config
from ppf.model.layout import expected_tensors
from ppf.model.policy import Policy

TINY = Path(__file__).parents[1] / "ppf" / "data" / "tiny-2m"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Layers: dense, no attention, no FFN, neither, partly both, one kv-group.
POLICY = Policy([3, 0, 2, 0, 1, 1], [48, 16, 0, 0, 40, 7])


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small run several times slower when threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dense_config(**changes) -> LlamaConfig:
    fields = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 96,
        "pad_token_id": 95,
    }
    return LlamaConfig(**(fields | changes))


def random_model(config, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A model whose logits are far apart: weights of size 0.3 instead of 0.02, and norms that are not all one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_tensors(config)
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return build(config, state, dtype)


def pruned_model(policy: Policy = POLICY, dtype: torch.dtype = torch.float32, **changes) -> PPFLlamaForCausalLM:
    return random_model(pruned_config(dense_config(**changes), policy), dtype=dtype)


def tokens(batch: int = 2, length: int = 11, vocabulary: int = 95) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def greedy(model, ids: torch.Tensor, **options) -> torch.Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    new = 12
    return model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new, **options)[
        :, ids.shape[1] :
    ]


def reference_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """The same network written out in fp64, mask and all: nothing of transformers."""
    config, weights = model.config, {name: weight.double() for name, weight in model.state_dict().items()}
    length, width = ids.shape[1], config.head_dim
    frequency = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2).double() / width)
    angle = torch.arange(length).double()[:, None] * torch.cat((frequency, frequency))

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def rotate(x):
        half = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
        return x * angle.cos() + half * angle.sin()

    def heads(x, name, count):
        return (x @ weights[name].T).unflatten(-1, (count, width)).transpose(1, 2)

    x = weights["model.embed_tokens.weight"][ids]
    for index, (count, kv_count, channels) in enumerate(config.layer_widths()):
        layer = f"model.layers.{index}."
        if count:
            y = norm(x, layer + "input_layernorm.weight")
            q = rotate(heads(y, layer + "self_attn.q_proj.weight", count))
            k = rotate(heads(y, layer + "self_attn.k_proj.weight", kv_count))
            v = heads(y, layer + "self_attn.v_proj.weight", kv_count)
            k, v = (t.repeat_interleave(count // kv_count, dim=1) for t in (k, v))
            score = q @ k.transpose(2, 3) / width**0.5
            score = score.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            y = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + y @ weights[layer + "self_attn.o_proj.weight"].T
        if channels:
            y = norm(x, layer + "post_attention_layernorm.weight")
            gate, up = (y @ weights[layer + f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (torch.nn.functional.silu(gate) * up) @ weights[layer + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


def test_absent_sublayers_have_no_weights_and_no_modules():
    model = pruned_model()
    names = set(model.state_dict())
    assert not any(".1.self_attn" in n or ".1.input_layernorm" in n for n in names)
    assert not any(".2.mlp" in n or ".2.post_attention" in n for n in names)
    assert not any("layers.3." in n for n in names)
    assert not hasattr(model.model.layers[1], "self_attn") and not hasattr(model.model.layers[2], "mlp")
    assert model.model.layers[4].self_attn.o_proj.weight.shape == (48, 16)
    assert model.model.layers[5].mlp.up_proj.weight.shape == (7, 48)
    assert policy_of(model.config) == POLICY


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_the_network_written_out(attention):
    model, ids = pruned_model(), tokens()
    model.set_attn_implementation(attention)
    assert model.model.layers[4].self_attn.config._attn_implementation == attention
    expected = reference_logits(model, ids)
    torch.testing.assert_close(model(ids).logits.double(), expected, rtol=1e-4, atol=1e-4)
    # Negative control: one channel of one pruned layer set to zero must not pass.
    model.model.layers[5].mlp.up_proj.weight.data[3] = 0
    assert (model(ids).logits.double() - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", [None, LLAMA3_ROPE])
def test_dense_policy_is_bit_identical_to_llama(dtype, tied, rope):
    config = dense_config(tie_word_embeddings=tied, **({"rope_parameters": rope} if rope else {}))
    dense = random_model(config, dtype=dtype)
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    same = build(PPFLlamaConfig(**fields, per_layer_config={}), dense.state_dict(), dtype)
    assert type(same) is PPFLlamaForCausalLM and same.dtype == dtype
    assert torch.equal(same(tokens()).logits, dense(tokens()).logits)


def test_dense_policy_is_bit_identical_on_the_bundled_model():
    dense = LlamaForCausalLM.from_pretrained(TINY)
    fields = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")}
    same = build(PPFLlamaConfig(**fields, per_layer_config={}), dense.state_dict(), dense.dtype)
    ids = tokens(length=200, vocabulary=2048)
    assert torch.equal(same(ids).logits, dense(ids).logits)


@pytest.mark.parametrize(
    ("policy", "model_type"),
    [
        (Policy([2] * 6, [40] * 6), "mistral"),
        (Policy([1] * 6, [40] * 6), "llama"),
        (Policy([3] * 6, [48] * 6), "llama"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_uniform_policies_use_stock_classes_bit_identically(policy, model_type, tied):
    # Heads · head_dim is not the hidden size; two groups are 4 heads, which do not divide 42.
    dense = dense_config(hidden_size=42, head_dim=12, tie_word_embeddings=tied)
    config = pruned_config(dense, policy)
    assert config.model_type == model_type and policy_of(config) == policy
    uniform = random_model(config)
    layers = {
        i: {"num_attention_heads": 2 * w, "num_key_value_heads": w, "intermediate_size": c}
        for i, (w, c) in enumerate(zip(policy.attention, policy.ffn, strict=True))
    }
    fields = {k: v for k, v in dense.to_dict().items() if k not in ("model_type", "architectures")}
    ours = build(PPFLlamaConfig(**fields, per_layer_config=layers), uniform.state_dict(), torch.float32)
    assert torch.equal(uniform(tokens()).logits, ours(tokens()).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens_with_and_without_cache(cache, attention):
    model, ids = pruned_model(), tokens()
    model.set_attn_implementation(attention)
    # disable_compile: generate() would spend a minute compiling the static-cache step on a CPU.
    cached = greedy(model, ids, cache_implementation=cache, disable_compile=True)
    assert torch.equal(cached, greedy(model, ids, use_cache=False))
    assert len(set(cached.flatten().tolist())) > 6


def test_generate_by_beam_search_reorders_caches_of_absent_layers():
    model, ids = pruned_model(), tokens()
    assert torch.equal(greedy(model, ids, num_beams=3), greedy(model, ids, num_beams=3, use_cache=False))


def test_static_cache_shapes_follow_the_layers():
    model = pruned_model()
    cache = StaticCache(config=model.config, max_cache_len=16)
    heads, head_dim = model._get_static_cache_init_shape()
    cache.early_initialization(batch_size=2, num_heads=heads, head_dim=head_dim, dtype=model.dtype, device=model.device)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, w, 16, 8) for w in POLICY.attention]
    logits = model(tokens(), past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_batch_equals_unpadded_prompts(attention):
    model, prompts = pruned_model(), [tokens(1, 5), tokens(1, 11)]
    model.set_attn_implementation(attention)
    padded = torch.full((2, 11), 95)
    padded[0, 6:], padded[1] = prompts[0], prompts[1]
    mask = (torch.arange(11) >= torch.tensor([[6], [0]])).long()
    together = greedy(model, padded, attention_mask=mask)
    assert torch.equal(together, torch.cat([greedy(model, prompt) for prompt in prompts]))


def test_compiles_to_one_graph_with_the_same_logits():
    torch._dynamo.reset()
    # A layer without attention and one without FFN; three layers, because compiling costs seconds per layer.
    model = pruned_model(Policy([2, 0, 1], [40, 16, 0]), num_hidden_layers=3)
    ids = tokens()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_every_parameter(checkpointing, tied):
    model, ids = pruned_model(tie_word_embeddings=tied), tokens()
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(torch.count_nonzero(gradient) for gradient in plain.values())
    if checkpointing:
        model.zero_grad()
        model.gradient_checkpointing_enable()
        calls = []
        original = model.model.layers[0]._gradient_checkpointing_func
        for layer in model.model.layers:
            layer._gradient_checkpointing_func = lambda *a, **k: calls.append(1) or original(*a, **k)
        model.train()(ids, labels=ids).loss.backward()
        assert len(calls) == 6
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, plain[name])


def test_hidden_states_and_attentions():
    model, ids = pruned_model(), tokens()
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 7
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(out.hidden_states[3], out.hidden_states[4])  # layer 3 has neither sub-layer
    assert not torch.equal(out.hidden_states[4], out.hidden_states[5])
    assert [a.shape[1] for a in out.attentions] == [2 * w for w in POLICY.attention if w]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_model_comes_back_through_the_auto_classes(tmp_path, dtype, tied):
    model = pruned_model(dtype=dtype, tie_word_embeddings=tied, rope_parameters=LLAMA3_ROPE)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is PPFLlamaForCausalLM and again.dtype == dtype and policy_of(again.config) == POLICY
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is PPFLlamaModel
    assert torch.equal(body(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "ppf_llama" and written["per_layer_config"]["3"]["intermediate_size"] == 0
    assert type(AutoConfig.from_pretrained(tmp_path)) is PPFLlamaConfig


def test_fresh_process_needs_the_import_and_nothing_else(tmp_path):
    model = pruned_model()
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch\nimport ppf.model\nfrom transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(float(model(torch.arange(9)[None]).logits.detach().double().sum()))"
    )
    result = _python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == float(model(torch.arange(9)[None]).logits.detach().double().sum())
    stock = _python("import sys; from transformers import AutoConfig as A; A.from_pretrained(sys.argv[1])", tmp_path)
    assert stock.returncode != 0 and "ppf_llama" in stock.stderr


def _python(code: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # Without ppf_autoload, which would make the import needless.
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=120)


def test_build_takes_tensors_over_and_carries_the_generation_config():
    dense = LlamaForCausalLM.from_pretrained(TINY)
    dense.generation_config.max_new_tokens = 17
    state = dense.state_dict()
    model = build(dense.config, state, dense.dtype, dense.generation_config)
    assert model.generation_config.max_new_tokens == 17 and model.generation_config.eos_token_id == 1
    assert model.generation_config is not dense.generation_config and not model.training
    name = "model.layers.0.mlp.down_proj.weight"
    assert model.get_parameter(name).data_ptr() == state[name].data_ptr()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "head"])
def test_build_refuses_state_dicts_that_do_not_fit(change):
    config = dense_config(tie_word_embeddings=True)
    state, name = dict(random_model(config).state_dict()), "model.layers.2.self_attn.k_proj.weight"
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state[name := "model.layers.2.self_attn.k_proj.bias"] = torch.zeros(24)
    elif change == "shape":
        state[name] = state[name][:-1]
    else:
        state[name := "lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(InputError) as caught:
        build(config, state, torch.float32)
    assert caught.value.value == name


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
def test_config_refuses_layers_that_cannot_be(layers, message):
    fields = {k: v for k, v in dense_config().to_dict().items() if k not in ("model_type", "architectures")}
    with pytest.raises(Exception, match=message):
        PPFLlamaConfig(**fields, per_layer_config=layers)


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (Policy([3] * 5, [48] * 6), "policy.attention"),
        (Policy([3] * 6, [48] * 7), "policy.ffn"),
        (Policy([0] + [3] * 5, [48] * 6), "policy.attention[0]"),
        (Policy([3] * 6, [48] * 5 + [49]), "policy.ffn[5]"),
        (Policy([3, -1] + [3] * 4, [48] * 6), "policy.attention[1]"),
    ],
)
def test_pruned_config_refuses_widths_off_the_model(policy, field):
    with pytest.raises(InputError) as caught:
        pruned_config(dense_config(), policy)
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias", "hidden_act"])
def test_pruned_config_refuses_unsupported_features(field):
    with pytest.raises(InputError) as caught:
        pruned_config(dense_config(**{field: "gelu" if field == "hidden_act" else True}), POLICY)
    assert caught.value.field == field


@pytest.mark.parametrize("policy", [POLICY, Policy([2] * 6, [40] * 6)])
def test_pruned_config_refuses_what_is_pruned_already(policy):
    config = pruned_config(dense_config(hidden_size=42, head_dim=12), policy)
    assert config.model_type in ("ppf_llama", "mistral")
    with pytest.raises(InputError, match="no dense Llama"):
        pruned_config(config, Policy([1] * 6, [7] * 6))


def test_pruned_config_keeps_everything_but_the_widths():
    dense = dense_config(rope_parameters=LLAMA3_ROPE, rms_norm_eps=3e-5, tie_word_embeddings=True, dtype="bfloat16")
    for policy in (POLICY, Policy([2] * 6, [40] * 6), Policy([1] * 6, [8] * 6)):
        config = pruned_config(dense, policy)
        for field in (
            "rope_parameters",
            "rms_norm_eps",
            "tie_word_embeddings",
            "head_dim",
            "eos_token_id",
            "dtype",
            "max_position_embeddings",
            "vocab_size",
            "hidden_size",
            "pad_token_id",
            "attention_dropout",
        ):
            assert getattr(config, field) == getattr(dense, field), field

"""Results as transformers models: for every family, the classes whose layers differ against the stock ones."""

import pytest
import torch
from model_cases import (
    ALL,
    BY_TYPE,
    LLAMA,
    POLICY,
    ROPES,
    TINY,
    dense_and_pruned,
    dense_config,
    difference,
    every_family,
    greedy,
    logits,
    model_in,
    old_names,
    per_layer,
    policy_for,
    pruned_model,
    tokens,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM, StaticCache

from ppf.fitting.family_check import random_model
from ppf.model.build import build, policy_of, pruned_config
from ppf.model.classes import result_classes, stock_classes
from ppf.model.decoder import Decoder
from ppf.model.perlayer import Absent
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize(
    ("family", "attention"),
    # transformers computes capped scores in one way only.
    [(f, way) for f in ALL for way in ("sdpa", "eager") if (f.model_type, way) != ("gemma2", "sdpa")],
    ids=lambda value: getattr(value, "model_type", value),
)
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
    stock = model_in(dtype, config)
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
    dense = dense_config(family)
    config = pruned_config(dense, policy)
    assert type(config) is stock_classes(family)["Config"] and policy_of(config) == policy
    uniform = random_model(config, family)
    assert type(uniform) is stock_classes(family)["ForCausalLM"]
    widths = family.fields("attention", policy.attention[0], 2) | family.fields("ffn", 7, 1)
    ours = build(per_layer(dense, dict.fromkeys(range(6), widths)), uniform.state_dict(), torch.float32)
    for model in (uniform, ours):
        model.set_attn_implementation("eager")
    assert torch.equal(logits(uniform, tokens()), logits(ours, tokens()))


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
@old_names
def test_a_text_may_come_in_pieces(family):
    """What is in the cache and several new tokens: masks are as long as the caches of layers that have attention."""
    model, ids = pruned_model(family), tokens()
    with torch.no_grad():
        first = model(ids[:, :6], use_cache=True)
        second = model(ids[:, 6:], past_key_values=first.past_key_values)
    found = torch.cat((first.logits, second.logits), 1)
    assert difference(found, logits(model, ids)) < 1e-5


@old_names
def test_static_cache_shapes_follow_the_layers():
    model = pruned_model()
    cache = StaticCache(config=model.config, max_cache_len=16)
    heads, head_dim = model._get_static_cache_init_shape()
    cache.early_initialization(batch_size=2, num_heads=heads, head_dim=head_dim, dtype=model.dtype, device=model.device)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, w, 16, 8) for w in POLICY.attention]
    with torch.no_grad():
        found = model(tokens(), past_key_values=cache, use_cache=True).logits
    assert difference(found, logits(model, tokens())) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "backend"), [("llama", "inductor"), ("gemma3_text", "eager"), ("phi3", "eager")]
)
def test_compiles_to_one_graph_with_the_same_logits(model_type, backend):
    """What may break is the graph; turning it into code costs seconds per layer, and is done for one family."""
    torch._dynamo.reset()
    # A layer without attention and one without FFN.
    model = pruned_model(BY_TYPE[model_type], Policy([2, 0, 1], [7, 4, 0]), num_hidden_layers=3)
    ids = tokens()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert difference(logits(compiled, ids), logits(model, ids)) < 1e-5


@every_family
@old_names
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
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == stock.config.rope_parameters
    assert torch.equal(logits(again, ids), logits(pruned, ids))
    assert torch.equal(greedy(pruned, ids), greedy(stock, ids))

"""The runtime against transformers' plain generation. On a CPU its ops are the references, and steps run without a
graph; everything else is the same code.
"""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import torch
from factories import byte_tokenizer, model_of
from runtime_cases import (
    DEVICE,
    FAMILIES,
    GREEDY,
    SAMPLE,
    WINDOWS,
    Record,
    both,
    dense,
    end_of,
    prompts,
    pruned,
    requests_served,
    uneven,
)
from transformers import GenerationConfig, GenerationMixin, StoppingCriteria

import ppf
from ppf.fast.runtime import prefill
from ppf.fast.runtime.plan import Plan, plan_of
from ppf.model.policy import Policy


@pytest.fixture(autouse=True)
def served(monkeypatch, one_thread):
    return requests_served(monkeypatch)


@pytest.mark.parametrize("lengths", [(5,), (7, 1, 4), (1,)])
@pytest.mark.parametrize("heads", ["mha", "gqa"])
@pytest.mark.parametrize("make", [dense, pruned])
def test_greedy_tokens_are_the_plain_ones(make, heads, lengths, served):
    got, wanted = both(make(heads=heads), **prompts(*lengths), max_new_tokens=20, **GREEDY)
    assert torch.equal(got, wanted) and len(served) == 1


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
VARIANTS = {
    "tied": lambda: dense(tie_word_embeddings=True),
    "llama3 rotary": lambda: dense(rope_parameters=LLAMA3),
    "mistral": lambda: pruned(Policy([5] * 4, [32] * 4), heads="mha"),
    "one kv-group": lambda: pruned(Policy([1, 1, 1, 1], [8, 64, 8, 64])),
    "wide head": lambda: dense(head_dim=24),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_llamas(name, served):
    got, wanted = both(VARIANTS[name](), **prompts(20, 6), max_new_tokens=40, **GREEDY)
    assert torch.equal(got, wanted) and len(served) == 1


@pytest.mark.parametrize("block", [4096, 5])
@pytest.mark.parametrize("make", [dense, pruned])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name, make, block, served, monkeypatch):
    """Prompts shorter and longer than the window, which goes on moving; and prompts in several blocks of queries."""
    monkeypatch.setattr(prefill, "BLOCK_QUERIES", block)
    family, changes = FAMILIES[name]
    model = make(family=family, **changes)
    asked = [(30, 9), (4,), (23,)] if block > 30 else [(30, 9)]
    for lengths in asked:
        got, wanted = both(model, **prompts(*lengths), max_new_tokens=24, **GREEDY)
        assert torch.equal(got, wanted)
    assert len(served) == len(asked)


def without(name: str):
    """A plan function that forgets one kind of tensor, or all windows."""

    def forgetful(model) -> Plan:
        plan = plan_of(model)
        layers = []
        for layer in plan.layers:
            attention, ffn = (
                replace(part, **{f.name: None for f in fields(part) if f.name.endswith(name)})
                for part in (layer.attention, layer.ffn)
            )
            layers.append(
                replace(layer, attention=attention, ffn=ffn, window=None if name == "window" else layer.window)
            )
        return replace(plan, layers=tuple(layers))

    return forgetful


@pytest.mark.parametrize(
    ("forgotten", "name"),
    [
        ("q_bias", "qwen3 with biases and windows"), ("o_bias", "llama with all biases"),
        ("gate_bias", "llama with all biases"), ("down_bias", "llama with all biases"), ("window", "mistral"),
        ("window", "qwen2 with windows"), ("q_norm", "qwen3"), ("k_norm", "qwen3"),
    ],
)  # fmt: skip
def test_what_is_forgotten_is_noticed(forgotten, name, served, monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr("ppf.fast.runtime.state.plan_of", without(forgotten))
    family, changes = FAMILIES[name]
    got, wanted = both(dense(family=family, **changes), **prompts(30, 9), max_new_tokens=24, **GREEDY)
    assert len(served) == 1 and not torch.equal(got, wanted)


def test_a_bias_of_some_of_the_projections(served):
    """Those that lack one get zeros."""
    model = model_of("llama", attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = None
    got, wanted = both(ppf.accelerate(model.to(DEVICE)), **prompts(12, 5), max_new_tokens=12, **GREEDY)
    assert torch.equal(got, wanted) and len(served) == 1
    assert all(layer.attention.k_bias.count_nonzero() == 0 for layer in plan_of(model).layers)


def test_windows_of_layers():
    """As transformers has them: of all layers, of those after a number, or of none although a size is there."""

    def windows(family: str, **changes) -> list[int | None]:
        return [layer.window for layer in plan_of(model_of(family, **changes)).layers]

    assert windows("mistral") == [16] * 4 and windows("mistral", sliding_window=None) == [None] * 4
    assert windows("qwen2", **WINDOWS) == [None, None, 9, 9]
    assert windows("qwen3", **WINDOWS | {"use_sliding_window": False}) == [None] * 4


def test_256_tokens(served):
    model = dense(max_position_embeddings=512)
    got, wanted = both(model, **prompts(9), max_new_tokens=256, eos_token_id=None, **GREEDY)
    assert got.shape == (1, 265) and torch.equal(got, wanted) and len(served) == 1


def test_another_request_on_the_same_session_and_another_shape(served):
    """What an earlier request left in caches and buffers is never seen."""
    model = pruned()
    for lengths in ((6,), (9,), (3, 8), (8, 3), (2,)):
        got, wanted = both(model, **prompts(*lengths), max_new_tokens=9, **GREEDY)
        assert torch.equal(got, wanted)
    assert len(served) == 5


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.3}, {"min_new_tokens": 6}, {"top_p": 0.7}])
@pytest.mark.parametrize("mode", [GREEDY, SAMPLE])
def test_processors_and_sampling_with_the_same_seed(mode, extra, served):
    """transformers' own processors and the same draws: the same tokens."""
    got, wanted = both(dense(), **prompts(5, 3), max_new_tokens=16, **mode, **extra)
    assert torch.equal(got, wanted) and len(served) == 1


@pytest.mark.parametrize("mode", [GREEDY, SAMPLE])
@pytest.mark.parametrize("at", [0, 1, 6])
def test_ends_of_sequences(at, mode, served):
    """The batch stops when its last sequence has ended; ended ones are filled with the padding token."""
    model, inputs = dense(), prompts(6, 2, 4)
    ends = [end_of(model, inputs, at, **mode), end_of(model, inputs, 3, **mode)]
    got, wanted = both(model, **inputs, max_new_tokens=30, eos_token_id=ends, **mode)
    assert torch.equal(got, wanted) and len(served) == 1
    single = {name: t[:1] for name, t in inputs.items()}
    got, wanted = both(model, **single, max_new_tokens=30, eos_token_id=[end_of(model, single, at, **mode)], **mode)
    assert torch.equal(got, wanted) and got.shape[1] < 36


class Stop(StoppingCriteria):
    """Ends a sequence once it holds a multiple of 5."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 5 == 0


def test_own_criteria(served):
    got, wanted = both(dense(), **prompts(5, 4), max_new_tokens=40, stopping_criteria=[Stop()], **GREEDY)
    assert torch.equal(got, wanted) and len(served) == 1 and got.shape[1] < 45


def test_stop_strings(served):
    model, tokenizer, inputs = dense(), byte_tokenizer(), prompts(6)
    text = tokenizer.decode([end_of(model, inputs, 4, **GREEDY)])
    got, wanted = both(model, **inputs, max_new_tokens=40, stop_strings=[text], tokenizer=tokenizer, **GREEDY)
    assert torch.equal(got, wanted) and len(served) == 1 and got.shape[1] < 46


@pytest.mark.parametrize("mode", [GREEDY, SAMPLE])
def test_streamers_get_the_prompt_and_every_token_once(mode, served):
    model, inputs, seen = dense(), prompts(5), []
    for call in (model.generate, lambda **k: GenerationMixin.generate(model, **k)):
        torch.manual_seed(3)
        stream = Record()
        call(**inputs, max_new_tokens=12, eos_token_id=[end_of(model, inputs, 7, **mode)], streamer=stream, **mode)
        seen.append(stream.seen)
    assert seen[0] == seen[1] and seen[0][-1] == "end" and len(served) == 1


def test_configurations_and_several_results_of_one_prompt(served):
    config = GenerationConfig(max_new_tokens=8, do_sample=True, num_return_sequences=3, pad_token_id=0)
    got, wanted = both(dense(), **prompts(5), generation_config=config)
    assert got.shape == (3, 13) and torch.equal(got, wanted) and len(served) == 1


def test_weights_that_moved_are_noticed(served):
    """A new weight at another address, and another dtype: not the captured one's tokens."""
    model, inputs = dense(), prompts(5)
    model.generate(**inputs, max_new_tokens=4, **GREEDY)
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(-model.model.layers[1].mlp.up_proj.weight.detach())
    for _ in range(2):
        got, wanted = both(model, **inputs, max_new_tokens=12, **GREEDY)
        assert torch.equal(got, wanted)
        model.double().float().to(torch.float32)
    assert len(served) == 3


def test_copies_have_a_runtime_of_their_own(served):
    """Also after the original has generated: graphs and locks are not copied, and the copy follows its own weights."""
    model, inputs = dense(), prompts(5)
    before = model.generate(**inputs, max_new_tokens=8, **GREEDY)
    twin = copy.deepcopy(model)
    twin.lm_head.weight.data.neg_()
    changed = twin.generate(**inputs, max_new_tokens=8, **GREEDY)
    assert torch.equal(changed, GenerationMixin.generate(twin, **inputs, max_new_tokens=8, **GREEDY))
    assert not torch.equal(changed, before) and len(served) == 2
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, **GREEDY), before)


def test_prompts_of_one_length_again_and_again(served):
    """On a GPU the second records a graph and the third replays it; padded ones have their own."""
    model = dense()
    for _ in range(4):
        for lengths in ((6, 6), (6, 2), (4, 6)):
            inputs = prompts(*lengths)
            inputs["input_ids"] = (inputs["input_ids"] + len(served)) % 256 * inputs["attention_mask"]
            got, wanted = both(model, **inputs, max_new_tokens=6, **GREEDY)
            assert torch.equal(got, wanted)
    assert len(served) == 12


def test_inside_and_outside_of_inference_mode(served):
    model, inputs = dense(), prompts(5)
    with torch.inference_mode():
        first = model.generate(**inputs, max_new_tokens=6, **GREEDY)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, **GREEDY), first) and len(served) == 2


@pytest.mark.reference
def test_the_reference_model_says_the_same(reference, served):
    """Real weights, prompts of different lengths: the same text, dense and pruned."""
    model = ppf.load(reference / "models" / "ref-14m", DEVICE, torch.float32)
    inputs = prompts(24, 11, 3)
    for accelerated in (ppf.accelerate(model), uneven(model)):
        got, wanted = both(accelerated, **inputs, max_new_tokens=48, **GREEDY)
        assert torch.equal(got, wanted)
    assert len(served) == 2

"""What the runtime does not serve takes transformers' plain path, and says so once."""

from __future__ import annotations

import warnings

import pytest
import torch
from factories import llama, llama_config, model_of
from runtime_cases import (
    DEVICE,
    GREEDY,
    Record,
    both,
    dense,
    prompts,
    requests_served,
)
from torch import Tensor
from transformers import GenerationMixin, GPT2Config, GPT2LMHeadModel

import ppf
from ppf.errors import InputError
from ppf.fast.runtime.plan import unsupported


@pytest.fixture(autouse=True)
def served(monkeypatch, one_thread):
    return requests_served(monkeypatch)


REFUSED = {
    "num_beams": {"num_beams": 2},
    "return_dict": {"return_dict_in_generate": True},
    "cache": {"past_key_values": "a cache"},
    "assistant": {"prompt_lookup_num_tokens": 2},
    "right": {"attention_mask": torch.tensor([[1, 1, 0]]), "input_ids": torch.tensor([[5, 6, 0]])},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_runtime_cannot_do_goes_the_plain_way_with_one_warning(name, served, recwarn):
    model, change = dense(), dict(REFUSED[name])
    kwargs = {**prompts(3), "max_new_tokens": 5, **GREEDY} | {
        k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()
    }
    for _ in range(2):
        if name == "cache":
            kwargs["past_key_values"] = model(**prompts(2)).past_key_values
        got = model.generate(**kwargs)
    if name == "cache":
        kwargs["past_key_values"] = model(**prompts(2)).past_key_values
    wanted = GenerationMixin.generate(model, **kwargs)
    got, wanted = (r if isinstance(r, Tensor) else r.sequences for r in (got, wanted))
    told = [str(w.message) for w in recwarn if "plain path" in str(w.message)]
    assert torch.equal(got, wanted) and not served and len(told) == 1


def test_too_many_sequences(served):
    got, wanted = both(dense(), **prompts(*[2] * 65), max_new_tokens=3, **GREEDY)
    assert torch.equal(got, wanted) and not served


def test_hooks_and_adapters_are_not_bypassed(served):
    model, inputs = dense(), prompts(4)
    first = model.generate(**inputs, max_new_tokens=8, **GREEDY)
    handle = model.model.layers[0].register_forward_hook(lambda module, given, result: result * 0.5)
    got, wanted = both(model, **inputs, max_new_tokens=8, **GREEDY)
    assert torch.equal(got, wanted) and not torch.equal(got, first) and len(served) == 1
    handle.remove()
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, **GREEDY), first) and len(served) == 1


def test_a_second_generation_meanwhile_takes_the_plain_path(served):
    """A streamer that generates with the same model: the caches of the first are not touched."""
    model, inputs = dense(), prompts(5)

    class Nested(Record):
        def end(self):
            self.inner = model.generate(**inputs, max_new_tokens=6, **GREEDY)

    stream = Nested()
    outer = model.generate(**inputs, max_new_tokens=6, streamer=stream, **GREEDY)
    assert torch.equal(stream.inner, outer) and len(served) == 1


def test_a_cpu_says_so_once(monkeypatch):
    monkeypatch.undo()
    model = llama(llama_config())
    with pytest.warns(UserWarning, match="plain path: the model is on the cpu"):
        ppf.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = {name: t.cpu() for name, t in prompts(4).items()}
        got = model.generate(**inputs, max_new_tokens=5, **GREEDY)
    assert torch.equal(got, GenerationMixin.generate(model, **inputs, max_new_tokens=5, **GREEDY))


UNSERVED = {
    "ministral3": "position scale", "gemma2": "sandwich norms", "gemma3_text": "several rotations",
    "phi3": "partial rotation", "olmo2": "joint head norm", "smollm3": "unrotated layers", "granite": "residual scale",
}  # fmt: skip


@pytest.mark.parametrize("family", UNSERVED)
def test_families_of_other_arithmetic_take_the_plain_path_with_one_warning(family, served, recwarn):
    """The warning names what is in the way."""
    model, inputs = dense(family=family), prompts(6, 4)
    for _ in range(2):
        got, wanted = both(model, **inputs, max_new_tokens=5, **GREEDY)
    told = [str(w.message) for w in recwarn if "plain path" in str(w.message)]
    assert torch.equal(got, wanted) and not served and len(told) == 1 and UNSERVED[family] in told[0]


def test_other_models_take_the_plain_path(served):
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=256)).to(DEVICE).eval()
    with pytest.warns(UserWarning, match="gpt2"):
        ppf.accelerate(model)
    got, wanted = both(model, **prompts(4), max_new_tokens=5, eos_token_id=None, **GREEDY)
    assert torch.equal(got, wanted) and not served
    with pytest.raises(InputError, match="no generate"):
        ppf.accelerate(torch.nn.Linear(2, 2))


def test_reasons():
    """What a family serves but a model of it has not."""
    assert "activation" in unsupported(model_of("llama", hidden_act="gelu"))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "length-dependent" in unsupported(model_of("llama", rope_parameters=dynamic))
    mixed = model_of("qwen2")
    mixed.model.layers[0].mlp.half()
    assert "several dtypes" in unsupported(mixed)

    own = model_of("qwen2")
    own.__class__ = type(llama(llama_config()))
    assert "not a Qwen2ForCausalLM" in unsupported(own)
    assert unsupported(model_of("qwen2")) is None

"""The runtime against transformers' plain generation. On a CPU its ops are the references, and steps run without a
graph; everything else is the same code.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import fields, replace

import pytest
import torch
from factories import byte_tokenizer, config_of, llama, llama_config, model_of
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, GPT2Config, GPT2LMHeadModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import ppf
from ppf.errors import InputError
from ppf.families import family_of
from ppf.fast.runtime import generation, loop, prefill
from ppf.fast.runtime.plan import Plan, plan_of, unsupported
from ppf.model.build import build, expected_tensors, pruned_config
from ppf.model.geometry import structure_of
from ppf.model.policy import Policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICY = Policy([3, 0, 1, 0], [64, 24, 0, 40])  # absent sub-layers, and the last layers have no attention
GREEDY = {"do_sample": False, "pad_token_id": 0}
SAMPLE = {"do_sample": True, "temperature": 0.8, "top_k": 20, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def served(monkeypatch, one_thread) -> list[Tensor]:
    """Results of the requests that the runtime has served; a CPU is taken for a device that it serves."""
    if DEVICE == "cpu":
        monkeypatch.setattr(generation, "_where", lambda model: None)
    results, run = [], loop.run

    def spied(session, request):
        results.append(run(session, request))
        return results[-1]

    monkeypatch.setattr(generation, "run", spied)
    return results


def shrunk(model, policy: Policy):
    """``model`` with some of its weights, in the shapes of ``policy``."""
    config, source = pruned_config(model.config, policy), model.state_dict()
    shapes = expected_tensors(config).items()
    state = {name: source[name][tuple(slice(n) for n in shape)].clone() for name, shape in shapes}
    return build(config, state, model.dtype, model.generation_config)


def pruned(policy: Policy = POLICY, dtype: torch.dtype = torch.float32, family: str = "llama", **changes):
    return ppf.accelerate(shrunk(model_of(family, dtype=dtype, **changes), policy).to(DEVICE))


def dense(dtype: torch.dtype = torch.float32, family: str = "llama", **changes):
    return ppf.accelerate(model_of(family, dtype=dtype, **changes).to(DEVICE))


def uneven(model):
    """``model`` with the leading units of every layer, fewer in every second one, and no FFN in layer 1."""
    s = structure_of(family_of(model.config.model_type), model.config)
    groups = [sublayer.units // (1 + index % 2) for index, sublayer in enumerate(s.attention)]
    channels = [0 if index == 1 else sublayer.units // (1 + index % 3) for index, sublayer in enumerate(s.ffn)]
    return ppf.accelerate(shrunk(model, Policy(groups, channels)))


def prompts(*lengths: int) -> dict[str, Tensor]:
    """Random prompts, padded on the left with token 0."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(1, 256, (len(lengths), longest), generator=generator)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def both(model, **kwargs) -> tuple[Tensor, Tensor]:
    """What the model's generate() returns, and the plain path's; streamers and criteria are given to both."""
    results = []
    for generate in (model.generate, lambda **k: GenerationMixin.generate(model, **k)):
        torch.manual_seed(3)
        results.append(generate(**kwargs))
    return tuple(results)


def end_of(model, inputs: dict[str, Tensor], at: int, **kwargs) -> int:
    """A token that the model generates as number ``at``: as the end of a sequence, it stops there."""
    length = inputs["input_ids"].shape[1]
    torch.manual_seed(3)
    return int(
        GenerationMixin.generate(model, **inputs, max_new_tokens=at + 1, eos_token_id=None, **kwargs)[0, length + at]
    )


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


WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
PLAIN_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
FAMILIES = {  # by name: a family, and what else is special
    "llama with all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", WINDOWS),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases and windows": ("qwen3", WINDOWS | {"attention_bias": True}),
    "phi3": ("phi3", {"rope_parameters": PLAIN_ROTARY, "sliding_window": 13}),
}


@pytest.mark.parametrize("block", [4096, 5])
@pytest.mark.parametrize("make", [dense, pruned])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name, make, block, served, monkeypatch):
    """Prompts shorter and longer than the window, which goes on moving; and prompts in several blocks of queries."""
    monkeypatch.setattr(prefill, "BLOCK_QUERIES", block)
    family, changes = FAMILIES[name]
    model = make(family=family, **changes)
    for lengths in ((30, 9), (4,), (23,)):
        got, wanted = both(model, **prompts(*lengths), max_new_tokens=24, **GREEDY)
        assert torch.equal(got, wanted)
    assert len(served) == 3


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


class Record(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.flatten().tolist())

    def end(self):
        self.seen.append("end")


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


@pytest.mark.reference
def test_the_reference_model_says_the_same(reference, served):
    """Real weights, prompts of different lengths: the same text, dense and pruned."""
    model = ppf.load(reference / "models" / "ref-14m", DEVICE, torch.float32)
    inputs = prompts(24, 11, 3)
    for accelerated in (ppf.accelerate(model), uneven(model)):
        got, wanted = both(accelerated, **inputs, max_new_tokens=96, **GREEDY)
        assert torch.equal(got, wanted)
    assert len(served) == 2


def error_ratio(model, batch: int, length: int = 40, steps: int = 32) -> float:
    """Error of the runtime's logits over the plain path's, both against the same weights in fp64: a prefill of prompts
    of different lengths, then steps with given tokens."""
    state = generation.runtime_of(model)
    assert state.obstacle(model) is None
    given = prompts(*(length - 7 * row % (length - 1) for row in range(batch)))
    follow = prompts(*[steps] * batch)["input_ids"]
    ids = torch.cat((given["input_ids"], follow), 1)
    mask = torch.cat((given["attention_mask"], torch.ones_like(follow)), 1)
    with torch.no_grad():
        twin = copy.deepcopy(model).double()
        plain, exact = (
            torch.cat(
                [
                    m(input_ids=i[None], attention_mask=k[None]).logits[:, length - 1 :]
                    for i, k in zip(ids, mask, strict=True)
                ]
            )
            for m in (model, twin)
        )
        session = state.engine.session(state.plan, batch, length + steps)
        session.reset((1 - given["attention_mask"]).sum(1, dtype=torch.int32), [], 0)
        loop.prefill(session, given["input_ids"], batch > 1)
        got = [session.logits.double().clone()]
        for at in range(length, length + steps):
            session.token.copy_(ids[:, at])
            session.advance()
            got.append(session.logits.double().clone())
    return float((torch.stack(got, 1) - exact).norm() / (plain.double() - exact).norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [dense, pruned])
@pytest.mark.parametrize("name", [*FAMILIES, "llama"])
def test_logits_are_as_exact_as_the_plain_path_s(name, make, dtype):
    family, changes = FAMILIES.get(name, (name, {}))
    assert error_ratio(make(dtype=dtype, family=family, **changes), 3) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "channels"), [(32, 32, 11008), (16, 4, 7168)])
def test_llama_widths(heads, kv_heads, channels):
    """Two layers as wide as a 7B's, and as half an 8B's: the tiles and launches that such models get."""
    config = llama_config(
        hidden_size=4096, intermediate_size=channels, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=128, vocab_size=32000,
    )  # fmt: skip
    state = {
        name: torch.ones(shape, device=DEVICE) if "norm" in name else torch.randn(shape, device=DEVICE) * 0.02
        for name, shape in expected_tensors(config).items()
    }
    model = build(config, state, torch.bfloat16)
    for batch in (1, 4, 16, 40):
        assert error_ratio(model, batch, 60, 8) <= 2, batch


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "heads", "kv_heads", "head_dim"), [
    ("qwen2", 28, 4, 128), ("qwen3", 32, 8, 128), ("mistral", 32, 8, 128), ("qwen3", 16, 8, 64),
])  # fmt: skip
def test_widths_of_other_families(family, heads, kv_heads, head_dim):
    """Two layers as wide as a Qwen2.5-7B's, a Qwen3-8B's, a Mistral's with a window in the text, a small Qwen3's."""
    hidden = heads * head_dim
    config = config_of(
        family, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=32000,
    )  # fmt: skip
    state = {
        name: 1 + 0.1 * torch.randn(shape, device=DEVICE)
        if "norm" in name
        else torch.randn(shape, device=DEVICE) * 0.02
        for name, shape in expected_tensors(config).items()
    }
    model = build(config, state, torch.bfloat16)
    for batch in (1, 4, 40):
        assert error_ratio(model, batch, 60, 8) <= 2, batch

"""GGUF files in llama.cpp itself: logits, greedy text, tokens; and what happens without the two precautions.

Needs llama-cpp-python, which compiles llama.cpp: `make test-export`. Skipped where it is not installed.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from export_cases import (
    LLAMA3_ROPE,
    POLICIES,
    SAMPLE,
    UNIFORM,
    YARN_ROPE,
    bpe_tokenizer,
    even,
    gemma_tokenizer,
    longrope,
    policy_with_zeros,
    prune_to,
    python,
    sample_ids,
    sentencepiece_tokenizer,
    transformers_greedy,
    transformers_logits,
    uneven,
    write_random,
)
from gguf_cases import ARCHITECTURES, BIASED, IGNORING_MERGES, PRE_TOKENIZERS, TIED
from test_export_chats import CHATS, TURNS, chatting

from ppf.checkpoint import load_tokenizer
from ppf.deliver.export import gguf_weights, open_source, to_gguf
from ppf.model.policy import Policy

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-export")
pytestmark = pytest.mark.usefixtures("one_thread")
_F32 = 0  # of ggml_type: the cache is f16 by default, whatever the file


def opened(source: Path, output: Path, dtype: str = "f32", **options):
    """llama.cpp's model of an export of ``source``; ``logits_all`` unless said otherwise."""
    file = output / to_gguf(open_source(source), output, dtype)["file"]
    settings = {"n_ctx": 512, "n_threads": 1, "logits_all": True, "type_k": _F32, "type_v": _F32, "verbose": False}
    return llama_cpp.Llama(str(file), **settings | options)


def logits(model, ids: list[int]) -> np.ndarray:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def greedy(model, ids: list[int], new: int = 64) -> list[int]:
    """Token by token, through llama.cpp's own cache."""
    model.reset()
    model.eval(ids)
    out = []
    for _ in range(new):
        out.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(out[-1:])
    return out


def check(source: Path, output: Path) -> None:
    """Logits within 0.02 of transformers in f32, and the same 64 greedy tokens."""
    ids, model = sample_ids(source), opened(source, output)
    assert np.abs(logits(model, ids) - transformers_logits(source, ids).numpy()).max() < 0.02
    assert greedy(model, ids) == transformers_greedy(source, ids)


@pytest.mark.parametrize("ratio", POLICIES)
def test_bundled_model(ratio, tmp_path):
    check(prune_to(tmp_path / "in", POLICIES[ratio]), tmp_path / "out")


@pytest.mark.reference
@pytest.mark.parametrize("ratio", POLICIES)
def test_ref_14m(ratio, reference, tmp_path):
    model = reference / "models" / "ref-14m"
    policy = policy_with_zeros(model, ratio)
    check(prune_to(tmp_path / "in", policy, model), tmp_path / "out")


def near(source: Path, output: Path, generate: bool = True, **options) -> None:
    """Logits within 1e-4 of transformers in f32, for Gemma 0.01: llama.cpp looks its GELU up in a table of 16 bits."""
    facts = to_gguf(open_source(source), output, "f32")
    ids = sample_ids(source, facts.get("context_length", 96))
    settings = {"n_ctx": 512, "n_threads": 1, "logits_all": True, "type_k": _F32, "type_v": _F32, "verbose": False}
    model = llama_cpp.Llama(str(output / facts["file"]), **settings | options)
    error = np.abs(logits(model, ids) - transformers_logits(source, ids).numpy()).max()
    assert error < (0.01 if facts["architecture"].startswith("gemma") else 1e-4)
    if generate and "context_length" not in facts:
        assert greedy(model, ids[:24], 24) == transformers_greedy(source, ids[:24], 24)


KINDS = {"dense": lambda _: None, "even": even, "uneven": uneven}
WRITTEN = [
    (family, kind)
    for family, found in ARCHITECTURES.items()
    for kind, architecture in zip(KINDS, found, strict=True)
    if architecture
]


@pytest.mark.parametrize(("family", "kind"), WRITTEN)
def test_families(family, kind, tmp_path):
    # The folder's name goes into the file, and llama.cpp does not load everything that is called Phi-3.
    source = tmp_path / f"{family}-{kind}"
    near(write_random(source, KINDS[kind](family), family=family, tie_word_embeddings=family in TIED), tmp_path / "out")


NEAR = {"rope_type": "default", "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("llama", "even", BIASED),
        ("llama", "uneven", BIASED),
        ("granite", "even", BIASED),
        ("granite", "uneven", BIASED | {"tie_word_embeddings": True}),
        ("olmo2", "even", {"tie_word_embeddings": True, "rope_parameters": YARN_ROPE}),
        ("smollm3", "even", {"rope_parameters": YARN_ROPE}),
        ("smollm3", "uneven", {"no_rope_layers": [1, 1, 1, 1]}),
        ("qwen2", "dense", {"rope_parameters": YARN_ROPE}),
        ("qwen2", "even", {"rope_parameters": YARN_ROPE}),
        ("qwen3", "even", {"rope_parameters": LINEAR}),
        ("qwen3", "uneven", {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True}),
        ("ministral3", "even", {"sliding_window": None}),
        ("gemma2", "even", {"tie_word_embeddings": True, "rope_parameters": LINEAR, "attn_logit_softcapping": 2.0}),
        ("gemma2", "even", {"tie_word_embeddings": True, "layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("gemma3_text", "even", {"final_logit_softcapping": 3.0}),
        ("gemma3_text", "even", {"layer_types": ["full_attention"] * 4}),
        ("gemma3_text", "even", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": NEAR}}),
    ],
)  # fmt: skip
def test_what_configurations_allow(family, kind, changes, tmp_path):
    near(write_random(tmp_path / "in", KINDS[kind](family), family=family, **changes), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "even"), ("llama", "uneven"), ("phi3", "dense"), ("phi3", "uneven")]
)
@pytest.mark.parametrize("long", [False, True])
def test_longrope(family, kind, long, tmp_path):
    """llama.cpp rounds its context up to 256, and chooses by it."""
    rotated, original = {"llama": 8, "phi3": 4}[family], 32 if long else 256
    rope = longrope(rotated, original) | ({"partial_rotary_factor": 0.5} if family == "phi3" else {})
    fields = {"rope_parameters": rope, "original_max_position_embeddings": original, "max_position_embeddings": 1024}
    source = write_random(tmp_path / "in", KINDS[kind](family), family=family, **fields)
    # A text that grows beyond the original length changes transformers' factors on the way, not llama.cpp's.
    near(source, tmp_path / "out", generate=not long, n_ctx=256)


def test_uniform_results(tmp_path):
    check(prune_to(tmp_path / "in", UNIFORM), tmp_path / "out")
    mistral = write_random(tmp_path / "mistral", Policy([5] * 4, [40] * 4), heads="mha")
    assert open_source(mistral).config.model_type == "mistral"
    ids = sample_ids(mistral, 40)
    expected = transformers_logits(mistral, ids).numpy()
    assert np.abs(logits(opened(mistral, tmp_path / "m"), ids) - expected).max() < 0.02


def test_llama3_rope(tmp_path):
    source = write_random(tmp_path / "in", Policy([3, 0, 2, 1], [64, 40, 0, 16]), rope_parameters=LLAMA3_ROPE)
    ids = sample_ids(source, 100)
    expected = transformers_logits(source, ids).numpy()
    assert np.abs(logits(opened(source, tmp_path / "out"), ids) - expected).max() < 0.02


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 0.05), ("bf16", 0.5), ("q8_0", 1.0)])
def test_other_types_are_near(dtype, tolerance, tmp_path):
    """llama.cpp rounds activations too in these; the likeliest token rarely changes."""
    source = prune_to(tmp_path / "in", POLICIES[0.3])
    ids = sample_ids(source)
    expected, got = transformers_logits(source, ids).numpy(), logits(opened(source, tmp_path / "out", dtype), ids)
    assert np.abs(got - expected).max() < tolerance
    assert (got.argmax(-1) == expected.argmax(-1)).mean() > 0.95


def test_an_attention_only_layer_is_dropped_without_its_zero_ffn(tmp_path, monkeypatch):
    source = write_random(tmp_path / "in", Policy([3, 2, 1, 3], [64, 0, 40, 64]))
    ids = sample_ids(source, 24)
    expected = transformers_logits(source, ids).numpy()
    assert np.abs(logits(opened(source, tmp_path / "right"), ids) - expected).max() < 0.02
    monkeypatch.setattr(gguf_weights, "needs_zero_ffn", lambda *_: False)
    assert np.abs(logits(opened(source, tmp_path / "wrong"), ids) - expected).max() > 0.1


def test_an_absent_last_layer_aborts_without_its_zero_ffn(tmp_path, monkeypatch):
    """Seen only where not all rows are asked for, which is how text is generated."""
    source = write_random(tmp_path / "in", Policy([3, 2, 1, 0], [64, 64, 40, 0]))
    ids = sample_ids(source, 24)
    code = (
        "import sys, json, llama_cpp\n"
        "model = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, type_k=0, type_v=0, verbose=False)\n"
        "model.eval(json.loads(sys.argv[2]))\n"
        "print(json.dumps([model._ctx.get_logits_ith(-1)[index] for index in range(model.n_vocab())]))"
    )
    file = tmp_path / "right" / to_gguf(open_source(source), tmp_path / "right", "f32")["file"]
    last = np.array(json.loads(python(code, file, json.dumps(ids)).stdout))
    assert np.abs(last - transformers_logits(source, ids)[-1].numpy()).max() < 0.02
    monkeypatch.setattr(gguf_weights, "needs_zero_ffn", lambda *_: False)
    file = tmp_path / "wrong" / to_gguf(open_source(source), tmp_path / "wrong", "f32")["file"]
    assert python(code, file, json.dumps(ids)).returncode == -signal.SIGABRT


def test_a_file_whose_layer_0_has_no_attention_does_not_load(tmp_path, monkeypatch):
    """Why PPF refuses to write one: the same weights, with the first two layers' order exchanged."""
    source = write_random(tmp_path / "in", Policy([3, 2, 1, 3], [64] * 4))
    assert opened(source, tmp_path / "right")
    widths = gguf_weights.written_widths
    monkeypatch.setattr(
        "ppf.deliver.export.gguf_metadata.written_widths", lambda *given: [(0, 0, 64), *widths(*given)[1:]]
    )
    with pytest.raises(Exception):  # noqa: B017  (llama-cpp-python's own, which has changed)
        opened(source, tmp_path / "wrong")


TEXTS = (
    SAMPLE.read_text(encoding="utf-8")[:1500],
    "  two  spaces, a\ttab\nand 12345 numbers: it's 3.14!\n\n",
    "Grüße, 世界 – naïve café 🦙",
    "def f(x):\n\treturn x  # don'T\r\n\r\n  y = a/b//c",
    "日本語、한국어, العربية, ΑΒΓ αβγ, ЖЗИ жзи ½ ² ①",
)


def _tokenizer(name: str):
    if name in PRE_TOKENIZERS:
        return bpe_tokenizer(PRE_TOKENIZERS[name], ignore_merges=name in IGNORING_MERGES)
    return gemma_tokenizer() if name == "gemma" else sentencepiece_tokenizer(name == "metaspace")


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "sentencepiece", "metaspace", "gemma", "tiny-2m"])
def test_texts_become_the_same_tokens(name, tmp_path):
    if name == "tiny-2m":
        source = prune_to(tmp_path / "in", UNIFORM)
    else:
        source = write_random(tmp_path / "in", tokenizer=_tokenizer(name), vocab_size=480)
    model, tokenizer = opened(source, tmp_path / "out", vocab_only=True), load_tokenizer(source)
    for text in TEXTS:
        # Before a text that starts with a space, Metaspace puts none; SentencePiece and llama.cpp do.
        text = text.lstrip() if name == "metaspace" else text
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False) == expected
        assert model.detokenize(expected).decode().strip() == text.strip()


@pytest.mark.parametrize("name", CHATS)
def test_chats_become_the_same_prompts(name, tmp_path):
    """By llama-cpp-python's formatter, from the file alone, as its Llama makes it."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    tokenizer = chatting(name)
    model = opened(write_random(tmp_path / "in", tokenizer=tokenizer), tmp_path / "out", vocab_only=True)
    begin, end = (model.detokenize([token], special=True).decode() for token in (model.token_bos(), model.token_eos()))
    template = model.metadata["tokenizer.chat_template"]
    formatter = Jinja2ChatFormatter(template=template, eos_token=end, bos_token=begin)
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert formatter(messages=TURNS).prompt == expected

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
    bpe_tokenizer,
    policy_with_zeros,
    prune_to,
    python,
    sample_ids,
    sentencepiece_tokenizer,
    transformers_greedy,
    transformers_logits,
    write_random,
)
from test_export_gguf import PRE_TOKENIZERS

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
    check(prune_to(tmp_path / "in", POLICIES[ratio], sequences=4), tmp_path / "out")


@pytest.mark.reference
@pytest.mark.parametrize("ratio", POLICIES)
def test_ref_14m(ratio, reference, tmp_path):
    model = reference / "models" / "ref-14m"
    policy = policy_with_zeros(model, ratio)
    source = prune_to(tmp_path / "in", policy, model, reference / "text" / "calib.txt", sequences=8)
    check(source, tmp_path / "out")


def test_uniform_results(tmp_path):
    check(prune_to(tmp_path / "in", UNIFORM, sequences=2), tmp_path / "out")
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
    source = prune_to(tmp_path / "in", POLICIES[0.3], sequences=2)
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
    monkeypatch.setattr("ppf.deliver.export.gguf_file.written_widths", lambda source: [(0, 0, 64), *widths(source)[1:]])
    with pytest.raises(Exception):  # noqa: B017  (llama-cpp-python's own, which has changed)
        opened(source, tmp_path / "wrong")


TEXTS = (
    SAMPLE.read_text(encoding="utf-8")[:1500],
    "  two  spaces, a\ttab\nand 12345 numbers: it's 3.14!\n\n",
    "Grüße, 世界 – naïve café 🦙",
)


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "sentencepiece", "metaspace", "tiny-2m"])
def test_texts_become_the_same_tokens(name, tmp_path):
    if name == "tiny-2m":
        source = prune_to(tmp_path / "in", UNIFORM, sequences=1)
    elif name in ("sentencepiece", "metaspace"):
        source = write_random(tmp_path / "in", tokenizer=sentencepiece_tokenizer(name == "metaspace"), vocab_size=480)
    else:
        tokenizer = bpe_tokenizer(PRE_TOKENIZERS[name], ignore_merges=name == "llama-bpe")
        source = write_random(tmp_path / "in", tokenizer=tokenizer)
    model, tokenizer = opened(source, tmp_path / "out", vocab_only=True), load_tokenizer(source)
    for text in TEXTS:
        # Before a text that starts with a space, Metaspace puts none; SentencePiece and llama.cpp do.
        text = text.lstrip() if name == "metaspace" else text
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False) == expected
        assert model.detokenize(expected).decode().strip() == text.strip()

"""GGUF files, read back with the gguf package and computed by llama.cpp's graph written out in NumPy."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from export_cases import (
    LLAMA3_ROPE,
    POLICIES,
    UNIFORM,
    bpe_tokenizer,
    prune_to,
    sample_ids,
    sentencepiece_tokenizer,
    transformers_logits,
    write_random,
)
from factories import byte_tokenizer
from gguf_reference import Reference
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ppf.checkpoint import load, load_tokenizer
from ppf.deliver.export import gguf_weights, open_source, to_gguf
from ppf.deliver.export.gguf_tokenizer import _LLAMA3, BYTE, CONTROL, UNKNOWN, UNUSED, vocabulary
from ppf.errors import InputError
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
# Layers: whole, FFN only, attention only, neither (and last).
SMALL = Policy([3, 0, 1, 0], [40, 64, 0, 0])
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
            BYTE_LEVEL | {"use_regex": False},
        ],
    },
}


def written(source: Path, output: Path, dtype: str = "f32") -> Reference:
    return Reference(output / to_gguf(open_source(source), output, dtype)["file"])


def difference(reference: Reference, checkpoint: Path, ids: list[int]) -> float:
    """Largest difference of the logits after the last token, as a share of the largest logit."""
    expected = transformers_logits(checkpoint, ids)[-1].double().numpy()
    return float(np.abs(reference.logits(ids) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> dict[float, Path]:
    folder = tmp_path_factory.mktemp("pruned")
    return {ratio: prune_to(folder / str(ratio), policy, sequences=4) for ratio, policy in POLICIES.items()}


@pytest.mark.parametrize("ratio", POLICIES)
def test_pruned_model_in_llama_cpps_graph(ratio, pruned, tmp_path):
    checkpoint, policy = pruned[ratio], POLICIES[ratio]
    reference = written(checkpoint, tmp_path / "out")
    assert reference.architecture == "deci" and reference.field("rope.dimension_count") == 32
    zero = [index for index, channels in enumerate(policy.ffn) if not channels]
    zero = [index for index in zero if policy.attention[index] or index == 7]
    assert reference.widths() == [
        (2 * groups, groups, 32 if index in zero else channels)
        for index, (groups, channels) in enumerate(zip(policy.attention, policy.ffn, strict=True))
    ]
    for index in zero:
        assert not reference.tensors[f"blk.{index}.ffn_down.weight"].any()
    assert difference(reference, checkpoint, sample_ids(checkpoint)) < 1e-5
    # Negative control: the rows of one head in transformers' order.
    name = "blk.0.attn_k.weight"
    rows = reference.tensors[name][:32]
    reference.tensors[name][:32] = np.concatenate((rows[0::2], rows[1::2]))
    assert difference(reference, checkpoint, sample_ids(checkpoint)) > 1e-3


def test_without_zero_ffns_attention_only_layers_would_be_dropped(tmp_path, monkeypatch):
    """Both traps, each with the model that falls into it: a file as it would be without an FFN of zeros there."""
    for policy in (Policy([3, 2, 1, 3], [64, 0, 40, 64]), Policy([3, 2, 1, 0], [64, 64, 40, 0])):
        name = f"{policy.ffn.index(0)}"
        source = write_random(tmp_path / f"in-{name}", policy)
        ids = sample_ids(source, 24)
        assert difference(written(source, tmp_path / f"right-{name}"), source, ids) < 1e-5
        with monkeypatch.context() as patch:
            patch.setattr(gguf_weights, "needs_zero_ffn", lambda *_: False)
            assert difference(written(source, tmp_path / f"wrong-{name}"), source, ids) > 0.01


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_small_models_with_llama3_rope(heads, tied, tmp_path):
    groups = {"mha": Policy([6, 0, 5, 0], SMALL.ffn), "gqa": SMALL}[heads]
    source = write_random(tmp_path / "in", groups, heads=heads, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=tied)
    reference = written(source, tmp_path / "out")
    # The published rule (Llama 3.1), independent of transformers': low frequencies slowed by 8, high ones untouched.
    frequency = 500000.0 ** -(np.arange(0, 8, 2) / 8)
    wavelength = 2 * np.pi / frequency
    smooth = (64 / wavelength - 1) / (4 - 1)
    blend = 1 / ((1 - smooth) / 8 + smooth)
    expected = np.where(wavelength > 64, 8, np.where(wavelength < 16, 1, blend))
    np.testing.assert_allclose(reference.tensors["rope_freqs.weight"], expected, rtol=1e-5)
    assert ("output.weight" in reference.tensors) != tied
    ids = sample_ids(source, 100)
    assert difference(reference, source, ids) < 1e-5
    del reference.tensors["rope_freqs.weight"]
    assert difference(reference, source, ids) > 1e-3


def test_linear_rope_is_the_same_factor_everywhere(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    source = write_random(tmp_path / "in", SMALL, rope_parameters=rope)
    reference = written(source, tmp_path / "out")
    np.testing.assert_allclose(reference.tensors["rope_freqs.weight"], [4.0] * 4, rtol=1e-6)
    assert difference(reference, source, sample_ids(source, 60)) < 1e-5


@pytest.mark.parametrize("policy", [UNIFORM, None])
def test_uniform_results_and_dense_models_are_plain_llamas(policy, tmp_path):
    source = prune_to(tmp_path / "in", policy, sequences=2) if policy else write_random(tmp_path / "in", heads="mha")
    reference = written(source, tmp_path / "out")
    assert reference.architecture == "llama" and isinstance(reference.field("attention.head_count"), int)
    assert difference(reference, source, sample_ids(source, 40)) < 1e-5


def test_uniform_heads_that_do_not_divide_the_hidden_size(tmp_path):
    source = write_random(tmp_path / "in", Policy([5] * 4, [40] * 4), heads="mha")
    assert open_source(source).config.model_type == "mistral"
    reference = written(source, tmp_path / "out")
    assert reference.architecture == "llama" and reference.widths()[0] == (5, 5, 40)
    assert difference(reference, source, sample_ids(source, 40)) < 1e-5


@pytest.mark.parametrize(("dtype", "bits", "error"), [("f16", 16, 2**-11), ("bf16", 16, 2**-8), ("q8_0", 8.5, 2**-7)])
def test_types(dtype, bits, error, pruned, tmp_path):
    exact, rounded = written(pruned[0.3], tmp_path / "f32"), written(pruned[0.3], tmp_path / dtype, dtype)
    assert rounded.fields["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[dtype]
    for name, tensor in exact.tensors.items():
        if tensor.ndim == 1:
            assert rounded.kinds[name] == "F32" and np.array_equal(rounded.tensors[name], tensor)
        else:
            assert rounded.kinds[name] == dtype.upper()
            assert np.abs(rounded.tensors[name] - tensor).max() <= error * np.abs(tensor).max()
    sizes = [file.stat().st_size for file in sorted(tmp_path.glob("*/*.gguf"))]
    assert min(sizes) < max(sizes) * (bits / 32 + 0.1)


def test_rows_that_q8_0_cannot_cut_are_f16(tmp_path):
    source = write_random(tmp_path / "in", SMALL)
    reference = written(source, tmp_path / "out", "q8_0")
    # Hidden size 48 and width 40 are no multiples of 32, 64 is.
    assert reference.kinds["blk.0.ffn_down.weight"] == reference.kinds["blk.0.attn_q.weight"] == "F16"
    assert reference.kinds["blk.1.ffn_down.weight"] == "Q8_0"
    assert difference(reference, source, sample_ids(source, 24)) < 0.02


# Tokenizers


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_bpe(name, tmp_path):
    tokenizer = bpe_tokenizer(PRE_TOKENIZERS[name], ignore_merges=name == "llama-bpe")
    fields = written(write_random(tmp_path / "in", tokenizer=tokenizer), tmp_path / "out").fields
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == name
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:2] == ["<s>", "</s>"] and tokens[290:] == [f"[PAD{index}]" for index in range(290, 300)]
    assert types[:2] == [CONTROL] * 2 and set(types[290:]) == {UNUSED}
    assert all(tokens[index] == token for token, index in tokenizer.get_vocab().items())
    assert fields["tokenizer.ggml.bos_token_id"] == 0 and fields["tokenizer.ggml.eos_token_id"] == 1
    assert not fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]
    merged = [merge.replace(" ", "") for merge in fields["tokenizer.ggml.merges"]]
    assert merged == tokens[258:290] and "tokenizer.ggml.scores" not in fields


def test_begin_token_is_added_if_the_tokenizer_adds_it(pruned, tmp_path):
    fields = written(pruned[0.3], tmp_path / "out").fields
    assert fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]


@pytest.mark.parametrize("metaspace", [False, True])
def test_sentencepiece(metaspace, tmp_path):
    tokenizer = sentencepiece_tokenizer(metaspace)
    source = write_random(tmp_path / "in", tokenizer=tokenizer, vocab_size=480)
    fields = written(source, tmp_path / "out").fields
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"]
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]) > 100
    assert types[:3] == [CONTROL, CONTROL, UNKNOWN] and tokens[3] == "<0x00>" and set(types[3:259]) == {BYTE}
    text = "The river ran past old stone walls at dawn"
    assert merge_by_score(text, tokens, fields["tokenizer.ggml.scores"]) == tokenizer.tokenize(text)


def merge_by_score(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """SentencePiece's rule: of all neighbours that join to a token, those with the highest score first."""
    score, pieces = dict(zip(tokens, scores, strict=True)), list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(score.get(a + b, -np.inf), -index) for index, (a, b) in enumerate(pairwise(pieces))]
        best, index = max(joined, default=(-np.inf, 0))
        if best == -np.inf:
            return pieces
        pieces[-index : 2 - index] = [pieces[-index] + pieces[1 - index]]


def _wordpiece() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def _lowercase() -> PreTrainedTokenizerFast:
    from tokenizers.normalizers import Lowercase

    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "value"),
    [
        (_wordpiece, "WordPiece"),
        (byte_tokenizer, "0 merges"),
        (_lowercase, "Lowercase"),
        (lambda: bpe_tokenizer({"type": "Whitespace"}), "Whitespace"),
        (lambda: bpe_tokenizer(BYTE_LEVEL | {"add_prefix_space": True}), "ByteLevel"),
        (lambda: bpe_tokenizer(PRE_TOKENIZERS["llama-bpe"]), "Split"),  # merges are not ignored
        (lambda: bpe_tokenizer(byte_fallback=True), "ByteLevel"),
    ],
)
def test_tokenizers_llama_cpp_would_read_differently_are_refused(tokenizer, value, tmp_path):
    source = open_source(write_random(tmp_path / "in", tokenizer=tokenizer()))
    with pytest.raises(InputError, match="llama.cpp would tokenise differently") as caught:
        to_gguf(source, tmp_path / "out")
    assert caught.value.field == "tokenizer" and value in str(caught.value.value) and not (tmp_path / "out").exists()


def test_merges_that_no_sentencepiece_model_has_are_refused(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    first = "".join(data["model"]["merges"][0])
    data["model"]["vocab"] |= {first + first: 480, first * 3: 481}
    data["model"]["merges"] += [[first, first], [first, first + first]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), unk_token="<unk>")
    with pytest.raises(InputError, match="lacks the merge"):
        vocabulary(tokenizer, open_source(write_random(tmp_path / "in", vocab_size=482)).config)


# Refusals


def test_rope_scalings_without_fixed_factors_are_refused(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    source = open_source(write_random(tmp_path / "in", rope_parameters=rope))
    with pytest.raises(InputError) as caught:
        to_gguf(source, tmp_path / "out")
    assert caught.value.field == "rope_type" and not (tmp_path / "out").exists()


def test_weights_that_overflow_f16_are_refused_and_leave_nothing(tmp_path):
    source = write_random(tmp_path / "in")
    model = load(source)
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    load_tokenizer(source).save_pretrained(tmp_path / "large")
    with pytest.raises(InputError, match="overflows"):
        to_gguf(open_source(tmp_path / "large"), tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    assert to_gguf(open_source(tmp_path / "large"), tmp_path / "out", "bf16")


def test_without_the_gguf_package_the_remedy_is_to_install_it(tmp_path, monkeypatch):
    source = open_source(write_random(tmp_path / "in"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'ppf\[export\]'"):
        to_gguf(source, tmp_path / "out")


def test_layer_0_without_attention_never_reaches_the_file(tmp_path):
    source = open_source(write_random(tmp_path / "in", SMALL))
    source.__dict__["widths"] = [(0, 0, 40), *source.widths[1:]]
    with pytest.raises(InputError, match="takes the head size of all layers from layer 0") as caught:
        to_gguf(source, tmp_path / "out")
    assert "at least one kv-group" in caught.value.remedy and not (tmp_path / "out").exists()

"""GGUF files, read back with the gguf package and computed by llama.cpp's graph written out in NumPy."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from export_cases import (
    FAMILIES,
    LLAMA3_ROPE,
    POLICIES,
    UNIFORM,
    YARN_ROPE,
    bpe_tokenizer,
    even,
    gemma_tokenizer,
    longrope,
    prune_to,
    sample_ids,
    sentencepiece_tokenizer,
    transformers_logits,
    uneven,
    write_random,
    write_tower,
)
from factories import byte_tokenizer
from gguf_reference import Reference
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ppf.checkpoint import load, load_tokenizer
from ppf.deliver.export import gguf_weights, open_source, to_gguf
from ppf.deliver.export.gguf_metadata import model_name
from ppf.deliver.export.gguf_tokenizer import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary
from ppf.errors import InputError
from ppf.families import families
from ppf.families.base import Family
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
# Layers: whole, FFN only, attention only, neither (and last).
SMALL = Policy([3, 0, 1, 0], [40, 64, 0, 0])
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}


# As published in Llama 3's, Qwen2's, Mistral Nemo's and Phi-4-mini's tokenizer.json.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
    "llama-bpe": _split(LLAMA3),
    "dbrx": _split(LLAMA3, "Removed", True),
    "qwen2": _split(QWEN2),
    "tekken": _split(TEKKEN),
    "gpt-4o": _split(GPT4O, "Removed", True),
}
IGNORING_MERGES = "llama-bpe", "tekken"
# What a tiny model of each family is written as: dense, with the same widths in all layers, with different ones.
ARCHITECTURES = {
    "llama": ("llama", "llama", "deci"),
    "mistral": ("llama", "llama", "deci"),
    "ministral3": ("mistral3", "mistral3", "deci"),
    "qwen2": ("qwen2", "llama", "deci"),
    "qwen3": ("qwen3", "qwen3", "openelm"),
    "gemma2": ("gemma2", "gemma2", None),
    "gemma3_text": ("gemma3", "gemma3", None),
    "phi3": ("phi3", "llama", "deci"),
    "olmo2": ("olmo2", "olmo2", None),
    "smollm3": ("smollm3", "smollm3", None),
    "granite": ("granite", "granite", "deci"),
}
# Some graphs know no other head than the embedding.
TIED = "gemma2", "qwen3"


def written(source: Path, output: Path, dtype: str = "f32", context: int = 0) -> Reference:
    return Reference(output / to_gguf(open_source(source), output, dtype)["file"], context)


def difference(reference: Reference, checkpoint: Path, ids: list[int]) -> float:
    """Largest difference of the logits after the last token, as a share of the largest logit."""
    expected = transformers_logits(checkpoint, ids)[-1].double().numpy()
    return float(np.abs(reference.logits(ids) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> dict[float, Path]:
    folder = tmp_path_factory.mktemp("pruned")
    return {ratio: prune_to(folder / str(ratio), policy) for ratio, policy in POLICIES.items()}


# Families


@pytest.mark.parametrize("kind", ["dense", "even", "uneven"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_llama_cpps_graphs(family, kind, tmp_path):
    policy = {"dense": None, "even": even(family), "uneven": uneven(family)}[kind]
    source = write_random(tmp_path / "in", policy, family=family, tie_word_embeddings=family in TIED)
    architecture = ARCHITECTURES[family][["dense", "even", "uneven"].index(kind)]
    if architecture is None:
        with pytest.raises(InputError, match="Export to hf|export to hf") as caught:
            to_gguf(open_source(source), tmp_path / "out")
        assert caught.value.value == f"ppf_{family}" and not (tmp_path / "out").exists()
        return
    facts = to_gguf(open_source(source), tmp_path / "out", "f32")
    reference = Reference(tmp_path / "out" / facts["file"])
    assert reference.architecture == facts["architecture"] == architecture
    ids = sample_ids(source, facts.get("context_length", 64))
    assert difference(reference, source, ids) < 1e-5
    # Negative control: the rows of one head in another order.
    name = "blk.0.attn_qkv.weight" if "blk.0.attn_qkv.weight" in reference.tensors else "blk.0.attn_q.weight"
    reference.tensors[name][:8] = np.concatenate((reference.tensors[name][:8][0::2], reference.tensors[name][:8][1::2]))
    assert difference(reference, source, ids) > 1e-4


def test_every_family_is_expected_somewhere():
    assert set(ARCHITECTURES) == {family.model_type for family in families()}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_a_checkpoint_is_left_out(family, tmp_path):
    source = open_source(write_random(tmp_path / "in", even(family), family=family, tie_word_embeddings=True))
    reference = written(source.folder, tmp_path / "out")
    extra = {name for name in ("rope_freqs.weight", "output.weight") if name in reference.tensors}
    sizes = sum(tensor.size for name, tensor in reference.tensors.items() if name not in extra)
    assert sizes == sum(int(np.prod(tensor.shape)) for tensor in source.stored.values())


# What a file says beside the weights, and what becomes of the computation without it.
FIELDS = [
    ("gemma2", "attention.sliding_window", {}),
    ("gemma2", "attn_logit_softcapping", {"attn_logit_softcapping": 2.0}),
    ("gemma2", "final_logit_softcapping", {"final_logit_softcapping": 2.0}),
    ("gemma3_text", "attention.sliding_window", {}),
    ("gemma3_text", "attention.sliding_window_pattern", {}),
    ("gemma3_text", "final_logit_softcapping", {"final_logit_softcapping": 2.0}),
    ("gemma3_text", "rope.freq_base_swa",
     {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 1e2}}}),
    ("granite", "embedding_scale", {}),
    ("granite", "residual_scale", {}),
    ("granite", "logit_scale", {}),
    ("qwen3", "rope.scaling.factor", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("olmo2", "rope.scaling.type", {"rope_parameters": YARN_ROPE}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "field", "changes"), FIELDS)
def test_every_field_counts(family, field, changes, tmp_path):
    source = write_random(tmp_path / "in", even(family), family=family, tie_word_embeddings=family in TIED, **changes)
    reference, ids = written(source, tmp_path / "out"), sample_ids(source, 60)
    assert difference(reference, source, ids) < 1e-5
    del reference.fields[f"{reference.architecture}.{field}"]
    assert difference(reference, source, ids) > 1e-3


BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("llama", even, BIASED),
        ("llama", uneven, BIASED),
        ("granite", even, BIASED),
        ("granite", uneven, BIASED | {"tie_word_embeddings": True}),
        ("olmo2", even, {"tie_word_embeddings": True}),
        ("smollm3", uneven, {"no_rope_layers": [1, 1, 1, 1]}),
        ("gemma2", even, {"tie_word_embeddings": True, "layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("gemma3_text", even, {"layer_types": ["full_attention"] * 4}),
        ("phi3", uneven, {"tie_word_embeddings": True}),
    ],
)
def test_what_configurations_allow(family, kind, changes, tmp_path):
    source = write_random(tmp_path / "in", kind(family), family=family, **changes)
    assert difference(written(source, tmp_path / "out"), source, sample_ids(source, 60)) < 1e-5


@pytest.mark.parametrize("layers", [2, 46])
def test_gemma_27bs_scale_of_scores_is_told_by_its_layers(layers, tmp_path):
    """llama.cpp takes hidden size over heads for 46 layers, the head size for others; nothing in the file says so."""
    source = write_random(
        tmp_path / "in", family="gemma2", num_hidden_layers=layers, tie_word_embeddings=True, head_dim=4
    )
    reference = written(source, tmp_path / "out")
    stored = load(source).model.layers[0].self_attn.q_proj.weight.detach().numpy()
    size = {2: 4, 46: 48 // 6}[layers]
    np.testing.assert_allclose(reference.tensors["blk.0.attn_q.weight"], stored * np.sqrt(size / 12), rtol=1e-5)


def test_windows_and_scaled_positions_bound_the_length(tmp_path):
    window = write_random(tmp_path / "window", even("mistral"), family="mistral", sliding_window=20)
    assert to_gguf(open_source(window), tmp_path / "a")["context_length"] == 20
    scaled = write_random(tmp_path / "scaled", uneven("ministral3"), family="ministral3", sliding_window=None)
    assert to_gguf(open_source(scaled), tmp_path / "b")["context_length"] == 16
    native = write_random(tmp_path / "native", even("ministral3"), family="ministral3", sliding_window=None)
    facts = to_gguf(open_source(native), tmp_path / "c", "f32")
    reference = Reference(tmp_path / "c" / facts["file"])
    assert "context_length" not in facts and reference.field("context_length") == 128
    assert difference(reference, native, sample_ids(native, 60)) < 1e-5
    # Beyond the length the computations part: it is not said for nothing.
    assert difference(Reference(tmp_path / "a" / "model-f16.gguf"), window, sample_ids(window, 60)) > 0.01


def test_the_text_tower_of_a_multimodal_model_is_written_alone(tmp_path):
    source = write_tower(tmp_path / "in", even("gemma3_text"))
    facts = to_gguf(open_source(source), tmp_path / "out", "f32")
    reference, ids = Reference(tmp_path / "out" / facts["file"]), sample_ids(source, 60)
    assert facts["part"] == "text tower" and reference.architecture == "gemma3"
    with torch.no_grad():
        expected = load(source, dtype="float32")(torch.tensor([ids])).logits[0, -1].double().numpy()
    assert np.abs(reference.logits(ids) - expected).max() < 1e-5 * np.abs(expected).max()


ANOTHER = "Export to hf"
REFUSED = [
    ("qwen3", uneven, {}, "openelm takes the embedding for the head"),
    ("qwen3", even, {"attention_bias": True}, "qwen3 has no biases of attention output"),
    ("olmo2", even, {"attention_bias": True}, "olmo2 has no biases of attention output, key, query, value"),
    ("smollm3", even, {"no_rope_layers": [1, 0, 1, 0]}, "smollm3 leaves every 4th layer without rotation"),
    ("smollm3", uneven, {}, "deci does not compute unrotated layers"),
    ("gemma2", even, {}, "gemma2 takes the embedding for the head"),
    ("gemma2", even, {"tie_word_embeddings": True, "final_logit_softcapping": None}, "gemma2 caps both"),
    ("gemma3_text", even, {"use_bidirectional_attention": True}, "gemma3 does not compute two-way attention"),
    ("llama", uneven, {"hidden_act": "gelu"}, "deci has silu for the activation, not gelu"),
    ("llama", even, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
     "llama has no dynamic rotary embedding"),
    ("gemma2", even, {"tie_word_embeddings": True, "rope_parameters": YARN_ROPE}, "gemma2 has no yarn rotary"),
    ("qwen3", even, {"rope_parameters": YARN_ROPE | {"beta_fast": 16}}, "has yarn's usual one"),
    ("qwen3", even, {"rope_parameters": YARN_ROPE | {"attention_factor": 1.0}}, "has yarn's usual one"),
    ("gemma3_text", even,
     {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
                          "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}},
     "does not scale the rotation of local layers"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "changes", "problem"), REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(family, kind, changes, problem, tmp_path):
    source = open_source(write_random(tmp_path / "in", kind(family), family=family, **changes))
    with pytest.raises(InputError, match=problem) as caught:
        to_gguf(source, tmp_path / "out")
    assert caught.value.remedy.startswith(ANOTHER) and not (tmp_path / "out").exists()


def test_a_family_that_llama_cpp_may_not_have_is_refused(tmp_path):
    source = open_source(write_random(tmp_path / "in"))
    source.checkpoint.family = Family("mymodel", "MyModel")
    with pytest.raises(InputError, match="knows no graph of llama.cpp"):
        to_gguf(source, tmp_path / "out")


# Llama


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


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", even), ("llama", uneven), ("qwen2", even), ("qwen3", even), ("qwen3", uneven)]
)
def test_yarn_as_fixed_factors_or_by_its_constants(family, kind, tmp_path):
    tied = family == "qwen3"
    source = write_random(
        tmp_path / "in", kind(family), family=family, rope_parameters=YARN_ROPE, tie_word_embeddings=tied
    )
    reference = written(source, tmp_path / "out")
    assert ("rope_freqs.weight" in reference.tensors) == (family != "qwen3")
    assert difference(reference, source, sample_ids(source, 100)) < 1e-5


@pytest.mark.parametrize(("family", "kind"), [("llama", even), ("llama", uneven), ("phi3", None), ("phi3", uneven)])
@pytest.mark.parametrize("long", [False, True])
def test_longrope_has_two_sets_of_factors(family, kind, long, tmp_path):
    rotated, original = {"llama": 8, "phi3": 4}[family], 32 if long else 64
    rope = longrope(rotated, original) | ({"partial_rotary_factor": 0.5} if family == "phi3" else {})
    policy = kind(family) if kind else None
    source = write_random(tmp_path / "in", policy, family=family, rope_parameters=rope,
                          original_max_position_embeddings=original)  # fmt: skip
    # Texts as long as the context: transformers goes by the one, llama.cpp by the other.
    reference, ids = written(source, tmp_path / "out", context=60), sample_ids(source, 60)
    assert difference(reference, source, ids) < 1e-5
    reference.context = 200 - reference.context
    assert (difference(reference, source, ids) > 1e-3) != long


@pytest.mark.parametrize("policy", [UNIFORM, None])
def test_uniform_results_and_dense_models_are_plain_llamas(policy, tmp_path):
    source = prune_to(tmp_path / "in", policy) if policy else write_random(tmp_path / "in", heads="mha")
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
    tokenizer = bpe_tokenizer(PRE_TOKENIZERS[name], ignore_merges=name in IGNORING_MERGES)
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


def test_gemmas_sentencepiece_puts_no_space_in_front(tmp_path):
    tokenizer = gemma_tokenizer()
    source = write_random(tmp_path / "in", even("gemma3_text"), tokenizer, "gemma3_text", vocab_size=480)
    fields = written(source, tmp_path / "out").fields
    assert fields["tokenizer.ggml.model"] == "llama" and not fields["tokenizer.ggml.add_space_prefix"]
    text, tokens = "river ran past old stone walls", fields["tokenizer.ggml.tokens"]
    assert merge_by_score(text, tokens, fields["tokenizer.ggml.scores"], "") == tokenizer.tokenize(text)


def merge_by_score(text: str, tokens: list[str], scores: list[float], begin: str = "▁") -> list[str]:
    """SentencePiece's rule: of all neighbours that join to a token, those with the highest score first."""
    score, pieces = dict(zip(tokens, scores, strict=True)), list(begin + text.replace(" ", "▁"))
    while True:
        joined = [(score.get(a + b, -np.inf), -index) for index, (a, b) in enumerate(pairwise(pieces))]
        best, index = max(joined, default=(-np.inf, 0))
        if best == -np.inf:
            return pieces
        pieces[-index : 2 - index] = [pieces[-index] + pieces[1 - index]]


def test_text_that_is_composed_already_is_left_as_it_is(tmp_path):
    from tokenizers.normalizers import NFC

    tokenizer = bpe_tokenizer(PRE_TOKENIZERS["qwen2"])
    tokenizer.backend_tokenizer.normalizer = NFC()
    fields = written(write_random(tmp_path / "in", tokenizer=tokenizer), tmp_path / "out").fields
    assert fields["tokenizer.ggml.pre"] == "qwen2"


def test_tokens_beyond_the_embedding(tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens([AddedToken("<pad>", special=True), AddedToken("<mine>")])
    source = open_source(write_random(tmp_path / "in", tokenizer=tokenizer, vocab_size=291))
    words = vocabulary(source.tokenizer, source.config)
    assert words.tokens[290] == "<pad>" and len(words.tokens) == 291  # nobody writes <mine> without meaning it
    source = open_source(write_random(tmp_path / "larger", tokenizer=tokenizer))
    assert vocabulary(source.tokenizer, source.config).types[290:293] == [CONTROL, USER_DEFINED, UNUSED]
    source = open_source(write_random(tmp_path / "smaller", tokenizer=bpe_tokenizer(), vocab_size=280))
    with pytest.raises(InputError, match="the model ends at 279"):
        to_gguf(source, tmp_path / "out")


def test_phi_3_in_a_name_means_that_special_tokens_strip(tmp_path):
    """llama.cpp goes by the model's name, and does not load a vocabulary that lacks four tokens then."""
    source = open_source(write_random(tmp_path / "my-Phi-3-mini"))
    words = vocabulary(source.tokenizer, source.config)
    assert model_name("my-Phi-3-mini", words) == "my-phi_3-mini" and not words.strips_right
    tokenizer = bpe_tokenizer()
    special = [AddedToken(token, special=True, rstrip=True) for token in ("<unk>", "<|endoftext|>", "<|end|>")]
    tokenizer.add_tokens(special)
    words = vocabulary(tokenizer, source.config)
    assert words.strips_right and model_name("OUT", words) == "phi-3 OUT"


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
        (lambda: bpe_tokenizer(PRE_TOKENIZERS["tekken"]), "Split"),  # merges are not ignored
        (lambda: bpe_tokenizer(_split(QWEN2, "Removed")), "Split"),  # what the pattern finds is removed
        (lambda: bpe_tokenizer(_split("[a-z]+")), "Split"),
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

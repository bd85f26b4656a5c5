"""GGUF files of pruned Llamas: absent sub-layers, rotations, and the types that numbers are stored in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from export_cases import (
    LLAMA3_ROPE,
    POLICIES,
    UNIFORM,
    YARN_ROPE,
    even,
    longrope,
    prune_to,
    sample_ids,
    uneven,
    write_random,
)
from gguf_cases import (
    difference,
    written,
)

from ppf.deliver.export import gguf_weights, open_source
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
# Layers: whole, FFN only, attention only, neither (and last).
SMALL = Policy([3, 0, 1, 0], [40, 64, 0, 0])


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> dict[float, Path]:
    folder = tmp_path_factory.mktemp("pruned")
    return {ratio: prune_to(folder / str(ratio), policy) for ratio, policy in POLICIES.items()}


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

"""GGUF files of every family, read back with the gguf package and computed by llama.cpp's graph written out in NumPy;
and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from export_cases import (
    FAMILIES,
    YARN_ROPE,
    even,
    sample_ids,
    uneven,
    write_random,
    write_tower,
)
from gguf_cases import (
    ARCHITECTURES,
    BIASED,
    TIED,
    difference,
    written,
)
from gguf_reference import Reference

from ppf.checkpoint import load, load_tokenizer
from ppf.deliver.export import open_source, to_gguf
from ppf.errors import InputError
from ppf.families import families
from ppf.families.base import Family
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
# Layers: whole, FFN only, attention only, neither (and last).
SMALL = Policy([3, 0, 1, 0], [40, 64, 0, 0])


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

"""Nobody believes a family file: every declaration against transformers, and declarations that are wrong."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import fresh
import pytest
import torch
from transformers import AutoConfig

import ppf_autoload
from ppf import families
from ppf.errors import InputError, PPFError
from ppf.families import ATTENTION, FFN, KINDS, Family
from ppf.families.traits import traits_of, unserved
from ppf.fast.sublayers import SERVES, ByReference, Fused
from ppf.fitting import family_check
from ppf.fitting.family_check import check, random_model, tiny_config
from ppf.model.classes import result_classes, stock_classes
from ppf.model.decoder import Decoder
from ppf.model.layer import LayerMap

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = families.families()
BY_TYPE = {family.model_type: family for family in ALL}
# Two layers, one of each kind where a family has two.
SMALL = {"num_hidden_layers": 2, "intermediate_size": 5}


@pytest.mark.parametrize("family", ALL, ids=list(BY_TYPE))
def test_removing_any_unit_is_zeroing_it(family, monkeypatch):
    """Masked, materialised, saved and reloaded in a new process, and in generation with a cache."""
    monkeypatch.setattr(family_check, "subprocess", SimpleNamespace(run=fresh.in_its_place))
    layers, groups, channels = SMALL["num_hidden_layers"], 3, SMALL["intermediate_size"]
    whole = 1 if not family.attention.whole else 0
    expected = layers * (groups * whole + channels) + 2 * layers - 1  # each alone, and whole sub-layers but layer 0's
    assert check(family, **SMALL) == expected


def _shifted(self, order, units):
    """One row too far, as a forgotten offset would give."""
    return (UNSHIFTED(self, order, units) + (self.dim == 0)) % (units * self.segments[0][1])


UNSHIFTED = None


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_a_row_shifted_is_found(monkeypatch, model_type):
    from ppf.model import layer

    monkeypatch.setattr("test_families.UNSHIFTED", layer.UnitTensor.index)
    monkeypatch.setattr(layer.UnitTensor, "index", _shifted)
    with pytest.raises(PPFError, match="differs from the stock model"):
        check(BY_TYPE[model_type], **SMALL)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_bias_forgotten_is_found(monkeypatch, model_type):
    """A declaration whose biases stay whole does not fit transformers' smaller layer, or computes something else."""
    tensors = LayerMap.unit_tensors

    def without_biases(self, layer, kind):
        return (unit for unit in tensors(self, layer, kind) if not unit.name.endswith(".bias"))

    monkeypatch.setattr(LayerMap, "unit_tensors", without_biases)
    with pytest.raises(PPFError, match="bias|size of tensor|differs"):
        check(BY_TYPE[model_type], **SMALL)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": {"q_proj": ("key",), "k_proj": ("query",), "v_proj": ("value",)}},
        {"rows": {"q_proj": ("query",), "k_proj": ("key",)}},
        {"before": "post_attention_layernorm"},
    ],
    ids=["query and key exchanged", "value left out", "another norm"],
)
def test_wrong_declarations_of_attention_are_found(wrong):
    family = replace(BY_TYPE["llama"], attention=replace(ATTENTION, **wrong))
    with pytest.raises(PPFError, match="family llama: .*(differs from the stock model|does not fit transformers)"):
        check(family, **SMALL)


def test_fused_segments_in_the_wrong_order_are_found():
    family = BY_TYPE["phi3"]
    wrong = replace(family, attention=replace(family.attention, rows={"qkv_proj": ("key", "value", "query")}))
    with pytest.raises(PPFError, match="phi3"):
        check(wrong, **SMALL)


def test_heads_normalised_together_are_not_cut_one_by_one():
    family = BY_TYPE["olmo2"]
    assert family.attention.whole
    with pytest.raises(PPFError, match="olmo2"):
        check(replace(family, attention=replace(family.attention, whole=False)), **SMALL)


def test_a_check_leaves_the_registered_family_as_it_was():
    llama = BY_TYPE["llama"]
    with pytest.raises(PPFError):
        check(replace(llama, attention=replace(ATTENTION, before="post_attention_layernorm")))
    assert families.family_of("llama") is llama
    assert type(AutoConfig.for_model("ppf_llama")) is result_classes(llama)["Config"]


@pytest.mark.parametrize("family", ALL, ids=list(BY_TYPE))
def test_transformers_own_sharding_plan_agrees(family):
    """Column-parallel projections have units as rows, row-parallel ones as columns."""
    plan = getattr(stock_classes(family)["Config"], "base_model_tp_plan", None)
    assert plan
    for part in family.parts.values():
        for name in part.rows:
            assert plan[f"layers.*.{part.module}.{name}"].startswith("colwise")
        assert plan[f"layers.*.{part.output_name}"].startswith("rowwise")


@pytest.mark.parametrize("family", ALL, ids=list(BY_TYPE))
def test_fused_sublayers_are_transformers_layers(family):
    """Every family that the fused way claims: all widths of every sub-layer, in fp32."""
    config = tiny_config(family)
    decoder = Decoder.of_model(random_model(config, family))
    if unserved(decoder.traits, SERVES) is not None:
        pytest.skip(f"takes transformers' layers: {unserved(decoder.traits, SERVES)}")
    ids = torch.arange(3, 27).view(2, 12)
    fused, reference = Fused(decoder), ByReference(decoder)
    x, told = decoder.frame.begin(ids), decoder.frame.context(2, 12)
    tried = 0
    with torch.no_grad():
        for index in range(config.num_hidden_layers):
            for kind in KINDS:
                sublayer = decoder.structure.of(kind)[index]
                for width in range(1, sublayer.units + 1):
                    expected = reference(index, kind, width, None, x.clone(), told[index])
                    found = fused(index, kind, width, None, x.clone(), told[index])
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
                    assert (expected - x).abs().max() > 1e-2
                    tried += 1
            x = expected
    assert tried == 39


@pytest.mark.parametrize(
    ("model_type", "trait", "spoil"),
    [
        ("qwen3", "head norm", lambda f: setattr_(f._view(0, "attention"), "q_norm", None)),
        ("qwen2", "bias", lambda f: setattr_(f._view(0, "attention"), "k_bias", None)),
        ("gemma3_text", "sandwich norms", lambda f: setattr_(f._view(0, "attention"), "after", None)),
        ("gemma3_text", "one-plus norm", lambda f: setattr(f, "one_plus", False)),
        ("gemma3_text", "activation", lambda f: setattr(f, "activation", "silu")),
        ("granite", "residual scale", lambda f: setattr(f, "residual", 1.0)),
        ("granite", "score scale", lambda f: setattr(f, "score_scale", 1.0)),
    ],
)
def test_a_trait_left_out_shows(model_type, trait, spoil):
    """Negative control of the test above."""
    fields = {"residual_multiplier": 0.4, "attention_multiplier": 0.2} if model_type == "granite" else {}
    decoder = Decoder.of_model(random_model(tiny_config(BY_TYPE[model_type], **fields), BY_TYPE[model_type]))
    ids = torch.arange(3, 27).view(2, 12)
    x, told = decoder.frame.begin(ids), decoder.frame.context(2, 12)
    fused, reference = Fused(decoder), ByReference(decoder)
    assert (_layer0(fused, decoder, x, told) - _layer0(reference, decoder, x, told)).abs().max() < 1e-4
    spoil(fused)
    assert (_layer0(fused, decoder, x, told) - _layer0(reference, decoder, x, told)).abs().max() > 1e-3, trait


def setattr_(view, name, value):
    object.__setattr__(view, name, value)


@torch.no_grad()
def _layer0(run, decoder, x, told):
    for kind in KINDS:
        x = run(0, kind, decoder.structure.of(kind)[0].units, None, x.clone(), told[0])
    return x


def test_traits_say_what_is_beyond_a_llama():
    found = {f.model_type: traits_of(f, tiny_config(f)) for f in ALL}
    assert found["llama"] == found["qwen2"] - {"window"} == set()
    assert "window" in found["mistral"] and "head norm" in found["qwen3"] and "score cap" in found["gemma2"]
    assert "several rotations" in found["gemma3_text"] and "unrotated layers" in found["smollm3"]
    assert unserved({"window"}, {"window"}) is None and "score cap" in unserved({"score cap"}, {"window"})


def test_results_are_announced_to_transformers():
    assert ppf_autoload._RESULTS.items() >= {f.result_type: f"PPF{f.classes}Config" for f in ALL}.items()


def test_a_family_that_is_not_there_is_refused_with_the_list():
    with pytest.raises(InputError) as caught:
        families.family_of("mamba")
    message = str(caught.value)
    assert "mamba" in message and "qwen3" in message and "ppf.families.register" in message
    for odd in (None, 3, ["llama"], ""):
        with pytest.raises(InputError):
            families.family_of(odd)


def test_a_family_registered_from_outside():
    """As docs/families.md does it: a model type that transformers has and PPF does not ship; at the size that is
    checked when nothing is said."""
    family = Family("olmo", "Olmo", attention=ATTENTION, ffn=FFN)
    assert "olmo" not in BY_TYPE
    with families.registered(family):
        assert families.family_of("ppf_olmo") is family
    with pytest.raises(InputError, match="olmo"):
        families.family_of("olmo")
    assert check(family) == 44

"""What Structure says a model costs is what transformers' modules weigh, for every family and every layer."""

import json
from types import SimpleNamespace

import pytest
import torch
from factories import llama_config
from structures import llama_structure
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from ppf.families import KINDS, families, family_of
from ppf.fitting.family_check import tiny_config
from ppf.model.build import expected_tensors, pruned_config
from ppf.model.classes import stock_classes
from ppf.model.geometry import head_dim_of, structure_of
from ppf.model.policy import Policy
from ppf.model.structure import Structure, SubLayer

FAMILIES = {family.model_type: family for family in families()}
CONFIGS = {
    "mha": llama_config("mha"),
    "gqa": llama_config("gqa"),
    "wide heads": llama_config("gqa", head_dim=20),
    "one kv head": llama_config(num_key_value_heads=1),
    "biases": llama_config(attention_bias=True, mlp_bias=True),
    "Llama-2-7B": LlamaConfig(),
    "Llama-3-8B": LlamaConfig(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256),
} | {f"tiny {name}": tiny_config(family) for name, family in FAMILIES.items()}
IRREGULAR = Policy([3, 0, 2, 1], [64, 16, 0, 40])


def geometry(config) -> Structure:
    return structure_of(family_of(config.model_type), config)


def unit_parameters(config) -> int:
    """Parameters of ``config``'s model that belong to units: everything in the layers but norms and output biases."""
    parts = family_of(config.model_type).parts.values()
    kept = tuple(f"{part.output_name}.bias" for part in parts)
    with torch.device("meta"):
        model = stock_classes(family_of(config.model_type))["ForCausalLM"](config)
    return sum(
        p.numel() for n, p in model.named_parameters() if ".layers." in n and "norm" not in n and not n.endswith(kept)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_parameters_are_those_of_the_modules(name):
    config, structure = CONFIGS[name], geometry(CONFIGS[name])
    assert structure.decoder_parameters == unit_parameters(config)
    assert structure.layers == config.num_hidden_layers and structure.hidden == config.hidden_size
    rows = config.num_attention_heads * structure.head_dim
    assert {a.width for a in structure.attention} == {rows}
    assert {a.units for a in structure.attention} == {config.num_key_value_heads}
    assert {(f.units, f.columns, f.width) for f in structure.ffn} == {
        (config.intermediate_size, 1, config.intermediate_size)
    }


def test_the_published_sizes():
    """Embedding, head, norms of the layers (and of the heads) and the last norm are no units; everything else is."""
    qwen2 = Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    qwen3 = Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    sizes = {
        "Llama-2-7B": (CONFIGS["Llama-2-7B"], 6_738_415_616, 0),
        "Llama-3-8B": (CONFIGS["Llama-3-8B"], 8_030_261_248, 0),
        "Qwen2.5-7B": (qwen2, 7_615_616_512, 0),
        "Qwen3-8B": (qwen3, 8_190_735_360, 2 * 128 * 36),
    }
    for name, (config, total, head_norms) in sizes.items():
        others = 2 * config.vocab_size * config.hidden_size + (2 * config.num_hidden_layers + 1) * config.hidden_size
        assert geometry(config).decoder_parameters + others + head_norms == total, name


@pytest.mark.parametrize("name", ["mha", "gqa", "wide heads", "biases", *(f"tiny {name}" for name in FAMILIES)])
def test_removing_a_unit_removes_its_cost(name):
    config, structure = CONFIGS[name], geometry(CONFIGS[name])
    dense = {kind: [s.units for s in structure.of(kind)] for kind in KINDS}

    def parameters(kind: str, layer: int, width: int) -> int:
        widths = {k: list(w) for k, w in dense.items()}
        widths[kind][layer] = width
        shapes = expected_tensors(pruned_config(config, Policy(**widths)))
        kept = tuple(f"{part.output_name}.bias" for part in family_of(config.model_type).parts.values())
        inside = {n: s for n, s in shapes.items() if ".layers." in n and "norm" not in n and not n.endswith(kept)}
        return sum(shape.numel() for shape in inside.values())

    assert parameters("ffn", 0, dense["ffn"][0]) == structure.decoder_parameters
    for kind in KINDS:
        for layer in (0, structure.layers - 1):
            sublayer, whole = structure.of(kind)[layer], structure.decoder_parameters
            if (kind, layer) != ("attention", 0):  # which keeps some
                assert whole - parameters(kind, layer, 0) == sublayer.units * sublayer.cost
            if sublayer.step == 1:
                assert whole - parameters(kind, layer, sublayer.units - 1) == sublayer.cost > 0


def test_units_that_only_go_together_have_a_step():
    steps = {name: {a.step for a in geometry(tiny_config(f)).attention} for name, f in FAMILIES.items()}
    assert steps == {name: {3 if name == "olmo2" else 1} for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_a_source_may_differ(name):
    """A result is a source again: units are its own, and each costs what it did."""
    family, config = FAMILIES[name], tiny_config(FAMILIES[name], num_hidden_layers=4)
    dense, groups = geometry(config), (3, 0, 3, 0) if FAMILIES[name].attention.whole else (3, 0, 2, 1)
    found = structure_of(family, pruned_config(config, Policy(groups, (10, 4, 0, 7))))
    assert [a.units for a in found.attention] == list(groups) and [f.units for f in found.ffn] == [10, 4, 0, 7]
    for kind in KINDS:
        for ours, before in zip(found.of(kind), dense.of(kind), strict=True):
            assert ours.cost == (before.cost if ours.units else 0)
            assert not ours.units or ours.columns == before.columns
            assert ours.width == ours.units * before.columns
    assert (found.hidden, found.head_dim, found.layers) == (dense.hidden, dense.head_dim, 4)
    expected = sum(u * s.cost for kind, w in (("attention", groups), ("ffn", (10, 4, 0, 7)))
                   for u, s in zip(w, dense.of(kind), strict=True))  # fmt: skip
    assert found.decoder_parameters == expected


def test_sublayers_are_numbered_attention_first_and_blocks_are_those_of_the_roles():
    structure = geometry(CONFIGS["wide heads"])  # 3 kv-groups of 2 heads of 20
    assert structure.sublayers == structure.attention + structure.ffn
    assert structure.of("attention") is structure.attention and structure.of("ffn") is structure.ffn
    blocks = {role: structure.block("attention", 1, role) for role in ("query", "key", "value", "output")}
    assert blocks == {"query": 40, "key": 20, "value": 20, "output": 40}
    assert {structure.block("ffn", 2, role) for role in ("gate", "up", "output")} == {1}


def test_old_configs_without_kv_heads_or_head_dim():
    old = SimpleNamespace(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=96)
    family = FAMILIES["llama"]
    assert head_dim_of(old) == 16 and family.widths(old) == {"attention": (4, 1), "ffn": (96, 1)}
    old.num_key_value_heads, old.head_dim = None, None
    assert head_dim_of(old) == 16 and family.widths(old) == {"attention": (4, 1), "ffn": (96, 1)}
    config = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=96)
    assert geometry(config) == llama_structure(2, 64, 4, 1, 16, 96)


@pytest.mark.parametrize("config", [CONFIGS["gqa"], pruned_config(CONFIGS["gqa"], IRREGULAR)])
def test_dictionary_round_trip(config):
    structure = geometry(config)
    assert Structure.from_dict(json.loads(json.dumps(structure.to_dict()))) == structure


@pytest.mark.parametrize(
    "change",
    [
        {"attention": [[3, 10, 4, 1]]},  # one layer less than the FFN
        {"attention": [[3, 10], [3, 10]]},
        {"ffn": [[3.5, 10, 1, 1]] * 2},
        {"ffn": 7},
        {"hidden": "48"},
        {"head_dim": None},
    ],
)
def test_dictionaries_of_something_else_are_refused(change):
    sublayers = (SubLayer(3, 10, 4),) * 2
    good = Structure(48, 8, sublayers, sublayers).to_dict()
    assert Structure.from_dict(good).layers == 2
    with pytest.raises((KeyError, TypeError, ValueError)):
        Structure.from_dict(good | change)
    for name in change:
        with pytest.raises(KeyError):
            Structure.from_dict({key: value for key, value in good.items() if key != name})

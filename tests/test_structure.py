"""What Structure says a model costs is what transformers' modules weigh."""

from types import SimpleNamespace

import pytest
import torch
from factories import llama_config
from transformers import LlamaConfig, LlamaForCausalLM

from ppf.model import build, pruned_config
from ppf.model.layout import expected_tensors
from ppf.model.policy import Policy
from ppf.model.structure import Structure

CONFIGS = {
    "mha": llama_config("mha"),
    "gqa": llama_config("gqa"),
    "wide heads": llama_config("gqa", head_dim=20),
    "one kv head": llama_config(num_key_value_heads=1),
    "Llama-2-7B": LlamaConfig(),
    "Llama-3-8B": LlamaConfig(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256),
}


def projection_parameters(model) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "layers." in name and "_proj." in name)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_parameters_are_those_of_the_modules(name):
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIGS[name])
    structure = Structure.from_config(CONFIGS[name])
    assert structure.decoder_parameters == projection_parameters(model)
    assert structure.group_rows * structure.kv_groups == model.model.layers[0].self_attn.o_proj.in_features


def test_the_published_sizes_of_llama():
    # 6,738,415,616 and 8,030,261,248 parameters, of which embedding, head and norms are no units.
    for name, total in {"Llama-2-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248}.items():
        config, structure = CONFIGS[name], Structure.from_config(CONFIGS[name])
        others = 2 * config.vocab_size * config.hidden_size + (2 * config.num_hidden_layers + 1) * config.hidden_size
        assert structure.decoder_parameters + others == total


@pytest.mark.parametrize("name", ["mha", "gqa", "wide heads"])
def test_removing_a_unit_removes_its_cost(name):
    config = CONFIGS[name]
    structure = Structure.from_config(config)
    full = Policy([structure.kv_groups] * 4, [64] * 4)

    def parameters(policy: Policy) -> int:
        pruned = pruned_config(config, policy)
        state = {n: torch.zeros(shape) for n, shape in expected_tensors(pruned).items()}
        return projection_parameters(build(pruned, state, torch.float32))

    dense = parameters(full)
    without_group = Policy((full.attention[0] - 1, *full.attention[1:]), full.ffn)
    without_channel = Policy(full.attention, (63, *full.ffn[1:]))
    assert dense - parameters(without_group) == structure.kv_group_cost
    assert dense - parameters(without_channel) == structure.channel_cost


def test_old_configs_without_kv_heads_or_head_dim():
    old = SimpleNamespace(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=96)
    assert Structure.from_config(old) == Structure(2, 64, 4, 1, 16, 96)
    old.num_key_value_heads, old.head_dim = None, None
    assert Structure.from_config(old) == Structure(2, 64, 4, 1, 16, 96)


def test_dictionary_round_trip():
    structure = Structure.from_config(CONFIGS["gqa"])
    assert Structure(**structure.to_dict()) == structure

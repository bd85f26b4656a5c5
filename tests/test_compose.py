"""Results in other people's tools, as docs/compose.md has them: peft's adapters, accelerate's maps, TRL's way to open.

Quantisers need environments of their own: what they did is told there, with its date.
"""

import pytest
import torch
from export_cases import POLICIES, prune_to, uneven, write_random
from factories import tokens
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
MADE = {
    "llama": lambda to: prune_to(to, POLICIES[0.5]),  # tied, sub-layers absent, the last layer with them
    "gemma3_text": lambda to: write_random(to, uneven("gemma3_text"), family="gemma3_text", tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=MADE)
def folder(request, tmp_path_factory):
    return MADE[request.param](tmp_path_factory.mktemp("compose") / request.param)


def opened(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


@torch.no_grad()
def logits(model):
    return model.eval()(tokens()).logits


def trained(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    return model


def test_lora_and_merge(folder, tmp_path):
    peft = pytest.importorskip("peft")
    dense = logits(opened(folder))
    asked = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = trained(peft.get_peft_model(opened(folder), asked))
    expected = logits(adapted)
    assert (expected - dense).abs().max() > 0.1  # negative control: it did learn something
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(opened(folder), tmp_path / "adapter")), expected)
    assert torch.equal(logits(opened(tmp_path / "adapter")), expected)  # transformers finds the base by itself
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(opened(tmp_path / "merged")), expected, atol=1e-3, rtol=1e-3)


def test_device_maps(folder, tmp_path):
    pytest.importorskip("accelerate")
    expected, layers = logits(opened(folder)), AutoConfig.from_pretrained(folder).num_hidden_layers
    places = {f"model.layers.{index}": ("disk", "cpu")[index % 2] for index in range(layers)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for where in ("auto", "cpu", places):
        model = opened(folder, device_map=where, offload_folder=tmp_path)
        assert torch.equal(logits(model), expected)
        out = model.generate(tokens(1, 8), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
        assert out.shape == (1, 11)
    assert set(model.hf_device_map.values()) == {"disk", "cpu"} and model.model.layers[0].mlp.up_proj.weight.is_meta


def test_a_configuration_answers_what_trl_asks(folder):
    """TRL 1.16 takes a class that transformers itself does not have for code on the hub, and reads its map."""
    assert (AutoConfig.from_pretrained(folder).auto_map or {}) == {}
    assert "auto_map" not in (folder / "config.json").read_text()

"""Multimodal models: the text tower is read, pruned and written like a language model, everything else is untouched."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

import ppf_autoload
from ppf.checkpoint import Checkpoint, check_checkpoint, fingerprint, load, load_decoder, save, verify, writing
from ppf.errors import InputError
from ppf.families import families
from ppf.model.build import build, expected_tensors, policy_of, pruned_config
from ppf.model.classes import result_classes
from ppf.model.policy import Policy
from ppf.model.tower import wrapper_classes

TEXT = {"vocab_size": 63, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 4, "head_dim": 8}
TEXT |= {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 128, "sliding_window": 8}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = 63  # beyond the vocabulary, so that generation never writes one
UNIFORM, OTHER = Policy([2] * 4, [16] * 4), Policy([3, 0, 2, 0], [32, 16, 0, 0])
POLICIES = pytest.mark.parametrize("policy", [UNIFORM, OTHER], ids=["uniform", "non-uniform"])


def gemma(folder: Path, **options) -> Gemma3ForConditionalGeneration:
    """A tiny random Gemma 3 with a vision tower, saved by transformers with what else its folder holds."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    text = TEXT | {"layer_types": ["sliding_attention", "full_attention"] * 2, "tie_word_embeddings": True}
    places = {"image_token_index": IMAGE, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, **places)
    return _saved(Gemma3ForConditionalGeneration(config), folder, **options)


def mistral(folder: Path, model_type: str = "ministral3", **options) -> Mistral3ForConditionalGeneration:
    """A tiny random Mistral 3 whose head is not tied; its text tower may be of two families."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4, "head_dim": 8, "model_type": "pixtral"}
    text = TEXT | {"model_type": model_type, "tie_word_embeddings": False}
    places = {"image_token_index": 60, "tie_word_embeddings": False}
    config = Mistral3Config(text_config=text, vision_config=vision, **places)
    return _saved(Mistral3ForConditionalGeneration(config), folder, **options)


def _saved(model, folder: Path, **options):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.eval().save_pretrained(folder, **options)
    (folder / "preprocessor_config.json").write_text('{"size": 16}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("of the source")
    return model


def ids() -> torch.Tensor:
    return torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))


def with_image() -> dict[str, torch.Tensor]:
    """Two sequences with an image of four tokens each."""
    tokens = ids()
    tokens[:, 3:7] = IMAGE
    return {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def cut(model, policy: Policy):
    """``model`` cut to the first units of every sub-layer."""
    config, state = pruned_config(model.config, policy), model.state_dict()
    shapes = expected_tensors(config).items()
    kept = {name: state[name][tuple(slice(n) for n in shape)].contiguous() for name, shape in shapes}
    return build(config, kept, model.dtype, model.generation_config)


def rewritten(source: Path, policy: Policy, path: Path):
    """Prune the tower in ``source``, write the whole to ``path``; returns the pruned tower as a text-only model."""
    tower = cut(load(source), policy)
    save(tower, None, path, {"ratio": 0.5}, source=Checkpoint(source))
    return tower


def passengers(folder: Path) -> dict[str, torch.Tensor]:
    state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in state.items() if "language_model" not in name and "lm_head" not in name}


@pytest.mark.parametrize("layout", [True, False], ids=["as published", "as in memory"])
@pytest.mark.parametrize("write", [gemma, mistral])
def test_the_tower_is_read_like_a_language_model(write, layout, tmp_path):
    model = write(tmp_path, save_original_format=layout)
    opened, loaded = Checkpoint(tmp_path), load(tmp_path)
    assert opened.config.model_type == opened.family.model_type == loaded.config.model_type
    assert (
        type(opened.config) is type(model.config.text_config) and opened.wrapper.model_type == model.config.model_type
    )
    assert opened.stored.keys() == expected_tensors(opened.config).keys()
    assert opened.passengers.keys() == passengers(tmp_path).keys() and len(opened.passengers) > 20
    assert torch.equal(loaded(ids()).logits, model(input_ids=ids()).logits)
    assert check_checkpoint(tmp_path).vocab_size == 63 and len(fingerprint(tmp_path)) == 64
    assert torch.equal(
        load_decoder(tmp_path).output(1, "ffn"), model.model.language_model.layers[1].mlp.down_proj.weight
    )


@POLICIES
@pytest.mark.parametrize("layout", [True, False], ids=["as published", "as in memory"])
@pytest.mark.parametrize("write", [gemma, mistral])
def test_the_whole_is_written_around_the_pruned_tower(write, layout, policy, tmp_path):
    write(tmp_path / "in", save_original_format=layout)
    tower = rewritten(tmp_path / "in", policy, tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "in")
    assert (type(model) is type(stock)) == (policy is UNIFORM)
    assert torch.equal(model(input_ids=ids()).logits, tower(ids()).logits)
    assert torch.equal(load(tmp_path / "out")(ids()).logits, tower(ids()).logits)
    before, after = passengers(tmp_path / "in"), passengers(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name, tensor in stock.state_dict().items():
        if "language_model" not in name and "lm_head" not in name:
            assert torch.equal(tensor, model.state_dict()[name])
    assert verify(tmp_path / "out") and policy_of(check_checkpoint(tmp_path / "out")) == policy
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 16}'
    assert (tmp_path / "out" / "chat_template.jinja").exists() and not (tmp_path / "out" / "README.md").exists()


def test_removing_units_equals_zeroing_them_with_an_image(tmp_path):
    model = gemma(tmp_path / "in")
    for layer, groups, channels in zip(model.model.language_model.layers, OTHER.attention, OTHER.ffn, strict=True):
        with torch.no_grad():
            layer.self_attn.o_proj.weight[:, groups * 16 :] = 0
            layer.mlp.down_proj.weight[:, channels:] = 0
    model.save_pretrained(tmp_path / "in")
    rewritten(tmp_path / "in", OTHER, tmp_path / "out")
    pruned = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    inputs = with_image()
    whole, ours = model(**inputs).logits, pruned(**inputs).logits
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[:, 8:], model(inputs["input_ids"], inputs["pixel_values"] * 2).logits[:, 8:])
    texts = [m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (model, pruned)]
    texts.append(pruned.generate(**inputs, max_new_tokens=6, do_sample=False, cache_implementation="static"))
    assert texts[0].shape == (2, 26) and torch.equal(texts[0], texts[1]) and torch.equal(texts[1], texts[2])


@POLICIES
def test_a_result_is_pruned_again(policy, tmp_path):
    gemma(tmp_path / "in")
    rewritten(tmp_path / "in", policy, tmp_path / "once")
    again = Policy([min(width, 1) for width in policy.attention], [width // 2 for width in policy.ffn])
    tower = rewritten(tmp_path / "once", again, tmp_path / "twice")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "twice")
    assert torch.equal(model(input_ids=ids()).logits, tower(ids()).logits)
    assert passengers(tmp_path / "twice").keys() == passengers(tmp_path / "in").keys()


def test_results_open_where_ppf_is_only_installed(tmp_path):
    """And transformers saves, and pickle copies, what they are."""
    gemma(tmp_path / "in")
    tower = rewritten(tmp_path / "in", OTHER, tmp_path / "out")
    code = (
        "import sys; sys.path.append(sys.argv[1]); import ppf_autoload; ppf_autoload.register()\n"
        "from transformers import AutoModelForImageTextToText as Auto\n"
        "model = Auto.from_pretrained(sys.argv[2]); model.save_pretrained(sys.argv[3]); print(type(model).__name__)"
    )
    arguments = [str(Path(__file__).parents[1]), str(tmp_path / "out"), str(tmp_path / "again")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "PPFGemma3ForConditionalGeneration", done.stderr
    assert torch.equal(load(tmp_path / "again")(ids()).logits, tower(ids()).logits)
    config = AutoConfig.from_pretrained(tmp_path / "again")
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_all_results_are_announced():
    for family in families():
        assert ppf_autoload._RESULTS[family.result_type] == result_classes(family)["Config"].__name__
    for model_type in {name for family in families() for name in family.towers}:
        assert ppf_autoload._RESULTS[f"ppf_{model_type}"] == wrapper_classes(model_type)["Config"].__name__


def test_the_towers_own_model_type_decides_its_family(tmp_path):
    """Where it states none, transformers' default for the wrapper does."""
    mistral(tmp_path, "mistral")
    assert Checkpoint(tmp_path).family.model_type == "mistral"
    data = json.loads((tmp_path / "config.json").read_text())
    del data["text_config"]["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert Checkpoint(tmp_path).family.model_type == "mistral"
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path).config.text_config).model_type == "mistral"


def test_a_tower_saved_alone_is_a_language_model(tmp_path):
    gemma(tmp_path / "in")
    tower = cut(load(tmp_path / "in"), OTHER)
    save(tower, None, tmp_path / "out", {})
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids()).logits, tower(ids()).logits)


def test_large_results_are_written_in_shards(tmp_path, monkeypatch):
    gemma(tmp_path / "in")
    monkeypatch.setattr(writing, "SHARD_BYTES", 20_000)
    tower = rewritten(tmp_path / "in", OTHER, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.equal(model(input_ids=ids()).logits, tower(ids()).logits) and verify(tmp_path / "out")


def test_passengers_of_any_type_pass(tmp_path):
    gemma(tmp_path / "in")
    file, places = tmp_path / "in" / "model.safetensors", torch.arange(16)
    extra = {"vision_tower.embeddings.position_ids": places, "odd.nan": torch.tensor([float("nan")])}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    rewritten(tmp_path / "in", UNIFORM, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["vision_tower.embeddings.position_ids"], places) and written["odd.nan"].isnan()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"text_config": None}, "text_config"),
        ({"text_config": [1]}, "text_config"),
        ({"text_config": {"model_type": "gpt2"}}, "model_type"),
        ({"text_config": {**TEXT, "model_type": "gemma3_text", "hidden_size": 10**12}}, "hidden_size"),
        ({"architectures": ["Gemma3ForCausalLM"]}, "architectures"),
        ({"model_type": "llava"}, "model_type"),
        ({"model_type": "gemma3_text", "architectures": None}, "checkpoint"),
    ],
)
def test_what_is_odd_is_named(changes, field, tmp_path):
    gemma(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | changes))
    with pytest.raises(InputError) as caught:
        check_checkpoint(tmp_path)
    assert caught.value.field == field


def test_a_wrapper_without_its_tower_is_named(tmp_path):
    gemma(tmp_path)
    save_file(passengers(tmp_path), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="has no tensor model.language_model.embed_tokens.weight"):
        check_checkpoint(tmp_path)

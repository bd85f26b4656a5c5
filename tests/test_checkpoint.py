"""Checkpoints: every family is read as it is, and every kind of bad file gets its one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import TENSOR, edit_header, edit_json, edit_tensors, flip_bit, refusal, tokens
from factories import TINY, config_of, llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ppf import checkpoint
from ppf.checkpoint import Checkpoint, check_checkpoint, fingerprint, load, load_decoder, load_tokenizer, save, verify
from ppf.checkpoint.headers import read_headers
from ppf.errors import InputError
from ppf.families import families
from ppf.model.build import policy_of, pruned_config
from ppf.model.decoder import Decoder
from ppf.model.policy import Policy
from ppf.text import read_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the bundled model that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "source"))


@pytest.fixture
def sharded(source) -> Path:
    """The same model in four shards and an index."""
    model = LlamaForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="1MB")
    assert len(list(source.glob("*.safetensors"))) > 2
    return source


@pytest.mark.parametrize("policy", [None, Policy([3, 0, 3, 0], [64, 16, 0, 0])], ids=["dense", "result"])
@pytest.mark.parametrize("family", families(), ids=lambda family: family.model_type)
def test_every_family_and_its_results_are_sources(family, policy, tmp_path):
    config = config_of(family.model_type)
    model, ids = llama(config if policy is None else pruned_config(config, policy)), torch.randint(0, 256, (2, 20))
    model.save_pretrained(tmp_path)
    opened, loaded = Checkpoint(tmp_path), load(tmp_path)
    assert opened.family is family and type(loaded) is type(model) and opened.passengers == {} == dict(opened.notes)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert policy_of(check_checkpoint(tmp_path)) == policy_of(model.config)
    state = model.state_dict()
    ours, theirs = load_decoder(tmp_path), Decoder.of_model(model)
    assert ours.structure == theirs.structure and ours.outer.keys() == theirs.outer.keys() == opened.outer("cpu").keys()
    for index in range(4):
        layer = opened.layer(index, "cpu", torch.bfloat16)
        assert layer.keys() == ours.layers[index].keys() == theirs.layers[index].keys()
        for name, tensor in layer.items():
            assert torch.equal(tensor, state[f"model.layers.{index}.{name}"].bfloat16())
            assert torch.equal(ours.layers[index][name], theirs.layers[index][name])


def test_dense_model_loads_as_transformers_loads_it():
    model, stock = load(TINY), LlamaForCausalLM.from_pretrained(TINY)
    assert type(model) is LlamaForCausalLM and not model.training and model.dtype == torch.bfloat16
    assert torch.equal(model(tokens()).logits, stock(tokens()).logits)
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert load(TINY, dtype="float32").dtype == load_decoder(TINY, dtype="float32").dtype == torch.float32
    assert load(TINY, dtype=torch.float16).dtype == torch.float16
    opened = Checkpoint(TINY)
    assert opened.decoder("cpu").config.dtype == opened.resolve_dtype() == opened.tensor(TENSOR).dtype == torch.bfloat16
    assert opened.tensor(TENSOR, dtype=torch.float32).dtype == torch.float32


def test_shards_and_rotary_buffers_and_a_stored_tied_head_are_accepted(sharded):
    stock = LlamaForCausalLM.from_pretrained(TINY)
    assert torch.equal(load(sharded)(tokens()).logits, stock(tokens()).logits)
    for file in sharded.glob("model*"):
        file.unlink()
    state = dict(stock.state_dict())
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    for place in ("model.layers.0.self_attn.", "model.layers.7.", "model.", ""):
        state[f"{place}rotary_emb.inv_freq"] = torch.ones(16)
    save_file(state, sharded / "model.safetensors")
    assert torch.equal(load(sharded)(tokens()).logits, stock(tokens()).logits)
    opened = Checkpoint(sharded)
    assert not {"lm_head.weight", "rotary_emb.inv_freq"} & set(opened.stored) and opened.notes == ()


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_taken_as_untied(source, tmp_path):
    assert load(TINY).config.tie_word_embeddings

    def change(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"] * 2

    edit_tensors(source, change)
    with pytest.warns(UserWarning, match="taken as not tied"):
        model = load(source)
    # So does transformers, and so does what we write of it.
    stock = AutoModelForCausalLM.from_pretrained(source)(tokens()).logits
    assert torch.equal(model(tokens()).logits, stock)
    assert not torch.equal(stock, load(TINY)(tokens()).logits)
    save(model, None, tmp_path / "out", {})
    assert torch.equal(load(tmp_path / "out")(tokens()).logits, stock)
    with pytest.warns(UserWarning):
        assert "taken as not tied" in Checkpoint(source).notes[0]
    with pytest.warns(UserWarning):
        assert not load_decoder(source).config.tie_word_embeddings


def test_tokenizer_loads_and_round_trips():
    tokenizer = load_tokenizer(TINY)
    assert tokenizer.decode(tokenizer("Once upon a time", add_special_tokens=False).input_ids) == "Once upon a time"


def test_fingerprint_follows_weights_and_geometry_only(source, sharded):
    original = fingerprint(TINY)
    assert len(original) == 64 and fingerprint(sharded) != original
    copy = Path(shutil.copytree(TINY, source.parent / "copy"))
    edit_json(copy / "config.json", eos_token_id=5)
    assert fingerprint(copy) == original
    edit_json(copy / "config.json", rms_norm_eps=1e-6)
    assert fingerprint(copy) != original
    edit_json(copy / "config.json", rms_norm_eps=1e-5)
    flip_bit(copy / "model.safetensors", -1)
    assert fingerprint(copy) != original


@pytest.mark.parametrize("call", [check_checkpoint, load_decoder, load, load_tokenizer, fingerprint, verify])
def test_no_such_folder(call, tmp_path):
    assert "no such folder" in refusal(call, tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(call, tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": "llama"', "\xff", "[" * 100_000])
def test_config_that_is_not_json(source, text):
    (source / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(check_checkpoint, source)


def test_config_missing(source):
    (source / "config.json").unlink()
    assert "config.json" in refusal(check_checkpoint, source)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, 1_000_000, -1])
def test_truncated_weights(source, keep):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in refusal(check_checkpoint, source)


def test_overlong_weights(source):
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "not fully covered" in refusal(check_checkpoint, source)


def test_every_flipped_header_bit_is_refused_or_harmless(source):
    """Flip single bits all over the header; whatever still passes must describe the very same tensors."""
    file = source / "model.safetensors"
    raw, honest = file.read_bytes(), read_headers(source)
    length, refused, tried = int.from_bytes(raw[:8], "little"), 0, 0
    for position in [*range(8), *range(8, 8 + length, 61)]:
        damaged = bytearray(raw)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        tried += 1
        try:
            check_checkpoint(source)
        except InputError as error:
            refused += 1
            assert str(source) in str(error)
        else:
            assert read_headers(source) == honest, f"byte {position}"
    assert tried > 100 and refused > 0.9 * tried


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e[TENSOR].update(dtype="F16", shape=[128, 128]),
        lambda e: e[TENSOR].update(dtype=["BF16"]),
        lambda e: e[TENSOR].update(shape=[384, -128]),
        lambda e: e[TENSOR].update(shape=[384, 127]),
        lambda e: e[TENSOR].update(shape=None),
        lambda e: e[TENSOR].update(data_offsets=None),
        lambda e: e[TENSOR].update(data_offsets=[0, 98304]),
        lambda e: e[TENSOR].update(data_offsets=[1.0, 2.0]),
        lambda e: e.update({TENSOR: 3}),
    ],
)
def test_damaged_header_entry_names_the_file(source, change):
    edit_header(source, change)
    message = refusal(check_checkpoint, source)
    assert str(source / "model.safetensors") in message and "safetensors refuses it" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.float8_e4m3fn])
def test_other_types_of_weights_are_named(source, dtype):
    edit_tensors(source, lambda state: state.update({TENSOR: state[TENSOR].to(dtype)}))
    message = refusal(check_checkpoint, source)
    assert TENSOR in message and "BF16" in message


def test_header_that_is_no_object(source):
    edit_header(source, lambda entries: [1])
    assert "model.safetensors" in refusal(check_checkpoint, source)


def test_no_weights(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "safetensors" in refusal(check_checkpoint, source)


def test_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(check_checkpoint, sharded) and shard.name in refusal(load, sharded)


def test_index_that_does_not_match_its_shards(sharded):
    index = sharded / "model.safetensors.index.json"
    honest = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(honest.values()))
    other = next(shard for shard in shards if shard != honest[TENSOR])
    for weight_map in (honest | {TENSOR: other}, {k: v for k, v in honest.items() if k != TENSOR}):
        edit_json(index, weight_map=weight_map)
        assert TENSOR in refusal(check_checkpoint, sharded)
    for weight_map in (None, [1], honest | {TENSOR: 3}, honest | {TENSOR: "../model.safetensors"}):
        edit_json(index, weight_map=weight_map)
        assert "index.json" in refusal(check_checkpoint, sharded)


def test_absent_unexpected_and_misshapen_tensors_are_named(source):
    honest = load_file(source / "model.safetensors")
    bias = "model.layers.0.self_attn.q_proj.bias"
    for changes in ({TENSOR: None}, {TENSOR: torch.zeros(383, 128).bfloat16()}, {bias: torch.zeros(128)}):
        state = {name: tensor for name, tensor in (honest | changes).items() if tensor is not None}
        save_file(state, source / "model.safetensors")
        assert next(iter(changes)) in refusal(check_checkpoint, source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_weights_are_named(source, value):
    edit_tensors(source, lambda state: state[TENSOR].__setitem__((380, 5), value))
    check_checkpoint(source)
    for call in (load_decoder, load):
        assert TENSOR in refusal(call, source) and "NaN or Inf" in refusal(call, source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 1, 17, 1000, 1002])
def test_every_place_and_dtype_is_scanned(source, dtype, position):
    def change(state):
        state.update({name: tensor.to(dtype) for name, tensor in state.items()})
        state[TENSOR].view(-1)[-position - 1] = float("nan")

    edit_tensors(source, change)
    assert TENSOR in refusal(load, source)


def test_weights_that_overflow_in_float16(source):
    edit_tensors(source, lambda state: state[TENSOR].__setitem__((0, 0), 1e38))
    assert load(source).dtype == torch.bfloat16
    assert TENSOR in refusal(load, source, dtype="float16")


@pytest.mark.parametrize("dtype", ["int8", "float64", torch.int32, "bf16", None])
def test_unknown_dtype(dtype):
    assert "dtype" in refusal(load, TINY, dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "xpu", ""])
def test_device_that_is_not_there(device):
    for call in (load_decoder, load):
        assert refusal(call, TINY, device=device).startswith("device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_on_a_machine_without():
    assert "sees 0 GPUs" in refusal(load, TINY, device="cuda")
    assert checkpoint.resolve_device("auto") == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_loads_onto_the_gpu():
    model = load(TINY, device="cuda", dtype="float32")
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cuda"}
    on_cpu = load(TINY, dtype="float32")(tokens()).logits
    torch.testing.assert_close(model(tokens().cuda()).logits.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


def test_tokenizer_missing_or_damaged(source):
    (source / "tokenizer.json").write_text('{"model": 3}')
    assert "tokenizer" in refusal(load_tokenizer, source)
    (source / "tokenizer.json").unlink()
    assert "holds no tokenizer files" in refusal(load_tokenizer, source)


def test_tokens_that_the_model_does_not_have_are_refused_where_a_text_yields_them(source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(source)
    loaded, text = load_tokenizer(source), tmp_path / "text.txt"
    text.write_text("Once upon a time")
    assert read_tokens(text, loaded, 2048).tolist() == read_tokens(text, load_tokenizer(TINY)).tolist()
    text.write_text("Once <extra> upon a time")
    assert 2048 in read_tokens(text, loaded).tolist()
    message = refusal(read_tokens, text, loaded, 2048)
    assert "2048" in message and "<extra>" in message and "2047" in message

"""Checkpoints: every kind of bad input gets its one clear error, and nothing is ever half-written."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from ppf import checkpoint, files
from ppf.checkpoint import Checkpoint, check_checkpoint, fingerprint, load, load_decoder, load_tokenizer, save, verify
from ppf.errors import InputError
from ppf.families import families
from ppf.model.build import build, expected_tensors, policy_of, pruned_config
from ppf.model.classes import stock_classes
from ppf.model.decoder import Decoder
from ppf.model.policy import Policy
from ppf.text import read_tokens

TINY = Path(__file__).parents[1] / "ppf" / "data" / "tiny-2m"
POLICY = Policy([2, 0, 1, 2, 0, 1, 2, 1], [384, 64, 0, 128, 0, 256, 384, 7])
TENSOR = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small run several times slower when threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def pruned():
    return cut(POLICY)


def cut(policy: Policy, folder: Path = TINY):
    """A model cut to the first units of every sub-layer, with its generation config."""
    dense = load(folder)
    config = pruned_config(dense.config, policy)
    state = dense.state_dict()
    kept = {n: state[n][tuple(slice(size) for size in shape)] for n, shape in expected_tensors(config).items()}
    return build(config, {n: t.contiguous() for n, t in kept.items()}, dense.dtype, dense.generation_config)


def tokens() -> torch.Tensor:
    return torch.randint(0, 2048, (2, 40), generator=torch.Generator().manual_seed(0))


def edit_json(file: Path, **changes) -> None:
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def edit_tensors(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_header(folder: Path, change) -> None:
    """Rewrite the header of model.safetensors by ``change(entries)``, leaving the data alone."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    entries = change(entries) or entries
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def refusal(call, *arguments, **options) -> str:
    """The message of the ``InputError`` that ``call`` must raise."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert caught.value.field and caught.value.remedy
    return str(caught.value)


def write_family(family, folder: Path, policy: Policy | None = None) -> torch.nn.Module:
    """A tiny random model of a family, dense or pruned to ``policy``, saved by transformers."""
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 128}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = stock_classes(family)["Config"](**sizes, **ids)
    if policy is not None:
        config = pruned_config(config, policy)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in expected_tensors(config).items()}
    model = build(config, state, torch.float32)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("policy", [None, Policy([3, 0, 3, 0], [32, 16, 0, 0])], ids=["dense", "result"])
@pytest.mark.parametrize("family", families(), ids=lambda family: family.model_type)
def test_every_family_and_its_results_are_sources(family, policy, tmp_path):
    model = write_family(family, tmp_path, policy)
    opened, loaded, ids = Checkpoint(tmp_path), load(tmp_path), torch.randint(3, 64, (2, 20))
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


def flip_bit(file: Path, position: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)


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
    from ppf.checkpoint.headers import read_headers

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


def test_saved_result_loads_everywhere_and_verifies(pruned, tmp_path):
    out = tmp_path / "new" / "out"
    save(pruned, load_tokenizer(TINY), out, {"ratio": 0.5})
    report = json.loads((out / "ppf.json").read_text())
    assert report["ratio"] == 0.5
    assert set(report["files"]) == {file.name for file in out.iterdir()} - {"ppf.json"}
    assert verify(out) and not verify(TINY)
    for model in (load(out), AutoModelForCausalLM.from_pretrained(out)):
        assert type(model).__name__ == "PPFLlamaForCausalLM" and policy_of(model.config) == POLICY
        assert torch.equal(model(tokens()).logits, pruned(tokens()).logits)
        assert model.generation_config.eos_token_id == 1
    assert load_tokenizer(out)("abc").input_ids == load_tokenizer(TINY)("abc").input_ids
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert {oct(file.stat().st_mode & 0o777) for file in out.iterdir()} == {oct(out.stat().st_mode & 0o666)}


def test_tokenizer_of_a_result_loads_without_ppf(pruned, tmp_path):
    save(pruned, load_tokenizer(TINY), tmp_path / "out", {})
    code = "import sys; from transformers import AutoTokenizer as A; print(len(A.from_pretrained(sys.argv[1])))"
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, cwd="/")
    assert result.stdout.strip() == "2048", result.stderr


@pytest.mark.parametrize("policy", [POLICY, Policy([1] * 8, [64] * 8)], ids=["non-uniform", "uniform"])
def test_results_are_pruned_again(policy, tmp_path):
    save(cut(policy), None, tmp_path / "once", {})
    again = Policy([min(width, 1) for width in policy.attention], [width // 2 for width in policy.ffn])
    save(cut(again, tmp_path / "once"), None, tmp_path / "twice", {})
    model = load(tmp_path / "twice")
    assert policy_of(model.config) == policy_of(check_checkpoint(tmp_path / "twice")) == again
    assert torch.equal(model(tokens()).logits, cut(again)(tokens()).logits)


def test_flipped_weight_bit_in_a_result_is_found(pruned, tmp_path):
    save(pruned, None, tmp_path / "out", {})
    flip_bit(tmp_path / "out" / "model.safetensors", -2)
    for call in (verify, load, load_decoder):
        message = refusal(call, tmp_path / "out")
        assert "model.safetensors" in message and "changed since PPF wrote it" in message and "ppf.json" in message
    (tmp_path / "out" / "model.safetensors").unlink()
    assert "does not exist" in refusal(verify, tmp_path / "out")
    edit_json(tmp_path / "out" / "ppf.json", files={})
    (tmp_path / "out" / "model.safetensors").write_bytes(b"x")
    assert "not listed" in refusal(verify, tmp_path / "out")
    edit_json(tmp_path / "out" / "ppf.json", files=["x"])
    assert "ppf.json" in refusal(verify, tmp_path / "out")


def test_a_result_that_was_trained_is_opened_once_its_hashes_are_gone(pruned, tmp_path):
    save(pruned, None, tmp_path / "out", {"ratio": 0.5})
    with torch.no_grad():
        pruned.model.norm.weight.mul_(1.5)
    pruned.save_pretrained(tmp_path / "out")
    assert "if you trained or edited it, remove" in refusal(load, tmp_path / "out")
    edit_json(tmp_path / "out" / "ppf.json", files=...)
    assert not verify(tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")(tokens()).logits, pruned(tokens()).logits)


def test_generation_settings_that_transformers_would_not_write_pass_through(source, tmp_path):
    """Vicuna's: a temperature without do_sample."""
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}
    (source / "generation_config.json").write_text(json.dumps(settings | {"transformers_version": "4.29.2"}))
    with pytest.raises(ValueError, match="Fix these issues"):
        load(source).generation_config.save_pretrained(tmp_path)
    model = cut(POLICY, source)
    save(model, None, tmp_path / "out", {})
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: value for name, value in written.items() if name != "transformers_version"} == settings
    assert model.generation_config.temperature == load(tmp_path / "out").generation_config.temperature == 0.9
    assert GenerationConfig.from_pretrained(tmp_path / "out").top_p == 0.6


def test_existing_output_is_kept_unless_forced(pruned, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert "force" in refusal(save, pruned, None, out, {})
    assert [file.name for file in out.iterdir()] == ["precious"]
    save(pruned, None, out, {}, force=True)
    assert verify(out) and not (out / "precious").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_empty_folder_is_filled_and_a_file_is_refused(pruned, tmp_path):
    (tmp_path / "empty").mkdir()
    save(pruned, None, tmp_path / "empty", {})
    assert verify(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        assert "is a file" in refusal(save, pruned, None, path, {}, force=True)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")]
)
def test_failed_save_leaves_nothing_behind(pruned, tmp_path, monkeypatch, failure, existing):
    out = tmp_path / "new" / "out"
    if existing:
        out.mkdir(parents=True)
        (out / "precious").write_text("x")

    def fail(folder, *_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(pruned, "save_pretrained", fail)
    expected = InputError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        save(pruned, None, out, {}, force=True)
    left = [str(file.relative_to(tmp_path)) for file in sorted(tmp_path.rglob("*"))]
    assert left == (["new", "new/out", "new/out/precious"] if existing else [])


def test_too_small_disk_is_refused_before_writing(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    message = refusal(save, pruned, None, tmp_path / "out", {})
    assert "no space left" in message and "MB needed" in message
    assert list(tmp_path.iterdir()) == []


def test_full_disk_under_safetensors(pruned, tmp_path):
    """A real file system of 1 MB: safetensors reports a full disk in an error class of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint.writing, "require_space", lambda *_: None)
            assert "no space left" in refusal(save, pruned, None, disk / "out", {})
        assert list(disk.iterdir()) == []
        assert "MB needed" in refusal(save, pruned, None, disk / "out", {})
    finally:
        subprocess.run(["umount", disk], check=True)

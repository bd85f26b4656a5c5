"""Files of weights whose headers are hostile: refused at once and in little memory, whatever they count."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path

import pytest
from test_hostile import POLICY, change, refusal, within_a_second, write

from ppf.checkpoint import check_checkpoint, local_folder
from ppf.checkpoint.gguf_bounds import outline
from ppf.errors import InputError

SHARDS = "model.safetensors.index.json"


def with_header(folder: Path, entries: dict, size: int = 0) -> Path:
    """``folder`` with a file of weights of ``entries`` and ``size`` bytes that take no room on the disk."""
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return folder


def tensors(shapes: dict[str, list[int]]) -> tuple[dict, int]:
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return entries, at


def around(layers: dict[str, list[int]]) -> dict[str, list[int]]:
    return {"model.embed_tokens.weight": [64, 48], "model.norm.weight": [48]} | layers


def test_headers_longer_than_those_of_models_are_not_parsed(tmp_path):
    names = {f"model.layers.0.{'x' * 1000}{index}": [0] for index in range(9_000)}
    assert "header" in str(refusal(with_header(write(tmp_path), *tensors(names))))


def test_layers_are_counted_before_they_are_made(tmp_path):
    many = {f"model.layers.{layer}.x": [1] for layer in range(1_500)}
    folder = with_header(write(tmp_path, num_hidden_layers=1_500), *tensors(around(many)))
    assert refusal(folder).field == "num_hidden_layers"


def test_layers_without_tensors_are_bounded_too(tmp_path):
    gone = {"num_attention_heads": 0, "num_key_value_heads": 0, "intermediate_size": 0}
    layers = {str(layer): gone for layer in range(1_500)}
    error = refusal(write(tmp_path, policy=POLICY, num_hidden_layers=1_503, per_layer_config=layers))
    assert error.field == "num_hidden_layers"


def test_empty_tensors_say_nothing_about_widths(tmp_path):
    wide = {f"model.layers.{layer}.x": [10**12, 0] for layer in range(3)}
    folder = with_header(write(tmp_path, head_dim=10**9), *tensors(around(wide)))
    assert "contradicts the weights" in str(refusal(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"x": [[] for _ in range(20_000)]},
        {f"x{index}": index for index in range(11_000)},
        {"eos_token_id": [1] * 20_000},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 50_000}},
        {"id2label": {str(index): "x" for index in range(20_000)}},
    ],
    ids=["lists", "fields", "tokens", "factors", "labels"],
)
def test_a_configuration_has_no_more_values_than_any(changes, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "more than 10,000 values" in str(refusal(change(write(tmp_path), **changes)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_shards_are_counted(tmp_path):
    (write(tmp_path) / "model.safetensors").unlink()
    (tmp_path / SHARDS).write_text(json.dumps({"weight_map": {f"t{n}": f"m{n}.safetensors" for n in range(20_000)}}))
    assert "files of weights" in str(refusal(tmp_path))


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_long_contexts_that_users_have_are_taken(kind, tmp_path):
    own = (
        {"factor": 4.0} if kind != "longrope" else {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
    )
    rotation = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 32} | own
    assert check_checkpoint(write(tmp_path, rope_parameters=rotation)).rope_parameters["rope_type"] == kind


def test_a_pad_token_beyond_the_vocabulary_is_named(tmp_path):
    error = refusal(write(tmp_path, pad_token_id=64))
    assert error.field == "pad_token_id" and "null" in error.remedy


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(fields: bytes = b"", infos: bytes = b"", counts: tuple[int, int] = (0, 0), version: int = 3) -> bytes:
    """A GGUF file of ``counts``: (tensors, fields)."""
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + fields + infos


def info(shape: list[int], kind: int = 0, offset: int = 0, name: str = "token_embd.weight") -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def array(name: str, kind: int, length: int, content: bytes = b"") -> bytes:
    return text(name) + struct.pack("<IIQ", 9, kind, length) + content


_HUGE = 2**62
_HOSTILE = {
    "another file": b"PK\x03\x04" + bytes(64),
    "empty": b"",
    "only the magic": b"GGUF",
    "old": gguf(version=1),
    "fields": gguf(counts=(0, _HUGE)),
    "tensors": gguf(counts=(_HUGE, 0)),
    "missing fields": gguf(counts=(0, 5)),
    "long name": gguf(struct.pack("<Q", _HUGE), counts=(0, 1)),
    "long array of bytes": gguf(array("x", 0, _HUGE), counts=(0, 1)),
    "array beyond the file": gguf(array("x", 0, 10**6), counts=(0, 1)),
    "long array of strings": gguf(array("x", 8, 10**6, text("a")), counts=(0, 1)),
    "many arrays": gguf(b"".join(array(f"x{n}", 0, 10**6, bytes(10**6)) for n in range(5)), counts=(0, 5)),
    "array of arrays": gguf(array("x", 9, 3, bytes(64)), counts=(0, 1)),
    "unknown type": gguf(text("x") + struct.pack("<I", 99), counts=(0, 1)),
    "alignment 0": gguf(text("general.alignment") + struct.pack("<II", 4, 0), counts=(0, 1)),
    "alignment 3": gguf(text("general.alignment") + struct.pack("<II", 4, 3), counts=(0, 1)),
    "dimensions": gguf(infos=info([1] * 4000), counts=(1, 0)),
    "tensor beyond the file": gguf(infos=info([10**9, 10**9]), counts=(1, 0)),
    "offset beyond the file": gguf(infos=info([4], offset=_HUGE), counts=(1, 0)) + bytes(64),
    "unknown tensor type": gguf(infos=info([4], kind=9999), counts=(1, 0)) + bytes(64),
    "half a block": gguf(infos=info([33], kind=8), counts=(1, 0)) + bytes(640),
    "no size": gguf(infos=info([0]), counts=(1, 0)) + bytes(64),
    "more than its tensors": gguf(infos=info([4]), counts=(1, 0)) + bytes(10**6),
}


@pytest.mark.parametrize("kind", _HOSTILE)
def test_gguf_files_are_looked_through_before_they_are_believed(kind, tmp_path):
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(_HOSTILE[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught, within_a_second():
        local_folder(file)
    assert caught.value.field == "GGUF file" and len(str(caught.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("block_count", "Q", _HUGE), ("block_count", "d", 2.5), ("embedding_length", "q", -8),
        ("rope.freq_base", "f", float("nan")), ("attention.key_length", "Q", 2**40), ("rope.scaling.type", "I", 7),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_gguf_file_states_is_of_its_kind(name, kind, value, tmp_path):
    pytest.importorskip("gguf")
    number = {"Q": 10, "q": 11, "d": 12, "f": 6, "?": 7, "I": 4}[kind]
    stated = {"block_count": ("Q", 1), "embedding_length": ("Q", 8), "attention.head_count": ("Q", 2)}
    stated |= {
        "feed_forward_length": ("Q", 8),
        "context_length": ("Q", 64),
        "attention.layer_norm_rms_epsilon": ("f", 1e-5),
    }
    fields = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    for each, (letter, content) in (stated | {name: (kind, value)}).items():
        code = {"Q": 10, "q": 11, "d": 12, "f": 6, "?": 7, "I": 4}[letter]
        fields += text(f"llama.{each}") + struct.pack(f"<I{letter}", code, content)
    file = tmp_path / "model.gguf"
    count = 1 + len(stated | {name: None})
    file.write_bytes(gguf(fields, info([8, 16]), (1, count)) + bytes(1024))
    assert outline(file).shapes == {"token_embd.weight": (16, 8)} and number
    with pytest.raises(InputError, match=name):
        local_folder(file)

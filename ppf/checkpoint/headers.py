"""What safetensors files say they hold, checked against what is there, without reading any weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import InputError

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of the tensor types that PPF reads."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # the format's own limit
_REMEDY = "The file is damaged: get it again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, and shape and dtype ("BF16") as the header gives them."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * BYTES[self.dtype]


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, by name; one file or the shards of its index.

    Raises ``InputError`` naming the file, and the tensor where there is one, if a file is missing, truncated or has
    a damaged header, or if the index does not match its shards.
    """
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    remedy = f"Put {WEIGHTS}, or {INDEX} and its shards, there; convert .bin files with save_pretrained()"
    raise InputError("checkpoint", folder, "holds no safetensors weights", remedy)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name; raises as :func:`read_headers` does."""
    return sorted({tensor.file for tensor in read_headers(folder).values()})


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name. Raises ``InputError`` if the file is truncated or damaged."""
    size, header = _raw_header(file)
    length, entries = len(header), _parse(file, header)
    tensors, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: _offsets(file, *item)):
        tensors[name], end = _check_entry(file, name, entry, end)
    if end != size - 8 - length:
        problem = f"has {size - 8 - length} bytes of data where its header describes {end}"
        raise InputError("safetensors file", file, problem, _REMEDY)
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``. Raises ``InputError`` if it is missing or holds anything else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("file", file, "does not exist", "Name a complete Hugging Face folder") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError("file", file, f"is not valid JSON ({error})", _REMEDY) from None
    if not isinstance(data, dict):
        raise InputError("file", file, "holds no JSON object", _REMEDY)
    return data


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise InputError("file", folder / INDEX, "has no weight_map from tensor to file names", _REMEDY)
    headers = {shard: _read_shard(folder, shard) for shard in sorted(set(where.values()))}
    for name, shard in where.items():
        if name not in headers[shard]:
            file = folder / shard
            raise InputError("safetensors file", file, f"lacks tensor {name}, which {INDEX} puts there", _REMEDY)
    for shard, header in headers.items():
        for name in header:
            if where.get(name) != shard:
                raise InputError("safetensors file", folder / shard, f"tensor {name} is not in {INDEX}", _REMEDY)
    return {name: headers[shard][name] for name, shard in where.items()}


def _read_shard(folder: Path, shard: str) -> dict[str, StoredTensor]:
    if Path(shard).name != shard:
        raise InputError("file", folder / INDEX, f"names {shard!r}, a file outside the folder", _REMEDY)
    if not (folder / shard).is_file():
        raise InputError("shard", folder / shard, f"is named in {INDEX} but does not exist", "Get the missing file")
    return read_header(folder / shard)


def _raw_header(file: Path) -> tuple[int, bytes]:
    """Size of the file in bytes, and its header without the eight bytes of its length."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size >= 8 and length <= min(size - 8, _LONGEST_HEADER):
                return size, stream.read(length)
    except OSError as error:
        raise InputError("safetensors file", file, f"cannot be read ({error.strerror})", "Make it readable") from None
    problem = f"its header length {length} does not fit the file of {size} bytes"
    raise InputError("safetensors file", file, problem, _REMEDY)


def _parse(file: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError("safetensors file", file, f"its header is not valid JSON ({error})", _REMEDY) from None
    if not isinstance(entries, dict):
        raise InputError("safetensors file", file, "its header is no JSON object", _REMEDY)
    entries.pop("__metadata__", None)
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _offsets(file: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _naturals(offsets) or len(offsets) != 2:
        raise InputError("safetensors file", file, f"tensor {name} has no valid data_offsets", _REMEDY)
    return offsets[0], offsets[1]


def _check_entry(file: Path, name: str, entry: dict[str, Any], start: int) -> tuple[StoredTensor, int]:
    """The tensor of ``entry``, which must begin at ``start``, and where it ends."""
    dtype, shape = entry.get("dtype"), entry.get("shape")
    begin, end = _offsets(file, name, entry)
    if not isinstance(dtype, str) or dtype not in BYTES:
        remedy = f"Use weights in one of {list(BYTES)}, not quantised"
        raise InputError("safetensors file", file, f"tensor {name} has type {dtype}", remedy)
    if not _naturals(shape):
        raise InputError("safetensors file", file, f"tensor {name} has no valid shape", _REMEDY)
    if begin != start or end - begin != prod(shape) * BYTES[dtype]:
        problem = f"tensor {name}, {dtype} {shape}, cannot lie at bytes {begin} to {end}"
        raise InputError("safetensors file", file, problem, _REMEDY)
    return StoredTensor(file, dtype, tuple(shape)), end


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

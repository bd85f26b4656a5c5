"""A checkpoint folder and what its safetensors files say they hold, without reading any weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import InputError

REPORT = "ppf.json"
"""The report beside the weights of everything PPF writes."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
READ = "F32", "F16", "BF16"
"""The tensor types that PPF computes with."""

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_REMEDY = "The file is damaged: get it again"
# Far above any real configuration or index, and small enough to be parsed in a second.
_LARGEST_JSON = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file and its name there; shape and dtype ("BF16") as the header gives them."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    name: str

    @property
    def bytes(self) -> int:
        return prod(self.shape) * _BYTES.get(self.dtype, 1)


def existing_folder(path: str | Path) -> Path:
    """``path`` as a folder that exists; raises ``InputError``."""
    folder = Path(path)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        remedy = "Name a folder with config.json, org/name on the hub, or a .gguf file"
        raise InputError("checkpoint", folder, problem, remedy)
    return folder


def require_weights(folder: Path) -> None:
    """Raise ``InputError``, with what can be done, for a folder that holds something else instead of safetensors
    weights: an adapter, pickled weights or GGUF files."""
    if any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return
    if (folder / "adapter_config.json").is_file():
        said = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        problem = f"holds an adapter of {said}, not a model" if said else "holds an adapter, not a model"
        remedy = (
            "Merge it: peft.AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload(), then save_pretrained"
        )
        raise InputError("checkpoint", folder, problem, f"{remedy}(FOLDER), and name that folder")
    if pickled := sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")):
        problem = f"holds pickled weights ({pickled[0]}), which PPF does not open, and no safetensors"
        remedy = "Open it in transformers, save_pretrained(FOLDER), and name that folder"
        raise InputError("checkpoint", folder, problem, remedy)
    if found := sorted(folder.glob("*.gguf")):
        problem = "is a folder with GGUF files, and holds no safetensors"
        raise InputError("checkpoint", folder, problem, f"Name one of them, such as {found[0]}")


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, by their names on disk; one file or the shards of its index.

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
    try:
        with safe_open(file, framework="np") as reader:  # "pt" maps files only as far as they would fit into memory
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118  (no mapping)
            return {name: StoredTensor(file, s.get_dtype(), tuple(s.get_shape()), name) for name, s in slices.items()}
    except SafetensorError as error:  # it checks lengths, offsets, shapes and types against each other
        raise InputError("safetensors file", file, f"safetensors refuses it ({error})", _REMEDY) from None
    except OSError as error:
        raise InputError("safetensors file", file, f"cannot be read ({error})", "Make it readable") from None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``. Raises ``InputError`` if it is missing, huge, or holds anything else."""
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise InputError("file", file, f"is larger than {_LARGEST_JSON >> 20} MiB", "Name a Hugging Face folder")
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("file", file, "does not exist", "Name a complete Hugging Face folder") from None
    except InputError:
        raise
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

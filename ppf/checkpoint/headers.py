"""A checkpoint folder and what its safetensors files say they hold, without reading any weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..storage.checksums import checksum
from ..storage.schemas import read_as, require_file

REPORT = "ppf.json"
"""The report beside the weights of everything PPF writes."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
READ = "F32", "F16", "BF16"
"""The tensor types that PPF computes with."""

PLAIN = {"format": "pt"}
"""The metadata of weights that others write, and of those that PPF writes as others would."""
CONTENT = "content"
"""The field of the metadata of a result's weights that holds a checksum of the file's tensors."""

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_REMEDY = "The file is damaged: get it again"
SETTINGS_BYTES = 1 << 20
"""More than any configuration has, and little enough to be looked through at once."""
# The same for headers, of one file and of all shards together: some 100 bytes a tensor.
_LARGEST_HEADER = 8 << 20
_MOST_SHARDS = 10_000


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
    with _opened(file) as reader:
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118  (no mapping)
        return {name: StoredTensor(file, s.get_dtype(), tuple(s.get_shape()), name) for name, s in slices.items()}


def mark(content: str) -> dict[str, str]:
    """The metadata of the weights of results; see :mod:`ppf.checkpoint.report`."""
    return PLAIN | {"written_by": "ppf", CONTENT: content}


def is_marked(file: Path) -> bool:
    """Whether the metadata of a safetensors file are more than others write. Not: exactly those that PPF writes. One
    flipped bit must not make a damaged file look like one that somebody else wrote."""
    return not read_metadata(file).keys() <= PLAIN.keys()


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, which may have none. Raises ``InputError`` as :func:`read_header` does."""
    with _opened(file) as reader:
        return reader.metadata() or {}


def header_checksums(folder: Path) -> dict[str, str]:
    """{name: XXH3-128 of its header} of every safetensors file in ``folder``. Raises ``InputError`` for a file that
    cannot be read, or has a longer header than any model."""
    return {file.name: _header_checksum(file) for file in safetensors_files(folder)}


def safetensors_files(folder: Path) -> list[Path]:
    """All that are in ``folder``, whether its model needs them or not, sorted by name."""
    return [file for file in sorted(folder.glob("*.safetensors")) if file.is_file()]


def read_json(file: Path, largest: int = 16 << 20, remedy: str = _REMEDY) -> dict[str, Any]:
    """The JSON object in ``file``. Raises ``InputError`` if it is missing, of more than ``largest`` bytes, or holds
    anything else; ``remedy`` is what to do about that."""
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise InputError("file", file, "does not exist", "Name a complete Hugging Face folder") from None
    except OSError as error:
        raise _unreadable("file", file, error) from None
    if size > largest:
        raise InputError("file", file, f"is larger than {largest >> 20} MiB", "Name a Hugging Face folder")
    require_file("file", file, remedy)
    return read_as(dict[str, Any], "file", file, remedy)


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    _require_header(file)
    try:
        with safe_open(file, framework="np") as reader:  # "pt" maps files only as far as they would fit into memory
            yield reader
    except SafetensorError as error:  # it checks lengths, offsets, shapes and types against each other
        raise InputError("safetensors file", file, f"safetensors refuses it ({error})", _REMEDY) from None
    except OSError as error:
        raise _unreadable("safetensors file", file, error) from None


def _require_header(file: Path) -> None:
    """Raise ``InputError`` for a header that would take long to parse, before it is."""
    if (length := _header_bytes(file)) > _LARGEST_HEADER:
        problem = f"says that its header has {length:,} bytes, and those of models have less than {_LARGEST_HEADER:,}"
        raise InputError("safetensors file", file, problem, _REMEDY)


def _header_checksum(file: Path) -> str:
    _require_header(file)
    try:
        with file.open("rb") as stream:
            length = stream.read(8)
            return checksum(length, stream.read(int.from_bytes(length, "little")))
    except OSError as error:
        raise _unreadable("safetensors file", file, error) from None


def _header_bytes(file: Path) -> int:
    """The length that a safetensors file gives for its header."""
    try:
        with file.open("rb") as stream:
            return int.from_bytes(stream.read(8), "little")
    except OSError as error:
        raise _unreadable("safetensors file", file, error) from None


def _unreadable(field: str, file: Path, error: OSError) -> InputError:
    remedy = "Get the right to read it" if isinstance(error, PermissionError) else "Make it readable"
    return InputError(field, file, f"cannot be read ({error.strerror or error})", remedy)


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise InputError("file", folder / INDEX, "has no weight_map from tensor to file names", _REMEDY)
    headers = {shard: _read_shard(folder, shard) for shard in _few_shards(folder, where)}
    for name, shard in where.items():
        if name not in headers[shard]:
            file = folder / shard
            raise InputError("safetensors file", file, f"lacks tensor {name}, which {INDEX} puts there", _REMEDY)
    for shard, header in headers.items():
        for name in header:
            if where.get(name) != shard:
                raise InputError("safetensors file", folder / shard, f"tensor {name} is not in {INDEX}", _REMEDY)
    return {name: headers[shard][name] for name, shard in where.items()}


def _few_shards(folder: Path, where: Mapping[str, str]) -> list[str]:
    """The shards in ``where``. Raises ``InputError`` for more, or longer headers, than any model has."""
    shards = sorted(set(where.values()))
    if len(shards) > _MOST_SHARDS:
        raise InputError("file", folder / INDEX, f"names {len(shards):,} files of weights", _REMEDY)
    inside = [folder / shard for shard in shards if Path(shard).name == shard and (folder / shard).is_file()]
    if (together := sum(map(_header_bytes, inside))) > _LARGEST_HEADER:
        problem = f"has shards with headers of {together:,} bytes, and models have less than {_LARGEST_HEADER:,}"
        raise InputError("file", folder / INDEX, problem, _REMEDY)
    return shards


def _read_shard(folder: Path, shard: str) -> dict[str, StoredTensor]:
    if Path(shard).name != shard:
        raise InputError("file", folder / INDEX, f"names {shard!r}, a file outside the folder", _REMEDY)
    if not (folder / shard).is_file():
        raise InputError("shard", folder / shard, f"is named in {INDEX} but does not exist", "Get the missing file")
    return read_header(folder / shard)

"""Weights to safetensors files as they come: planned beforehand, and a file is written once all of it is there."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from ..errors import PPFError
from ..storage.files import write_json
from .headers import INDEX, PLAIN, WEIGHTS, mark

# Where a file's metadata stand: behind the header's length and its first field's name.
_METADATA_AT = 8 + len('{"__metadata__":')

SHARD_BYTES = 5 * 10**9
"""The most that one file of weights holds: so much of a model is in memory while it is written."""


def planned(sizes: Mapping[str, int], limit: int = SHARD_BYTES) -> dict[str, str]:
    """The file of every tensor, by the bytes of all of them in the order in which they will come.

    One ``model.safetensors`` if it takes no more than ``limit`` bytes, else shards, numbered as Hugging Face numbers
    them, which are filled in this order; a tensor beyond ``limit`` has one to itself.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return dict.fromkeys(sizes, WEIGHTS)
    stem, count = WEIGHTS.removesuffix(".safetensors"), len(shards)
    return {
        name: f"{stem}-{number:05d}-of-{count:05d}.safetensors"
        for number, names in enumerate(shards, 1)
        for name in names
    }


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    tensors: Iterable[tuple[str, Tensor]],
    limit: int = SHARD_BYTES,
    marked: bool = True,
) -> None:
    """Write ``tensors`` into ``folder``, and an index if there are several files.

    ``sizes`` are the bytes of all of them. If they come in that order, what is held on the host is one file's tensors;
    any other order is right too, and holds more. Every file is ``marked`` as a result's, or is as others write them.
    Raises ``PPFError`` for tensors that are not those of ``sizes``.
    """
    files = planned(sizes, limit)
    expected, missing = dict(sizes), Counter(files.values())
    held: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        if expected.pop(name, None) != tensor.nbytes:
            raise PPFError(f"the tensor {name} of {tensor.nbytes:,} bytes is not one that was to be written")
        file = files[name]
        held[file][name] = _on_host(tensor)
        del tensor  # what comes next may need its room
        missing[file] -= 1
        if not missing[file]:
            _write(folder / file, held.pop(file), marked)
    if expected:
        raise PPFError(f"the tensor {next(iter(expected))} was to be written and did not come")
    if len(missing) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files})


def _write(file: Path, tensors: dict[str, Tensor], marked: bool) -> None:
    metadata = mark(_content(tensors)) if marked else PLAIN
    save_file(tensors, file, metadata=dict(metadata))
    _order_metadata(file, metadata)


def _content(tensors: Mapping[str, Tensor]) -> str:
    """XXH3-128 of the bytes of ``tensors``, in the order of their names, which the file's header tells."""
    state = xxhash.xxh3_128()
    for _, tensor in sorted(tensors.items()):
        state.update(tensor.flatten().view(torch.uint8).numpy())
    return state.hexdigest()


def _order_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Let ``metadata`` stand in the file in their own order: safetensors writes them in any, and equal models shall be
    equal files."""
    with file.open("r+b") as stream:
        stream.seek(_METADATA_AT)
        written = json.dumps(dict(metadata), separators=(",", ":")).encode()
        if json.loads(stream.read(len(written))) != metadata:
            raise PPFError(f"{file} does not begin with its metadata")
        stream.seek(_METADATA_AT)
        stream.write(written)


def _on_host(tensor: Tensor) -> Tensor:
    """Contiguous on the host; a copy if it is a part of something larger, which would stay alive with it."""
    found = tensor.detach().cpu().contiguous()
    return found if found.untyped_storage().nbytes() <= found.nbytes else found.clone()

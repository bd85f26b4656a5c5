"""A GGUF file as a folder: dequantised once, into a cache of this user.

The gguf package knows the file, its blocks and the names of tensors. What llama.cpp's converters do to rows and norms
is undone here, as :mod:`ppf.deliver.export` does it.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import InputError
from ..families import family_of
from ..model.build import LAYERS, expected_tensors
from ..storage.files import write_json
from ..storage.locks import locked_result, waiting
from ..timings import timed
from .checks import check_checkpoint
from .gguf_bounds import DAMAGED, Outline, outline
from .gguf_header import REMEDY, ROPE_FACTORS, Header, config_of
from .gguf_tokenizer import tokenizer_of
from .hashes import sha256_of
from .headers import read_json
from .writing import save_plain

# Beside the file's hash in the name of its folder: what an older PPF made of the file is made again.
_FORMAT = 2
# Beside the weights: which file they came from, and its most common type if that is a quantised one.
_NOTE = "gguf.json"
_FLOAT32, _LARGEST_HEAD = 0, 65_536
_EXACT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def convert(file: Path) -> tuple[Path, str]:
    """The folder that ``file`` was converted into, now or before, and the file's SHA-256.

    It lies in ``$XDG_CACHE_HOME/ppf/gguf`` (``~/.cache/ppf/gguf``) and appears there once it is complete. float32,
    float16 and bfloat16 stay what they are; quantised weights become bfloat16, with a warning that says what that
    means. Raises ``InputError`` if the file is not there, damaged or not complete, of an architecture that PPF does not
    read, or if the gguf package is not installed.
    """
    if not file.is_file():
        raise InputError("model", file, "no such file", "Name a .gguf file, or a folder with config.json")
    config, names = _described(file)
    sha256 = sha256_of(file)
    folder = _cache() / "gguf" / f"{sha256}-{_FORMAT}"
    if not folder.is_dir():
        # Processes of one job begin alike: one converts, the others wait.
        with waiting(True), locked_result(folder, "XDG_CACHE_HOME"):
            if not folder.is_dir():
                _write(file, folder, config, names)
    if kind := read_json(folder / _NOTE)["quantised"]:
        told = f"{file.name} is quantised ({kind}): quality, dense and pruned, is that of the quantised model"
        warnings.warn(f"ppf: {told}", stacklevel=2)
    return folder, sha256


@timed("converting")
def _write(file: Path, folder: Path, config: PreTrainedConfig, names: dict[str, str]) -> None:
    from gguf import dequantize

    reader = _open(file)

    stored = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Tensor:
        try:
            return torch.from_numpy(dequantize(stored[name].data, stored[name].tensor_type).copy()).float()
        except NotImplementedError:
            problem = (
                f"tensor {name} is quantised as {stored[name].tensor_type.name}, which the gguf package cannot undo"
            )
            raise InputError("GGUF file", file, problem, "Use another quantisation of the model") from None

    types = Counter(tensor.tensor_type.name for tensor in stored.values() if len(tensor.shape) > 1)

    def finish(made: Path) -> None:
        quantised = next((name for name, _ in types.most_common() if name not in _EXACT), None)
        write_json(made / _NOTE, {"file": str(file.resolve()), "quantised": quantised})
        check_checkpoint(made)

    save_plain(config, _tensors(config, names, read), _dtype(types), folder, tokenizer_of(file, reader), finish)


def _described(file: Path) -> tuple[PreTrainedConfig, dict[str, str]]:
    """The configuration that ``file`` tells, and transformers' name of every weight → the file's. Reads the metadata
    only, before the gguf package believes them."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        remedy = "pip install 'ppf[gguf]', or pip install gguf"
        raise InputError("model", file, "is a GGUF file, which needs the gguf package", remedy) from None
    found = outline(file)
    header = Header(file, found.fields, found.shapes)
    config = config_of(header, _rope_factors(file, found))
    if (found.tokens or 0) > config.vocab_size:
        problem = f"has {found.tokens:,} tokens and an embedding of {config.vocab_size:,}"
        raise InputError("GGUF file", file, problem, DAMAGED)
    return config, _names(header, config)


def _rope_factors(file: Path, found: Outline) -> Tensor | None:
    """What :data:`ROPE_FACTORS` holds, fp32 [head/2]."""
    if ROPE_FACTORS not in found.shapes:
        return None
    (kind, start), shape = found.places[ROPE_FACTORS], found.shapes[ROPE_FACTORS]
    if kind != _FLOAT32 or len(shape) != 1 or shape[0] > _LARGEST_HEAD:
        raise InputError("GGUF file", file, f"has {ROPE_FACTORS} of type {kind} and shape {list(shape)}", REMEDY)
    return torch.from_numpy(np.fromfile(file, "<f4", shape[0], offset=start))


def _open(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except Exception as error:  # it runs over the end of arrays, of enumerations and of the file
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise InputError("GGUF file", file, f"cannot be read ({said})", "It is damaged or another file") from None


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppf"
    except RuntimeError:  # neither HOME nor an entry for this user
        problem = "is not set, and you have no home: there is no place to convert a GGUF file into"
        raise InputError("XDG_CACHE_HOME", "(none)", problem, "Set it to a folder that you may write") from None


def _dtype(types: Counter[str]) -> torch.dtype:
    """The one that holds all matrices exactly, if that is one of three; for quantised ones bfloat16."""
    kinds = set(types)
    if kinds <= {"F32", "F16", "BF16"} and "F32" in kinds:
        return torch.float32
    return _EXACT[kinds.pop()] if len(kinds) == 1 and kinds <= _EXACT.keys() else torch.bfloat16


def _names(header: Header, config: PreTrainedConfig) -> dict[str, str]:
    """transformers' name of every weight → the file's. Raises ``InputError`` unless they correspond one to one."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(known[header.architecture], config.num_hidden_layers)
    found = {}
    for name, shape in expected_tensors(config).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs not in header.shapes:
            raise InputError("GGUF file", header.file, f"lacks tensor {theirs or name}", "Get a complete file")
        if header.shapes[theirs] != tuple(shape):
            problem = f"tensor {theirs} is {list(header.shapes[theirs])}, and the model needs {list(shape)}"
            raise InputError("GGUF file", header.file, problem, "Get a file that fits its own metadata")
        found[name] = theirs
    if unknown := sorted(header.shapes.keys() - set(found.values()) - {ROPE_FACTORS}):
        problem = f"holds tensor {unknown[0]}, which {config.model_type} in transformers does not have"
        raise InputError("GGUF file", header.file, problem, REMEDY)
    return found


def _tensors(
    config: PreTrainedConfig, names: dict[str, str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every weight, fp32, layer by layer and then what lies outside, as transformers computes with it."""
    one_plus = "one-plus norm" in family_of(config.model_type).traits
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name in sorted(names, key=lambda name: not name.startswith(LAYERS)):
        tensor = read(names[name])
        if one_plus and "norm" in name:
            tensor = tensor - 1
        rows = heads.get(name.split(".")[-2])
        if rows and config.model_type == "llama":
            # llama.cpp rotates row 2j of a head with 2j + 1, transformers row j with j + half.
            tensor = tensor.unflatten(0, (rows, -1, 2)).transpose(1, 2).flatten(0, 2)
        yield name, tensor

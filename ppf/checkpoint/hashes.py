"""SHA-256 of checkpoints: the identity of a source, and proof that a result is what was written."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import InputError, shown
from ..timings import timed
from .contents import read_contents
from .headers import REPORT, header_checksums, is_marked, safetensors_files, weight_files
from .report import CHANGED, GO_ON, HEADERS, read_report, saved_again, write_sealed
from .sources import local_folder

_BLOCK = 4 << 20
_THREADS = 8
# A file system's clock ticks every few milliseconds: of a file written just now, a later change might not show.
_SETTLED = 2_000_000_000
# What was hashed before in this process: a command asks for the same weights several times.
_known: dict[tuple[str, int, int, int, int], str] = {}

# Fields of a configuration that do not change what the weights compute.
_LABELS = {
    *("architectures", "transformers_version", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("initializer_range", "attention_dropout", "return_dict", "output_hidden_states", "is_encoder_decoder"),
    *("id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
}


def sha256_of(file: Path) -> str:
    """Hexadecimal SHA-256 of ``file``, read in blocks of 4 MiB.

    A file that this process has hashed before is not read again while path, inode, size and times are the same.
    """
    return _sha256s([file])[0]


@timed("hashing")
def _sha256s(files: Sequence[Path]) -> list[str]:
    """:func:`sha256_of` every file, several at a time: hashing leaves Python's lock to others."""
    with ThreadPoolExecutor(max_workers=max(1, min(_THREADS, len(files)))) as pool:
        return list(pool.map(_sha256_of, files))


def _sha256_of(file: Path) -> str:
    state = file.stat()
    key = str(file.absolute()), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
    if key not in _known:
        found = _digest(file)
        if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) < _SETTLED:
            return found
        _known[key] = found
    return _known[key]


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: str | Path) -> str:
    """Hexadecimal SHA-256 over what of the config is computed with, and the contents of all weight files.

    Equal for a moved or copied folder, and after edits that do not change the computation (token ids, dtype label);
    different once any weight differs. Raises ``InputError`` for a folder that is no checkpoint.
    """
    folder = local_folder(path)
    digest = hashlib.sha256(json.dumps(_computed(folder), sort_keys=True, default=str).encode())
    files = weight_files(folder)
    for file, found in zip(files, _sha256s(files), strict=True):
        digest.update(f"{file.name} {found}\n".encode())
    return digest.hexdigest()


def _computed(folder: Path) -> dict[str, Any]:
    """What config.json states of the fields that transformers computes with. Stated: defaults that a later version adds
    make no other model. transformers' own form: it knows several for a rotary embedding."""
    contents = read_contents(folder)
    known = {field.name for field in fields(type(contents.config))} | {"per_layer_config", "model_type"}
    stated = (known & set(contents.data) - _LABELS) | {"rope_parameters"}
    return {name: value for name, value in contents.config.to_dict().items() if name in stated}


def hash_folder(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of every file in ``folder`` except its report."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name != REPORT]
    return dict(zip((file.name for file in files), _sha256s(files), strict=True))


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``ppf.json`` beside all else that ``folder`` is to hold: ``report``, and what tells later whether it is
    still that: "files", by :func:`hash_folder`; "headers", those of the weights; and "marked", whether all of these
    carry the mark of those that PPF writes."""
    weights = safetensors_files(folder)
    marked = bool(weights) and all(map(is_marked, weights))
    own = {"files": hash_folder(folder), "marked": marked, HEADERS: header_checksums(folder)}
    write_sealed(folder, {**report, **own})


def verify(path: str | Path) -> bool:
    """True if every file that ``ppf.json`` lists has the recorded SHA-256, False if there are no records, and, with a
    warning, if other software has saved the whole model again since, after training it.

    Raises ``InputError`` naming the first file that is missing or differs.
    """
    folder = local_folder(path)
    report = read_report(folder)
    files = report.get("files")
    if files is None:
        return False
    if any(Path(name).name != name for name in files):
        raise InputError("file", folder / REPORT, "lists files outside its folder", GO_ON)
    if saved_again(folder, report):
        told = f"{shown(folder)} was saved again since PPF wrote it: what {REPORT} says of its weights is out of date"
        warnings.warn(f"ppf: {told}", stacklevel=2)
        return False
    _require_unchanged(folder, files)
    return True


def _require_unchanged(folder: Path, files: Mapping[str, str]) -> None:
    for name in files:
        if not (folder / name).is_file():
            raise InputError("file", folder / name, f"{CHANGED}: listed in {REPORT}, but does not exist", GO_ON)
    found = _sha256s([folder / name for name in files])
    for (name, recorded), sha256 in zip(files.items(), found, strict=True):
        if sha256 != recorded:
            raise InputError("file", folder / name, f"{CHANGED}: not the SHA-256 that {REPORT} records", GO_ON)
    for file in folder.glob("*.safetensors"):
        if file.name not in files:
            raise InputError("file", file, f"{CHANGED}: holds weights but is not listed in {REPORT}", GO_ON)

"""SHA-256 of checkpoints: the identity of a source, and proof that a result is what was written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import InputError
from .contents import read_contents
from .headers import REPORT, existing_folder, read_json, weight_files

_BLOCK = 4 << 20

# Fields of a configuration that do not change what the weights compute.
_LABELS = {
    *("architectures", "transformers_version", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("initializer_range", "attention_dropout", "return_dict", "output_hidden_states", "is_encoder_decoder"),
    *("id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
}


def sha256_of(file: Path) -> str:
    """Hexadecimal SHA-256 of ``file``, read in blocks of 4 MiB."""
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
    folder = existing_folder(path)
    digest = hashlib.sha256(json.dumps(_computed(folder), sort_keys=True, default=str).encode())
    for file in weight_files(folder):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
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
    return {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.is_file() and file.name != REPORT}


def verify(path: str | Path) -> bool:
    """True if every file that ``ppf.json`` lists has the recorded SHA-256, False if there are no records.

    Raises ``InputError`` naming the first file that is missing or differs.
    """
    folder = existing_folder(path)
    if not (folder / REPORT).exists():
        return False
    files = read_json(folder / REPORT).get("files")
    if files is None:
        return False
    remedy = f"If it is damaged, write it again with ppf prune; if you trained or edited it, remove {folder / REPORT}"
    changed = "changed since PPF wrote it:"
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise InputError("file", folder / REPORT, "its list of files is not {name: sha256}", remedy)
    for name, recorded in files.items():
        if not (folder / name).is_file():
            raise InputError("file", folder / name, f"{changed} listed in {REPORT}, but does not exist", remedy)
        if sha256_of(folder / name) != recorded:
            raise InputError("file", folder / name, f"{changed} not the SHA-256 that {REPORT} records", remedy)
    for file in folder.glob("*.safetensors"):
        if file.name not in files:
            raise InputError("file", file, f"{changed} holds weights but is not listed in {REPORT}", remedy)
    return True

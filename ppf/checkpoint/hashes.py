"""SHA-256 of checkpoints: the identity of a source, and proof that a result is what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..errors import InputError
from .checks import REPORT, existing_folder, read_config
from .headers import read_json, weight_files

_BLOCK = 4 << 20

# Everything in config.json that changes what the weights compute.
_GEOMETRY = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "per_layer_config",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
)


def sha256_of(file: Path) -> str:
    """Hexadecimal SHA-256 of ``file``, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: str | Path) -> str:
    """Hexadecimal SHA-256 over the config's geometry and the contents of all weight files.

    Equal for a moved or copied folder, and after edits that do not change the computation (token ids, dtype label);
    different once any weight differs. Raises ``InputError`` for a folder that is no checkpoint.
    """
    folder = existing_folder(path)
    config = read_config(folder).to_dict()
    digest = hashlib.sha256(json.dumps({key: config.get(key) for key in _GEOMETRY}, sort_keys=True).encode())
    for file in weight_files(folder):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


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
    remedy = "The checkpoint is damaged or was edited: write it again with ppf prune"
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise InputError("file", folder / REPORT, "its list of files is not {name: sha256}", remedy)
    for name, recorded in files.items():
        if not (folder / name).is_file():
            raise InputError("file", folder / name, f"is listed in {REPORT} but does not exist", remedy)
        if sha256_of(folder / name) != recorded:
            raise InputError("file", folder / name, f"is not the file whose SHA-256 {REPORT} records", remedy)
    for file in folder.glob("*.safetensors"):
        if file.name not in files:
            raise InputError("file", file, f"holds weights but is not listed in {REPORT}", remedy)
    return True

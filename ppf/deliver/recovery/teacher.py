"""The dense model that a recovery learns from: found through ``ppf.json``, checked to speak the student's language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoint import fingerprint, load_tokenizer, local_folder, recall
from ...checkpoint.checks import read_config
from ...errors import InputError

_REMEDY = "Name the dense model with --teacher DIR, or turn distillation off with --distillation 0"


def find_teacher(
    checkpoint: Path, report: dict[str, Any], given: str | Path | None, distillation: float
) -> Path | None:
    """Folder of the dense model of ``checkpoint``: the ``given`` one, else the one that its ``report`` names; of a
    result of results, the one that all of them came from.

    None if there is no ``distillation``. Raises ``InputError`` if none is named, if the named one is gone or was
    changed since, or if its vocabulary is not the checkpoint's.
    """
    if distillation == 0:
        if given is not None:
            raise InputError("teacher", given, "is not needed with --distillation 0", "Drop one of them")
        return None
    folder = local_folder(given) if given is not None else _recorded(checkpoint, report)
    _require_same_vocabulary(checkpoint, folder)
    return folder


def _recorded(checkpoint: Path, report: dict[str, Any]) -> Path:
    """The dense model at the beginning of the chain that ``report`` tells, each result's source under "source"."""
    while isinstance(report.get("source"), dict):
        report = report["source"]
    model = report.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        raise InputError("teacher", "(none)", f"{checkpoint} does not say which dense model it came from", _REMEDY)
    folder = recall(Path(model["path"]), model.get("source"))
    if not folder.is_dir():
        raise InputError("teacher", folder, f"the dense model that {checkpoint} names is not there", _REMEDY)
    if fingerprint(folder) != model.get("fingerprint"):
        raise InputError("teacher", folder, f"is no longer the model that {checkpoint} came from", _REMEDY)
    return folder


def _require_same_vocabulary(checkpoint: Path, teacher: Path) -> None:
    ours, theirs = read_config(checkpoint).vocab_size, read_config(teacher).vocab_size
    if ours != theirs:
        raise InputError("teacher", teacher, f"has a vocabulary of {theirs}, the checkpoint one of {ours}", _REMEDY)
    if _vocabulary(checkpoint, ours) != _vocabulary(teacher, ours):
        raise InputError("teacher", teacher, "has another tokenizer than the checkpoint", _REMEDY)


def _vocabulary(folder: Path, rows: int) -> dict[str, int]:
    """Token → id, of those that a model with so many rows can read; tokenizers may know more."""
    return {token: number for token, number in load_tokenizer(folder).get_vocab().items() if number < rows}

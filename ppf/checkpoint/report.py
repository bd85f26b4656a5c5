"""``ppf.json``: what PPF says about a folder that it wrote, and whether that still holds.

Weights that PPF writes carry a mark in their headers, which other programs' files do not. So a model that was trained
and saved again in its place is told from one that was damaged: the first has lost the mark, the second its hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..errors import InputError
from ..storage.schemas import convert_to
from .headers import REPORT, is_marked, read_json

CHANGED = "changed since PPF wrote it"
OWN = "files", "marked"
"""What a report says of its own folder only."""
# What is true of the weights as PPF wrote them, and not of what training made of them.
OF_WEIGHTS = "measured", "predicted", "budget", "portable", "tasks", "recovery", "export"


class _Model(msgspec.Struct):
    path: str
    fingerprint: str | None = None
    source: dict[str, Any] | None = None


class _Report(msgspec.Struct):
    """What commands go by."""

    files: dict[str, str] | None = None
    marked: bool = False
    policy: dict[str, Any] | None = None
    structure: dict[str, Any] | None = None
    model: _Model | None = None
    source: dict[str, Any] | None = None


def read_report(folder: Path) -> dict[str, Any]:
    """The ``ppf.json`` in ``folder``, empty if there is none. Raises ``InputError`` for one that is not PPF's."""
    file = folder / REPORT
    if not file.exists():
        return {}
    data = read_json(file)
    remedy = f"If it was not written by PPF, or was edited, remove {file}: the checkpoint works without it"
    convert_to(_Report, "file", file, data, remedy)
    try:
        json.dumps(data, allow_nan=False)
    except ValueError:
        raise InputError("file", file, "holds NaN or infinities, which PPF does not write", remedy) from None
    return data


def saved_again(folder: Path, report: Mapping[str, Any]) -> bool:
    """Whether other software has written all weights in ``folder`` since PPF wrote them and ``report``: what
    ``save_pretrained`` does after training. Reads headers only."""
    files = list(folder.glob("*.safetensors")) if report.get("marked") else []
    return bool(files) and not any(map(_is_of_ppf, files))


def _is_of_ppf(file: Path) -> bool:
    try:
        return is_marked(file)
    except InputError:  # damaged, and nobody writes that
        return True


def standing_report(folder: Path) -> dict[str, Any]:
    """What of :func:`read_report` is still true, without its list of files; ``"saved_again": true`` says that the
    weights were trained or edited since, and that what was measured on them is left out."""
    report = read_report(folder)
    kept = {name: value for name, value in report.items() if name not in OWN}
    if not saved_again(folder, report):
        return kept
    return {name: value for name, value in kept.items() if name not in OF_WEIGHTS} | {"saved_again": True}

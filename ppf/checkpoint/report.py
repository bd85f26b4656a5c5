"""``ppf.json``: what PPF says about a folder that it wrote, and whether that still holds.

It holds a checksum of all that it says, so that no changed figure is believed, and those of the headers of the weights
it was written with. In the headers that PPF writes are a mark, which other programs' files do not have, and a checksum
of the tensors. So another result's report is found without reading weights; and a model that was trained and saved
again in its place is told from one that was damaged: the first has lost the mark, the second its hash.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..errors import InputError, shown
from ..storage.checksums import checksum
from ..storage.files import write_json
from ..storage.schemas import convert_to
from ..storage.sealed import SEAL
from .headers import CONTENT, REPORT, header_checksums, is_marked, read_json, read_metadata, safetensors_files

CHANGED = "changed since PPF wrote it"
GO_ON = (
    f"If you trained or edited it, remove its {REPORT}: what is left is a checkpoint like any other. "
    "If you did not, it is damaged: use another copy"
)
HEADERS = "headers"
OWN = SEAL, "files", "marked", HEADERS
"""What a report says of its own folder only."""
# What is true of the weights as PPF wrote them, and not of what training made of them.
OF_WEIGHTS = "measured", "predicted", "budget", "portable", "tasks", "refit", "elastic", "recovery", "export"


class _Model(msgspec.Struct):
    path: str
    fingerprint: str | None = None
    source: dict[str, Any] | None = None


class _Report(msgspec.Struct):
    """What commands go by."""

    files: dict[str, str] | None = None
    headers: dict[str, str] | None = None
    marked: bool = False
    policy: dict[str, Any] | None = None
    structure: dict[str, Any] | None = None
    model: _Model | None = None
    source: dict[str, Any] | None = None


def read_report(folder: Path) -> dict[str, Any]:
    """The ``ppf.json`` in ``folder``, empty if there is none.

    Raises ``InputError`` for one that is not PPF's, is not as it was written, or belongs to other weights. One of an
    older PPF has no checksum, and is read with a warning.
    """
    file = folder / REPORT
    if not file.exists():
        return {}
    remedy = f"Put back the one that PPF wrote, or remove {file}: the checkpoint works without it"
    data = read_json(file, remedy=remedy)
    if _is_of_older(folder, data):
        told = f"{shown(file)} was written by an older PPF, without a checksum: nobody can tell whether it was changed"
        warnings.warn(f"ppf: {told}", stacklevel=2)
    else:
        require_sealed(file, data, remedy)
    found = convert_to(_Report, "file", file, data, remedy)
    if found.headers is not None and not saved_again(folder, data):
        _require_of_these(folder, found.headers)
    return data


def write_sealed(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``report`` as the ``ppf.json`` in ``folder``, with its checksum. Raises ``ValueError`` for NaN and
    infinities."""
    said = json.loads(json.dumps(dict(report), allow_nan=False))  # as it will be read: numbers as names become texts
    write_json(folder / REPORT, said | {SEAL: _seal(said)})


def require_sealed(file: Path, data: Mapping[str, Any], remedy: str) -> None:
    """Raise ``InputError`` about ``file`` unless ``data``, a report that was read from it, is what was written."""
    try:
        same = data.get(SEAL) == _seal(data)
    except (ValueError, RecursionError):  # NaN, infinities, lists in lists in lists: PPF writes none
        same = False
    if not same:
        raise InputError("file", file, f"does not match its checksum: it was damaged, or {CHANGED}", remedy)


def is_sealed(report: Mapping[str, Any]) -> bool:
    """Whether ``report`` was written with a checksum, so far as it can say so itself."""
    return SEAL in report or HEADERS in report


def _seal(report: Mapping[str, Any]) -> str:
    """XXH3-128 of what a report says, however its JSON is laid out."""
    said = {name: value for name, value in report.items() if name != SEAL}
    return checksum(REPORT, json.dumps(said, allow_nan=False, sort_keys=True))


def _is_of_older(folder: Path, report: Mapping[str, Any]) -> bool:
    """Whether nothing says that ``report`` should have a checksum, neither itself nor the weights beside it."""
    return not is_sealed(report) and not any(map(_has_content, safetensors_files(folder)))


def _has_content(file: Path) -> bool:
    return CONTENT in read_metadata(file)


def _require_of_these(folder: Path, headers: Mapping[str, str]) -> None:
    """Raise ``InputError`` unless the weights in ``folder`` are those with these ``headers``."""
    found = header_checksums(folder)
    for name in sorted(found.keys() | headers.keys()):
        if found.get(name) != headers.get(name):
            how = "does not exist" if name not in found else "is not listed there" if name not in headers else "differs"
            problem = f"is of other weights, or these {CHANGED}: {name} {how}"
            raise InputError("file", folder / REPORT, problem, GO_ON)


def saved_again(folder: Path, report: Mapping[str, Any]) -> bool:
    """Whether other software has written all weights in ``folder`` since PPF wrote them and ``report``: what
    ``save_pretrained`` does after training. Reads headers only."""
    files = safetensors_files(folder) if report.get("marked") else []
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

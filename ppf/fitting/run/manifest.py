"""``run.json``: what it must hold, and how it is written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ...errors import InputError
from ...model.structure import Structure
from ...storage.checksums import checksum
from ...storage.schemas import convert_to
from ...storage.sealed import SEAL, Sealed
from .settings import Settings

MANIFEST, EXPERIENCE = "run.json", "experience.sqlite"
FORMAT = 2
"""Version of a run. Format 1 did not say so, and had no checksums."""

_Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Count = Annotated[int, Meta(ge=0, le=1 << 48)]
_Positive = Annotated[int, Meta(ge=1, le=1 << 48)]
_SubLayers = Annotated[list[tuple[_Count, _Count, _Count, _Positive]], Meta(min_length=1)]
_REMEDY = "Put back a copy of it, or fit into a new folder"


class _Structure(Struct):
    hidden: _Positive
    head_dim: _Positive
    attention: _SubLayers
    ffn: _SubLayers


class _Texts(Struct):
    text: _Sha256 | None
    eval_text: _Sha256 | None
    forms: dict[str, Any] = {}
    own_answers: dict[str, Any] = {}


class _Rows(Struct):
    """How much the experience held, and the checksum of its last row."""

    rows: _Count
    checksum: str


class _Manifest(Struct):
    format: Literal[2]
    model: str
    fingerprint: _Sha256
    structure: _Structure
    settings: dict[str, Any]
    texts: _Texts
    files: dict[str, str | None]
    vocabulary: _Positive
    versions: dict[str, str | None]
    state: Literal["fitting", "complete"]
    source: dict[str, str] | None = None
    read_as: dict[str, Any] = {}
    own_answers: dict[str, Any] = {}
    model_files: dict[str, _Sha256] = {}
    device: str | None = None
    seconds: Annotated[float, Meta(ge=0)] | None = None
    timings: dict[str, float] = {}
    seals: dict[str, str] = {}
    experience: _Rows | None = None
    elastic: dict[str, Any] | None = None
    rankings: dict[str, list[str | None]] = {}


def sealed(run: Path, manifest: dict[str, Any]) -> Sealed:
    """The files of a run beside its manifest. They belong to a question, so that equal fits leave equal files."""
    return Sealed(run, owner_of(manifest), "run", _REMEDY, manifest.get("seals"))


def owner_of(manifest: dict[str, Any]) -> str:
    """What tells the files of one question from those of another."""
    question = {name: manifest[name] for name in ("fingerprint", "structure", "settings", "texts")}
    return checksum(msgspec.json.encode(question, order="sorted"))


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a run and not a checkpoint, though its manifest be missing."""
    return any((folder / name).exists() for name in (MANIFEST, EXPERIENCE))


def in_memory(manifest: dict[str, Any]) -> bool:
    """Whether the run holds its dense model itself: it was fitted on one in memory, or trained it."""
    return (manifest.get("source") or {}).get("kind") in ("memory", "recovered")


def write_manifest(run: Path, manifest: dict[str, Any]) -> None:
    """Write ``run.json``, atomically."""
    _file(run).write_json(MANIFEST, {"format": FORMAT} | manifest)


def read_manifest(run: Path) -> dict[str, Any]:
    """The contents of ``run.json``.

    Raises ``InputError`` if ``run`` is not a run, if the file is damaged or may not be read, and for a run of an older
    PPF; of what does not fit it names the field.
    """
    if not _may_be_there(run):
        raise InputError("run", run, "no such folder", "Give a folder that `ppf fit --output` made")
    if not _may_be_there(run / MANIFEST):
        raise InputError("run", run, f"has no {MANIFEST}", "Give a folder that `ppf fit --output` made")
    file = _file(run)
    try:
        manifest = file.read_json(MANIFEST, dict[str, Any])
    except InputError:
        _require_sealed(run)
        raise
    convert_to(_Manifest, "run", run / MANIFEST, manifest, _REMEDY)
    _require_possible(run, manifest)
    return manifest


def _may_be_there(path: Path) -> bool:
    """False if there is nothing at ``path``; True where the system does not tell: reading it will say why."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _file(run: Path) -> Sealed:
    return Sealed(run, "", "run", _REMEDY)


def _require_sealed(run: Path) -> None:
    """Raise ``InputError`` for a run that was made before there were checksums. A damaged one has lost one of two
    fields, never both."""
    try:
        data = msgspec.json.decode((run / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(data, dict) and "fingerprint" in data and not {SEAL, "format"} & set(data):
        problem = "was fitted by an older PPF, whose runs have no checksums"
        raise InputError("run", run, problem, "Fit into a new folder, or use the PPF that fitted it")


def _require_possible(run: Path, manifest: dict[str, Any]) -> None:
    """Raise ``InputError`` for settings and structures that no fit has."""
    structure = manifest["structure"]
    if len(structure["attention"]) != len(structure["ffn"]):
        problem = "its structure has kinds of sub-layer that differ in their number of layers"
        raise InputError("run", run / MANIFEST, problem, _REMEDY)
    for kind in ("attention", "ffn"):
        for index, (units, cost, columns, step) in enumerate(structure[kind]):
            if units and (not cost or not columns or units % step):
                problem = f"structure.{kind}[{index}] = {[units, cost, columns, step]} is not a sub-layer"
                raise InputError("run", run / MANIFEST, problem, _REMEDY)
    try:
        Settings.from_dict(manifest["settings"]).grid(Structure.from_dict(structure))
    except InputError as error:
        problem = f"settings: {error.field} = {error.value!s} {error.problem}"
        raise InputError("run", run / MANIFEST, problem, error.remedy) from None

"""What a user may name as a model: a folder, a repository of a hub, or a GGUF file. Each becomes a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .headers import existing_folder

_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>.+))?")
# What was found before in this process: a command asks for the same model several times, and must get the same one.
_known: dict[str, Located] = {}


@dataclass(frozen=True)
class Located:
    """``folder``: safetensors and JSON on this machine. ``source``: where they came from, as JSON: "kind" is "folder",
    "hub" (with "id" and "revision", a commit) or "gguf" (with "file" and "sha256")."""

    folder: Path
    source: dict[str, str]


def local_folder(model: str | Path) -> Path:
    """The folder of ``model``: an existing one, or what ``org/name`` or ``org/name@revision`` is on the hub, or what a
    ``.gguf`` file holds; see :func:`locate`."""
    return locate(model).folder


def locate(model: str | Path) -> Located:
    """Find ``model`` and say where it came from. A folder that exists comes first.

    A hub's repository comes through huggingface_hub: its cache, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and ``HF_ENDPOINT``
    count as everywhere; a second call in this process does not ask again. A GGUF file is converted once, into the cache
    of this user. Raises ``InputError`` if there is no such folder, file, repository or revision, or no way to get it.
    """
    if not isinstance(model, str | Path):
        remedy = "Give a folder, org/name, a .gguf file, or to ppf.fit a PreTrainedModel; merge peft's adapters first"
        raise InputError("model", type(model).__name__, "is not a model that PPF takes here", remedy)
    key = str(model)
    found = _known.get(key)
    if found is None or not found.folder.is_dir():
        found = _known[key] = _locate(model)
    return found


def recall(folder: Path, source: Mapping[str, Any] | None) -> Path:
    """``folder``, or if that is gone, what its ``source`` gives again; the same ``folder`` if that says nothing.

    Raises ``InputError`` as :func:`locate` does.
    """
    kind = None if folder.is_dir() or source is None else source.get("kind")
    if kind == "hub":
        return locate(f"{source['id']}@{source['revision']}").folder
    if kind == "gguf":
        return locate(source["file"]).folder
    return folder


def _locate(model: str | Path) -> Located:
    path = Path(model)
    if path.is_dir():
        return Located(path, {"kind": "folder"})
    if path.suffix.lower() == ".gguf":
        from .gguf import convert  # transformers' models, which a folder does not need yet

        folder, sha256 = convert(path)
        return Located(folder, {"kind": "gguf", "file": str(path.resolve()), "sha256": sha256})
    named = None if path.exists() else _HUB_ID.fullmatch(str(model))
    if named is None:
        return Located(existing_folder(path), {"kind": "folder"})
    from .hub import fetch

    folder, commit = fetch(named["id"], named["revision"])
    return Located(folder, {"kind": "hub", "id": named["id"], "revision": commit})

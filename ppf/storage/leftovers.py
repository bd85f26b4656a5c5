"""Temporary names beside what is being written, and how what a killed process left under them is swept.

``.NAME.xxxxxxxx.tmp`` is NAME while it is written, or what a swap has taken out; ``.NAME.xxxxxxxx.old`` is the NAME
that a swap in two steps has moved away. Only who holds the lock on NAME (:mod:`ppf.storage.locks`) may sweep them: then
nobody else is writing it, and whoever did is dead.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>tmp|old)", re.DOTALL)
# Names that this process has given: what it writes it does not sweep.
_in_use: set[str] = set()


def temporary_sibling(path: Path, kind: str = "tmp") -> Path:
    """A name in ``path``'s folder, hence on the same file system, that nobody else uses."""
    found = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")
    _in_use.add(found.name)
    return found


def sweep_siblings(path: Path) -> None:
    """Remove what was left beside ``path`` of attempts to write it; what two steps have moved away comes back first, if
    nothing has come in its place."""
    old = [place for place, name, kind in _found(path.parent) if name == path.name and kind == "old"]
    if old and not os.path.lexists(path):
        os.rename(old[0], path)
    for place, name, _ in _found(path.parent):
        if name in (path.name, f"{path.name}.unfinished"):
            remove(place)


def sweep_inside(folder: Path, *names: str) -> None:
    """Remove what was left of ``names`` in a ``folder`` that is written in place; without any, of all in it and in the
    folders in it."""
    inner = [] if names else [place for place in folder.iterdir() if place.is_dir() and not place.is_symlink()]
    for place in (folder, *(place for place in inner if not _TEMPORARY.fullmatch(place.name))):
        for left, name, _ in _found(place):
            if not names or name in names:
                remove(left)


def is_temporary_of(file: str, *names: str) -> bool:
    """True if ``file`` is the name of a leftover of one of ``names``."""
    parts = _TEMPORARY.fullmatch(file)
    return parts is not None and parts["name"] in names


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as is allowed; never what a link leads to. A signal in the middle waits."""
    try:
        _remove(path)
    except KeyboardInterrupt:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _found(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Every leftover in ``folder``: where it is, whose it is, and its kind."""
    for name in sorted(os.listdir(folder)):
        if (parts := _TEMPORARY.fullmatch(name)) and name not in _in_use:
            yield folder / name, parts["name"], parts["kind"]

"""Files that are either complete or not there: write to a temporary name beside the target, then rename."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError
from .timings import timed


def write_atomically(path: str | Path, writer: Callable[[Path], None]) -> None:
    """Let ``writer`` write the file at the temporary path it is given, then rename that to ``path``.

    ``path`` holds its old content or the complete new one, whatever happens (error, Ctrl-C, kill); its folder must
    exist. Raises ``InputError`` when the disk is full; other errors of ``writer`` pass through.
    """
    path = Path(path)
    temporary = temporary_sibling(path)
    try:
        with full_disk_named(path):
            writer(temporary)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@timed("writing")
def write_json(path: str | Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically. Raises ``ValueError`` for NaN and infinities: they are not JSON."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


@timed("writing")
def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write ``tensors`` (copied to the CPU, made contiguous), atomically."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(held, temporary))


@contextmanager
def new_directory(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes ``path``, on any exception nothing is left of it.

    Missing parent folders are made. A ``path`` that exists and is not empty raises ``InputError``, unless ``force``:
    then it is swapped out once the new folder is complete. Raises ``InputError`` when the disk is full.
    """
    path = Path(os.path.realpath(path))
    check_output(path, force)
    made = _make_parents(path.parent)
    temporary = temporary_sibling(path)
    done = False
    try:
        with full_disk_named(path):
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                _share(file, temporary)
                _flush(file)
            _swap_in(temporary, path, force)
        done = True
    finally:
        if not done:
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # somebody else uses it by now
                    folder.rmdir()


def check_output(path: str | Path, force: bool = False) -> None:
    """Raise ``InputError`` unless :func:`new_directory` may write ``path``. Call it before the long work."""
    path = Path(os.path.realpath(path))
    if not os.path.lexists(path):
        _check_parent(path)
    elif not path.is_dir():
        raise InputError("output", path, "is a file", "Name a new folder")
    elif any(path.iterdir()):
        if not force:
            raise InputError("output", path, "exists and is not empty", "Name a new folder, or replace it with --force")
        if any(place == path or path in place.parents for place in (Path.cwd(), Path.home())):
            raise InputError("output", path, "holds your working or home folder", "Name a folder inside it")


def temporary_sibling(path: Path) -> Path:
    """A name in ``path``'s folder, hence on the same file system, that nobody else uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn "no space left" into an ``InputError`` about ``path``; safetensors has an error class of its own for it."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or f"os error {errno.ENOSPC}" in str(error) or "No space left on device" in str(error):
            raise no_space(path) from error
        raise


def no_space(path: Path, needed: int | None = None, free: int | None = None) -> InputError:
    """The error of a full disk; ``needed`` and ``free`` in bytes, where known."""
    sizes = "" if needed is None else f": {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
    return InputError("output", path, f"no space left on the device{sizes}", "Free some space, or write elsewhere")


def require_space(path: str | Path, needed: int) -> None:
    """Raise ``InputError`` if the file system that will hold ``path`` has fewer than ``needed`` bytes free."""
    folder = Path(os.path.realpath(path))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise no_space(Path(path), needed, free)


def _check_parent(path: Path) -> None:
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError("output", path, f"{parent} is a file", "Name a folder inside a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError("output", path, f"{parent} is not writable", "Name a folder that you may write")


def _make_parents(folder: Path) -> list[Path]:
    """Make ``folder``; return what had to be made, innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _swap_in(temporary: Path, path: Path, force: bool) -> None:
    if not force or not path.exists():
        # rename() replaces an empty folder, and refuses one that somebody has filled meanwhile.
        os.rename(temporary, path)
        return
    old = temporary_sibling(path)
    try:
        os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old)


def _share(path: Path, folder: Path) -> None:
    """Give a file the permissions that the umask gave ``folder``: safetensors writes files only its owner can read."""
    if path.is_file():
        path.chmod(folder.stat().st_mode & 0o666)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

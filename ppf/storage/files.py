"""Files that are either complete or not there: write to a temporary name beside the target, then rename."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..timings import timed
from .leftovers import remove, temporary_sibling
from .locks import locked_result, only_locks
from .swapping import exchange

_RUST = re.compile(r"os error (\d+)")
# What numpy says of a file that took less than it was to hold.
_SHORT = re.compile(r"\d+ requested and \d+ written")


def write_atomically(path: str | Path, writer: Callable[[Path], None]) -> None:
    """Let ``writer`` write the file at the temporary path it is given, then rename that to ``path``.

    ``path`` holds its old content or the complete new one, whatever happens (error, Ctrl-C, kill), with the permissions
    that the umask gives; its folder must exist. Raises ``InputError`` when the disk is full; other errors of ``writer``
    pass through.
    """
    path = Path(path)
    temporary = temporary_sibling(path)
    try:
        with write_errors_named(path):
            temporary.touch(0o666)
            mode = temporary.stat().st_mode & 0o666
            writer(temporary)
            temporary.chmod(mode)  # safetensors writes files only their owner can read
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))


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
    then it changes places with the new folder once that is complete. So does one that another command is writing.
    Raises ``InputError`` when the disk is full.
    """
    path = Path(os.path.realpath(path))
    check_output(path, force)
    with locked_result(path):
        check_output(path, force)  # it may have been waited for
        temporary = temporary_sibling(path)
        try:
            with write_errors_named(path):
                temporary.mkdir()
                yield temporary
                for file in temporary.rglob("*"):
                    _share(file, temporary)
                    _flush(file)
                _flush(temporary)
                _swap_in(temporary, path, force)
        finally:
            remove(temporary)  # half filled, or what was replaced


def check_output(path: str | Path, force: bool = False) -> None:
    """Raise ``InputError`` unless :func:`new_directory` may write ``path``. Call it before the long work."""
    path = Path(os.path.realpath(path))
    if not os.path.lexists(path):
        _check_parent(path)
    elif not path.is_dir():
        raise InputError("output", path, "is a file", "Name a new folder")
    elif not only_locks(path):
        if not force:
            raise InputError("output", path, "exists and is not empty", "Name a new folder, or replace it with --force")
        if any(place == path or path in place.parents for place in _own_folders()):
            raise InputError("output", path, "holds your working or home folder", "Name a folder inside it")


def _own_folders() -> Iterator[Path]:
    """The working folder and the user's home, as far as there are such."""
    with suppress(OSError):
        yield Path.cwd()
    with suppress(RuntimeError):  # neither HOME nor an entry for this user
        yield Path.home()


@contextmanager
def write_errors_named(path: Path) -> Iterator[None]:
    """Turn what keeps ``path``, or what lies beside it, from being written into an ``InputError`` about it.

    safetensors has an error class of its own, numpy one without number and name.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number is None or not _beside(path, getattr(error, "filename", None)):
            raise
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(path) from error
        reason = os.strerror(number) if number else str(error)
        remedy = "See to the folder or its disk, or write elsewhere"
        raise InputError("output", path, f"cannot be written ({reason})", remedy) from error


def _system_error(error: Exception) -> int | None:
    """The number of what a system refused, 0 where the error does not tell, None for errors of another kind."""
    said = str(error)
    if isinstance(error, InputError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := _RUST.search(said):
        return int(found[1])
    if "No space left on device" in said or _SHORT.search(said):
        return errno.ENOSPC
    return 0 if isinstance(error, OSError) and type(error) is OSError and not error.args[1:] else None


def _beside(path: Path, name: str | bytes | int | None) -> bool:
    """Whether an error is about ``path``'s folder; one that names no file is."""
    if not isinstance(name, str | bytes):
        return True
    return Path(os.path.realpath(path)).parent in Path(os.path.realpath(os.fsdecode(name))).parents


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


def _swap_in(temporary: Path, path: Path, force: bool) -> None:
    """Let ``temporary`` become ``path``; what that was is at ``temporary`` then, or gone."""
    if not force or not path.exists():
        # rename() replaces an empty folder, and refuses one that somebody has filled meanwhile.
        os.rename(temporary, path)
    elif not exchange(temporary, path):
        _swap_in_two_steps(temporary, path)
    _flush(path.parent)


def _swap_in_two_steps(temporary: Path, path: Path) -> None:
    """Between the steps nothing stands at ``path``: the next command that locks it brings back the old folder."""
    old = temporary_sibling(path, "old")
    try:
        os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    remove(old)


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

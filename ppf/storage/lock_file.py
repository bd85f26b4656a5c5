"""One lock file: taken, with a word on who has it, and given back."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from ..errors import InputError, shown

_POLL_SECONDS = 0.25
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EIO}


def take(file: Path, path: Path, field: str, patient: bool) -> int | None:
    """The open ``file``, locked; None, with a warning, where the file system has no locks. ``path`` is what it locks.

    Raises ``InputError`` about ``field`` that names the process which has it, unless that is to be waited for.
    """
    told = False
    while True:
        with named(field, path):
            file.parent.mkdir(parents=True, exist_ok=True)  # another command may just have removed what it had made
            handle, ours = _open(file)
        locked = _flock(handle)
        if locked is None:
            os.close(handle)
            file.unlink(missing_ok=True)
            _warn_of(path)
            return None
        if locked and _is_at(handle, file):
            if ours:
                _say(handle)
                return handle
            with named(field, path):
                file.unlink()  # another user's, who is dead
        holder = _holder(handle)
        os.close(handle)
        if locked:  # of a file that has been removed
            continue
        if not patient:
            remedy = "Wait for it with --wait (from Python: wait=True), or end it"
            raise InputError(field, path, f"is being written by {holder}", remedy)
        if not told:
            warnings.warn(f"ppf: waiting for {holder}, which is writing {shown(path)}", stacklevel=2)
        told = True
        time.sleep(_POLL_SECONDS)


def give_back(file: Path, handle: int) -> None:
    """Remove ``file`` with its lock; not so if the folder in which it was has been swapped out."""
    if _is_at(handle, file):
        with suppress(OSError):
            file.unlink()
    os.close(handle)


def _open(file: Path) -> tuple[int, bool]:
    """A handle of ``file``, made if it is not there, and whether it may be written."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), True
    except PermissionError:
        if not file.exists():
            raise
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC), False  # another user's, who may still be there


def _flock(handle: int) -> bool | None:
    """True if the lock is ours now, False if it is another's, None if there are no locks here."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise


def _warn_of(path: Path) -> None:
    text = f"the file system of {shown(path)} has no locks: start no other command that writes there meanwhile"
    warnings.warn(f"ppf: {text}", stacklevel=2)


def _say(handle: int) -> None:
    with suppress(OSError):  # a full disk: it is held, whatever it says
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_this_process()).encode(), 0)


def _is_at(handle: int, file: Path) -> bool:
    """True if ``handle`` is of what ``file`` names now."""
    mine = os.fstat(handle)
    try:
        there = os.stat(file)
    except FileNotFoundError:
        return False
    return mine.st_nlink > 0 and os.path.samestat(mine, there)


def _this_process() -> dict[str, object]:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": _command(), "since": since}


def _command() -> str:
    program, *arguments = sys.argv or [""]
    name = os.path.basename(program)
    return shlex.join(["ppf" if name == "__main__.py" else name or "python", *arguments])


def _holder(handle: int) -> str:
    """What the lock says about the process that holds it."""
    try:
        said = json.loads(os.pread(handle, 1 << 16, 0))
        return f"process {said['pid']} on {said['host']} ({shown(said['command'])}) since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is just beginning
        return "another command"


@contextmanager
def named(field: str, path: Path) -> Iterator[None]:
    """One line for a folder that cannot be made or written."""
    try:
        yield
    except FileExistsError as error:
        raise InputError(field, path, f"{error.filename} is not a folder", "Name a new folder") from None
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error} ({error.filename})"
        remedy = "Use a folder, or a copy of this one, that you may write"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem, remedy = "no space left on the device", "Free some space, or write elsewhere"
        raise InputError(field, path, problem, remedy) from None

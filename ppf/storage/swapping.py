"""Two names change places in one step of the file system, so that neither is ever missing."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What kernels and file systems say that do not know the flag; NFS and older FUSE are among them.
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def exchange(one: Path, other: Path) -> bool:
    """Let ``one`` and ``other``, which both exist, change places; False where that cannot be done in one step.

    renameat2(2) with RENAME_EXCHANGE: Linux 3.15 on ext4, XFS, Btrfs and tmpfs. Raises ``OSError`` for what else fails.
    """
    call = _renameat2()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@cache
def _renameat2() -> Any:
    """The C library's function; None before glibc 2.28."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        call.argtypes = ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
        call.restype = ctypes.c_int
    return call

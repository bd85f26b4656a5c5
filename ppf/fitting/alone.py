"""Who may write into a run: one command at a time."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ..errors import InputError
from ..storage.locks import locked_folder, tidy
from .run.manifest import read_manifest


def alone_in(output: Path, copying: bool = False) -> AbstractContextManager[None]:
    """The lock of a fit on its run ``output``. Nothing is written into a finished one, which needs none; unless a model
    is copied there to be compared, where that can be done."""
    if not is_finished(output) or (copying and may_write(output)):
        return locked_folder(output)
    tidy(output)
    return nullcontext()


def may_write(run: Path) -> bool:
    """Whether this user may write into the folder of a run."""
    return os.access(run, os.W_OK | os.X_OK)


def is_finished(output: Path) -> bool:
    """True for a run whose fit has ended."""
    try:
        return read_manifest(output)["state"] == "complete"
    except InputError:
        return False

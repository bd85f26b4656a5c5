"""Locks: of several commands that would write into one run or one output, one does; the others are told who, or wait.

A folder that is written in place (a run, a comparison) has its lock inside, ``.ppf-lock``; a result that appears as a
whole has it beside itself, ``.NAME.ppf-lock``. The lock is the kernel's (flock(2)), not the file: it ends with the
process that holds it, however that ends, and the file says which one that is. It is removed with the lock; what a
killed process left of it is taken over by the next. (The package filelock does not say who holds a lock.)

On NFS the Linux client makes flock a lock of the server's, which other hosts respect. A file system that has no locks
is named in a warning, and nothing is swept there. Readers take no lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from .. import ranks
from ..errors import InputError
from .leftovers import sweep_inside, sweep_siblings
from .lock_file import give_back, named, take

INSIDE, _SUFFIX = ".ppf-lock", ".ppf-lock"

# What this thread holds already: who calls itself does not wait for itself. Another thread is another command.
_mine: ContextVar[frozenset[Path]] = ContextVar("_mine", default=frozenset())
_patient: ContextVar[bool] = ContextVar("_patient", default=False)


def wait_for_others(wait: bool) -> None:
    """Whether locks that others hold are waited for from now on, in this thread."""
    _patient.set(wait)


@contextmanager
def waiting(wait: bool) -> Iterator[None]:
    """Wait, if ``wait``, for locks that others hold; else whatever has been said before goes."""
    before = _patient.set(wait or _patient.get())
    try:
        yield
    finally:
        _patient.reset(before)


@contextmanager
def locked_folder(path: str | Path, field: str = "output") -> Iterator[None]:
    """Write into the folder ``path`` in place, which is made if it is missing, alone.

    A folder that was made and is still empty in the end goes again. Raises ``InputError`` about ``field`` if another
    command writes there, unless it is waited for, and if the folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    with _made(path, field, path), _locked(path / INSIDE, path, field):
        _require_free(_beside(path), path, field)
        yield


def sweep(path: str | Path, *names: str) -> None:
    """Remove what killed commands left in a folder whose lock this thread holds: of files called ``names``, or
    anything, for callers who have seen that the folder is PPF's."""
    path = Path(os.path.realpath(path))
    if path / INSIDE in _mine.get():
        sweep_inside(path, *names)
        _sweep_neighbours(path)


def tidy(path: str | Path) -> None:
    """Remove what killed commands left of a result or a run that stands complete, if nobody writes it: for commands
    that have nothing to write there."""
    with _if_free(), locked_result(path):
        pass
    if (Path(path) / INSIDE).exists():
        with _if_free(), locked_folder(path):
            sweep(path)


def holds(path: str | Path) -> bool:
    """True if this thread has the lock on the result ``path``."""
    return _beside(Path(os.path.realpath(path))) in _mine.get()


@contextmanager
def locked_result(path: str | Path, field: str = "output") -> Iterator[None]:
    """Write the folder or file ``path``, which appears as a whole, alone; what killed commands left of it is swept.

    Missing parent folders are made, and go again if nothing came into them. Raises ``InputError`` as
    :func:`locked_folder` does.
    """
    path = Path(os.path.realpath(path))
    with _made(path.parent, field, path), _locked(_beside(path), path, field) as new:
        if path.is_dir():
            _require_free(path / INSIDE, path, field)
        if new:
            sweep_siblings(path)
            _sweep_neighbours(path.parent)
        yield


@contextmanager
def for_all(lock: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Hold ``lock()`` in the first process for all of torchrun's, which all come here; its refusal is raised in all."""
    with ExitStack() as stack:
        ranks.from_first(lambda: stack.enter_context(lock()))
        yield


def only_locks(folder: Path) -> bool:
    """True if ``folder`` is empty but for its lock: an output that nothing is in."""
    return all(is_lock(name) for name in os.listdir(folder))


def is_lock(file: str, *names: str) -> bool:
    """True if ``file`` is the name of a folder's own lock, or of one on one of ``names`` in it."""
    return file == INSIDE or file in (f".{name}{_SUFFIX}" for name in names)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_SUFFIX}")


@contextmanager
def _made(folder: Path, field: str, path: Path) -> Iterator[None]:
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with named(field, path):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for place in missing:  # innermost first
            with suppress(OSError):  # in use by now
                place.rmdir()


@contextmanager
def _locked(file: Path, path: Path, field: str) -> Iterator[bool]:
    """Hold the lock ``file`` on ``path``. Yields False if it was held before, and where there are no locks."""
    handle = None if file in _mine.get() else take(file, path, field, _patient.get())
    if handle is None:
        yield False
        return
    before = _mine.set(_mine.get() | {file})
    try:
        yield True
    finally:
        _mine.reset(before)
        give_back(file, handle)


def _require_free(file: Path, path: Path, field: str) -> None:
    """Raise ``InputError``, or wait, while another command holds ``file``; what a dead one left of it goes."""
    if file.exists():
        with _locked(file, path, field):
            pass


def _sweep_neighbours(folder: Path) -> None:
    """Sweep what killed commands left of other results in ``folder``: those whose locks are there, and nobody's."""
    for file in folder.glob(f".*{_SUFFIX}"):
        name = file.name.removeprefix(".").removesuffix(_SUFFIX)
        if name and file not in _mine.get():
            with _if_free(), _locked(file, folder / name, "output"):
                sweep_siblings(folder / name)


@contextmanager
def _if_free() -> Iterator[None]:
    """What cannot be locked now is left alone."""
    before = _patient.set(False)
    try:
        with suppress(InputError):
            yield
    finally:
        _patient.reset(before)

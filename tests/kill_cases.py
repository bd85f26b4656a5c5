"""Processes that die at a chosen moment: before their Nth call that changes what is on disk, as by kill -9."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ppf.storage import files

_CALLS = "fsync", "rename", "replace", "unlink", "rmdir", "mkdir"


def killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Run ``work`` in a process of its own that is killed before its call of that ``number``, from 1; True if it came
    so far, False if ``work`` ended before. Raises ``AssertionError`` if it failed."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # a forked process has none but its own
            _count_down(number)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"the process ended with {status}"
    return status == signal.SIGKILL


def every_kill(work: Callable[[], Any], last: int = 1000) -> Iterator[int]:
    """Kill ``work`` at its first call, at its second, and so on, until it ends of itself; yields after each kill."""
    for number in range(1, last):
        if not killed_at(number, work):
            return
        yield number


def content(folder: Path) -> dict[str, str | None]:
    """What is in a folder, by path: texts of files (bytes beyond UTF-8 replaced), None for folders."""
    found = sorted(folder.rglob("*"))
    return {str(f.relative_to(folder)): None if f.is_dir() else f.read_text(errors="replace") for f in found}


def _count_down(number: int) -> None:
    left = [number]

    def counted(call: Callable) -> Callable:
        def before(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return before

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    files.exchange = counted(files.exchange)

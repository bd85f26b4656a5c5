"""How long work reports where it is; the command line draws it, Python callers may ignore it."""

from __future__ import annotations

from collections.abc import Callable

# Called as progress(stage, done, total); stages come one after the other, done grows to total.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The default: report nothing."""

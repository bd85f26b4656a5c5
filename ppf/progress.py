"""How long work reports where it is: to a callable that the caller gives, and to the logger "ppf"."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from . import ranks

# Called as progress(stage, done, total); stages come one after the other, done grows to total.
Progress = Callable[[str, int, int], None]

log = logging.getLogger("ppf")
# Silent, as libraries are, until the program that uses it says where its records go.
log.addHandler(logging.NullHandler())


def silent(stage: str, done: int, total: int) -> None:
    """The default: report nothing."""


def logged(progress: Progress = silent) -> Progress:
    """``progress``, and an INFO record when a stage begins and when it is done; of several processes the first one's.

    One that is logged already is returned as it is: what calls each other says everything once.
    """
    if getattr(progress, "is_logged", False):
        return progress
    begun: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in begun and done < total:
            begun[stage] = time.perf_counter()
            tell("%s: %s of %s", stage, f"{done:,}", f"{total:,}")
        progress(stage, done, total)
        if stage in begun and done >= total:
            tell("%s: all %s, %.1f s", stage, f"{total:,}", time.perf_counter() - begun.pop(stage))

    report.is_logged = True
    return report


def tell(message: str, *values: object) -> None:
    """An INFO record of the logger "ppf", of the first process only."""
    if ranks.first():
        log.info(message, *values)

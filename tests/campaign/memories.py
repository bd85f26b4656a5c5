"""Limits of memory: a command that may not have more ends in one line, with nothing half-written."""

from __future__ import annotations

import random
import resource
from pathlib import Path

from .ground import Ground
from .interruptions import tried
from .outcomes import Verdict
from .writers import WRITERS


def attempt(ground: Ground, seed: int) -> Verdict:
    draw = random.Random(f"memories {seed}")
    writer = list(WRITERS.values())[seed % len(WRITERS)]
    more = int(10 ** draw.uniform(5, 8))
    return tried(ground, writer, f"{writer.name}, {more / 1e6:.1f} MB more", lambda: _bound(more))


def _bound(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, resource.RLIM_INFINITY))

"""How a try can end, and what is told of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

SUCCESS, REFUSED = "success", "refused"
TRACEBACK = "traceback"
"""Anything else than success or one line: also a crash, a hang, two lines, a line that no terminal prints."""
SILENT = "silent"
"""Damaged data gave another figure, or a resumed command another result."""
OVER = "over limit"
"""A policy costs more than was asked for."""
COSTLY = "costly"
"""Refused, but after more than a second or 500 MB."""
LEFTOVER = "leftover"
"""The next command has left what an interrupted one had left."""
UNRESUMABLE = "unresumable"
"""The same command again does not succeed."""

FINE = (SUCCESS, REFUSED)
FAULTS = (TRACEBACK, SILENT, OVER, COSTLY, LEFTOVER, UNRESUMABLE)


@dataclass(frozen=True)
class Verdict:
    """One try: its ``outcome``, ``what`` was done to what, and for a fault the ``detail`` that shows it."""

    outcome: str
    what: str
    detail: str = ""


@dataclass(frozen=True)
class Try:
    """A verdict with its name: ``python -m tests.campaign --only attack --seed seed`` repeats it; ``seconds`` are those
    that its processes computed."""

    attack: str
    seed: int
    outcome: str
    what: str
    detail: str
    seconds: float

    @property
    def is_fault(self) -> bool:
        return self.outcome not in FINE

    @property
    def command(self) -> str:
        return f"python -m tests.campaign --only {self.attack} --seed {self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def counted(tries: Iterable[Try]) -> dict[str, dict[str, int]]:
    """Of every attack, how many tries ended in which way."""
    found: dict[str, Counter[str]] = {}
    for one in tries:
        found.setdefault(one.attack, Counter())[one.outcome] += 1
    return {attack: dict(counts) for attack, counts in found.items()}

"""Every kind of attack: how one try is made, and how many there are of it in the short and in the long pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import (
    budgets,
    checkpoints,
    interruptions,
    lines,
    memories,
    policies,
    races,
    results,
    runs,
    texts,
)
from .ground import Ground
from .outcomes import Verdict


@dataclass(frozen=True)
class Attack:
    """``attempt(ground, seed)`` makes one try; seeds go from 0 to ``short`` or ``long``. ``kind`` is what its tries are
    counted as, ``of`` what they are."""

    attempt: Callable[[Ground, int], Verdict]
    short: int
    long: int
    kind: str
    of: str


INPUT, KILL, RACE, SHORTAGE = "inputs", "kills", "races", "shortages"
ATTACKS = {
    "policies": Attack(policies.attempt, 24, 3_000, INPUT, "policies as JSON, read and pruned to"),
    "budgets": Attack(budgets.attempt, 24, 4_000, INPUT, "random structures, kinds of budget and limits"),
    "checkpoints": Attack(checkpoints.attempt, 24, 4_000, INPUT, "files of dense models and results, opened"),
    "runs": Attack(runs.attempt, 16, 3_500, INPUT, "files of runs, asked and gone on with"),
    "results": Attack(results.attempt, 12, 1_500, INPUT, "files of results, exported; runs as elastic models"),
    "lines": Attack(lines.attempt, 16, 2_500, INPUT, "options of every command"),
    "texts": Attack(texts.attempt, 12, 2_000, INPUT, "texts of every form, by file, folder, pipe and stdin"),
    "kills": Attack(interruptions.kills, 4, 330, KILL, "SIGKILL at the Nth flush, rename or unlink"),
    "signals": Attack(interruptions.signals, 2, 165, KILL, "SIGTERM, SIGHUP and Ctrl-C at the Nth of these, or write"),
    "races": Attack(races.attempt, 1, 120, RACE, "two writing commands at once"),
    "disks": Attack(interruptions.disks, 2, 165, SHORTAGE, "no space, no quota, a broken disk, a limit on files"),
    "memories": Attack(memories.attempt, 1, 60, SHORTAGE, "a limit on memory"),
}

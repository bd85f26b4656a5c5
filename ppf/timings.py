"""Where a command's time goes: a table of stages that adds up to the wall time.

At every moment the process is in one stage; entering another stops the first one's clock until it is left. So a stage
inside another is not counted twice, and the seconds of all stages add up to the process's age.

Nothing here waits for a GPU, which works on while Python goes ahead: its time is counted where a result is read. The
stages of a fit end where one is read anyway (a loss, a file, a row), so the borders are right to within a launch.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STARTING, BETWEEN = "starting", "other"
"""Before the first stage: the interpreter and imports. Between stages: what no stage claims."""


class Timings:
    """Seconds of every stage since ``start``, a moment of ``time.perf_counter``."""

    def __init__(self, start: float):
        self._seconds: dict[str, float] = {}
        self._stage, self._since = STARTING, start

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count what happens inside to ``stage``, and not to the stage around it. Other threads than the main one work
        beside it, and count nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        around = self._around()
        self._enter(stage)
        try:
            yield
        finally:
            self._enter(around)

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage so far, in the order in which they were first entered. Asking ends the start too."""
        if threading.current_thread() is threading.main_thread():
            self._enter(self._around())
        return dict(self._seconds)

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """Seconds of every stage since :meth:`seconds` gave ``before``; stages without any are left out."""
        spent = {stage: seconds - before.get(stage, 0.0) for stage, seconds in self.seconds().items()}
        return {stage: seconds for stage, seconds in spent.items() if seconds > 0}

    def _around(self) -> str:
        return BETWEEN if self._stage == STARTING else self._stage

    def _enter(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now


def _process_start() -> float:
    """When this process began, on the clock of ``time.perf_counter``; where the system does not tell, now."""
    now = time.perf_counter()
    try:
        # proc(5): field 22 is the start in clock ticks since boot. The second field, a name, may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    # A container may count boots otherwise than its clock: such an age is no age.
    return now - age if 0 <= age <= time.clock_gettime(time.CLOCK_BOOTTIME) else now


_process = Timings(_process_start())
timed, seconds, since = _process.timed, _process.seconds, _process.since

"""SIGTERM and SIGHUP, which schedulers, containers, ``timeout`` and closed terminals send, end a command as Ctrl-C."""

from __future__ import annotations

import signal
import time
from types import FrameType

ENDING = signal.SIGTERM, signal.SIGHUP
# A second signal that follows so soon is the same wish, and would only disturb the clearing away.
_SAME_WISH_SECONDS = 10.0
_last = -_SAME_WISH_SECONDS


class Ended(KeyboardInterrupt):
    """Raised where the main thread is when a signal says that it shall end."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


def heed() -> None:
    """From now on these signals raise :class:`Ended`, unless whoever started this process has them ignored (nohup)."""
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def told_of(stop: KeyboardInterrupt) -> tuple[int, str]:
    """The exit code, 128 and the signal's number, and how to say what happened."""
    if isinstance(stop, Ended):
        return 128 + stop.number, f"ended by {stop}"
    return 128 + signal.SIGINT, "interrupted"


def _end(number: int, frame: FrameType | None) -> None:
    global _last
    now, before = time.monotonic(), _last
    if now - before >= _SAME_WISH_SECONDS:
        _last = now
        raise Ended(number)

"""A command under torchrun, which starts the same one in several processes: who works, who speaks, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading

import typer

from .. import ranks
from .console import errors
from .signals import ENDING

# Those that have work for several processes; of the others the first one does everything.
TOGETHER = ("fit", "compare", "report", "recover", "prune")


def join(command: str | None) -> None:
    """Before ``command`` begins: meet the other processes if there are any and it has work for them, else leave it to
    the first one."""
    number, count = ranks.launched()
    if count == 1:
        return
    if command in TOGETHER:
        ranks.start()
        _heed_the_end()
    elif number:
        raise typer.Exit


def leave(code: int) -> None:
    """End this process if it is one of several; returns if it is not.

    No process waits for another here: what torch.distributed does when an interpreter ends may, for one that has died.
    """
    if ranks.launched()[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _heed_the_end() -> None:
    """Say why it ends when torchrun ends this process, which it does with SIGTERM once another one has ended, or with
    what it was sent itself.

    A thread waits for the signal: Python's own handlers run between two steps of the main thread, which may be waiting
    for the dead.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end, args=(reading,), daemon=True).start()


def _end(reading: int) -> None:
    while os.read(reading, 1)[0] not in ENDING:
        pass
    line = f"Error: {ranks.GONE}"
    code = ranks.speak_for_all(lambda: errors.print(line, style="red", highlight=False, soft_wrap=True), 1)
    errors.show_cursor()  # a bar may have hidden it
    leave(code)

"""Kills, signals and full disks: a writing command ends at the Nth flush, rename, unlink or write, and the same command
again gives what an undisturbed one gives, with nothing left of the first."""

from __future__ import annotations

import errno
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from . import children, trees
from .ground import Ground
from .judging import judged
from .outcomes import LEFTOVER, REFUSED, SILENT, SUCCESS, UNRESUMABLE, Verdict
from .writers import WRITERS, Writer, run_again, undisturbed

_ENDS = (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_ERRORS = (errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)


def kills(ground: Ground, seed: int) -> Verdict:
    """SIGKILL before the Nth flush, rename or unlink."""
    draw = random.Random(f"kills {seed}")
    writer = list(WRITERS.values())[seed % len(WRITERS)]
    kind, nth = _place(draw, writer, ground, ("flush", "rename", "rename", "unlink"))
    what = f"{writer.name}, killed at {kind} {nth}"
    return tried(ground, writer, what, lambda: children.arm(kind, nth, sends=signal.SIGKILL), killed=True)


def signals(ground: Ground, seed: int) -> Verdict:
    """SIGTERM, SIGHUP or Ctrl-C at the Nth flush, rename, unlink or write."""
    draw = random.Random(f"signals {seed}")
    writer, number = list(WRITERS.values())[seed % len(WRITERS)], draw.choice(_ENDS)
    kind, nth = _place(draw, writer, ground, children.KINDS)
    what = f"{writer.name}, {number.name} at {kind} {nth}"
    return tried(ground, writer, what, lambda: children.arm(kind, nth, sends=number), stopped=True)


def disks(ground: Ground, seed: int) -> Verdict:
    """No space, no quota, a broken or read-only disk from the Nth write, flush or rename on; or a limit on files."""
    draw = random.Random(f"disks {seed}")
    writer = list(WRITERS.values())[seed % len(WRITERS)]
    if draw.random() < 0.15:
        most = draw.choice((4096, 20_000, 100_000))
        return tried(ground, writer, f"{writer.name}, files of at most {most} bytes", lambda: _bound(most))
    error, lasting = draw.choice(_ERRORS), draw.random() < 0.8
    kind, nth = _place(draw, writer, ground, ("write", "write", "write", "flush", "rename"))
    what = f"{writer.name}, {errno.errorcode[error]} at {kind} {nth}{' and after' * lasting}"
    return tried(ground, writer, what, lambda: children.arm(kind, nth, error=error, lasting=lasting))


def _bound(most: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does when it starts
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def _place(draw: random.Random, writer: Writer, ground: Ground, kinds: tuple[str, ...]) -> tuple[str, int]:
    kind = draw.choice(kinds)
    return kind, draw.randint(1, max(1, undisturbed(writer, ground).calls[kind]))


def tried(
    ground: Ground, writer: Writer, what: str, disturb: Callable[[], None], killed: bool = False, stopped: bool = False
) -> Verdict:
    with ground.scratch(*writer.changes) as here:
        ended = children.run(writer.work(ground), here, disturb)
        if not (killed and ended.signal == signal.SIGKILL):
            verdict = judged(ended, what, stopped)
            if verdict.outcome not in (SUCCESS, REFUSED):
                return verdict
        if not killed and (left := _hidden(here)):
            return Verdict(LEFTOVER, what, f"at once: {', '.join(left)}")
        return _again(ground, writer, what, here)


def _again(ground: Ground, writer: Writer, what: str, here: Path) -> Verdict:
    """The same command once more, undisturbed."""
    ended = run_again(writer, ground, here)
    verdict = judged(ended, what)
    if verdict.outcome != SUCCESS:
        return Verdict(UNRESUMABLE, what, verdict.detail)
    usual = undisturbed(writer, ground)
    if more := sorted(trees.names(here) - {*usual.names}):
        return Verdict(LEFTOVER, what, ", ".join(more)[:300])
    differs = trees.differing(usual.contents, trees.contents(here))
    if differs and not writer.learns:
        return Verdict(SILENT, what, f"another {', '.join(differs)}"[:300])
    return Verdict(SUCCESS, what)


def _hidden(here: Path) -> list[str]:
    """Temporary files that a command which could tidy up has left."""
    return sorted(name for name in trees.names(here) if name.endswith(".tmp") or ".tmp/" in name)

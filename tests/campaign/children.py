"""One process a try: a fork of this one, which has imported everything already, so that it takes no second to start.

This process must have been started with the shim (shim.c) before it; :func:`with_shim` sees to that.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import FOLDER

KINDS = ("flush", "rename", "unlink", "write")
"""What the shim counts, in its order."""
_TOLD = "PPF_CAMPAIGN_SHIM"
_LONGEST = 90.0
# Every so many seconds it is looked whether a child still computes; so many times in vain, and it never will.
_LOOK, _STILL = 4.0, 5
# Of the time: what a progress bar takes that waits for others.
_IDLE = 0.02
# One thread each: forks inherit none, and tiny models are slower with two.
_ALONE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_ENVIRONMENT = _ALONE | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit ``code`` as a shell shows it (128 + n after signal n), what it wrote, how long it
    computed, the most memory it had beyond what it was born with, and whether it was ended, or told to end."""

    code: int
    signal: int
    out: str
    err: str
    seconds: float
    grown: int
    hung: bool
    stopped: bool


def with_shim() -> None:
    """Start this program again with the shim loaded, unless it is."""
    if _TOLD in os.environ:
        return
    library = Path(tempfile.mkdtemp(prefix="ppf-shim-")) / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, FOLDER / "shim.c", "-ldl"], check=True)
    environment = os.environ | _ENVIRONMENT | {"LD_PRELOAD": str(library), _TOLD: str(library)}
    os.execve(sys.executable, [sys.executable, "-m", "tests.campaign", *sys.argv[1:]], environment)


def arm(kind: str, nth: int, *, sends: int = 0, error: int = 0, lasting: bool = False) -> None:
    """In a child: the nth call of ``kind`` from now on ends in the signal ``sends`` or in ``error``; see shim.c."""
    _shim().campaign_arm(KINDS.index(kind), ctypes.c_long(nth), sends, error, int(lasting))


def count_calls(file: Path, work: Callable[[], None]) -> None:
    """In a child: do ``work`` and write how many calls of each kind it made to ``file``."""
    shim = _shim()
    shim.campaign_arm(-1, ctypes.c_long(0), 0, 0, 0)
    try:
        work()
    finally:
        file.write_text(" ".join(str(shim.campaign_count(kind)) for kind in range(len(KINDS))))


def command(*arguments: object) -> Callable[[], None]:
    """The work of ``ppf`` with these arguments."""

    def work() -> None:
        from ppf.cli import main

        sys.argv = ["ppf", *map(str, arguments)]
        main()

    return work


class Child:
    """A fork that does ``work`` in ``folder``, as a program of its own. ``prepare`` is called first, in the child."""

    def __init__(self, work: Callable[[], None], folder: Path, prepare: Sequence[Callable[[], None]] = ()):
        self._streams = [os.memfd_create(name) for name in ("out", "err")]
        self.pid = os.fork()
        if self.pid == 0:
            _live(work, folder, prepare, self._streams)
        self._watch = os.pidfd_open(self.pid)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, stop_after: float | None = None) -> Ended:
        """Until it has ended. One that has computed for ``stop_after`` seconds is sent SIGTERM; one that computes for
        too long, or stands still, is ended, and its Python stack is in ``err``."""
        stopped, hung, still, computed = False, False, 0, 0.0
        while not hung and not self._ends(_LOOK):
            spent, wants_a_core = _work(self.pid)
            still = 0 if wants_a_core or spent > computed + _LOOK * _IDLE else still + 1
            computed = spent
            hung = computed > _LONGEST or still >= _STILL
            if stop_after is not None and computed > stop_after and not stopped:
                self.send(signal.SIGTERM)
                stopped = True
        if hung:
            self.send(signal.SIGABRT)
            if not self._ends(_LOOK):
                self.send(signal.SIGKILL)
        return self._ended(hung, stopped)

    def _ended(self, hung: bool, stopped: bool) -> Ended:
        _, status, used = os.wait4(self.pid, 0)
        os.close(self._watch)
        code = os.waitstatus_to_exitcode(status)
        born = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out, err = (_content(stream) for stream in self._streams)
        spent, grown = used.ru_utime + used.ru_stime, (used.ru_maxrss - born) * 1024
        return Ended(code if code >= 0 else 128 - code, max(-code, 0), out, err, spent, grown, hung, stopped)

    def _ends(self, longest: float) -> bool:
        poll = select.poll()
        poll.register(self._watch, select.POLLIN)
        return bool(poll.poll(longest * 1000))


def _work(pid: int) -> tuple[float, bool]:
    """Seconds that a process and those it has started have computed, and whether one of them wants a core just now: on
    a busy machine it may not get one for long."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # ended meanwhile
        return 0.0, False
    found = [_work(int(child)) for child in started]
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(spent for spent, _ in found), fields[0] == "R" or any(wants for _, wants in found)


def run(work: Callable[[], None], folder: Path, *prepare: Callable[[], None]) -> Ended:
    """Do ``work`` in a child, and wait for its end."""
    return Child(work, folder, prepare).wait()


def _shim() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ[_TOLD])


def _content(stream: int) -> str:
    size = os.fstat(stream).st_size
    data = os.pread(stream, size, 0)
    os.close(stream)
    return data.decode("utf-8", "replace")


def _live(work: Callable[[], None], folder: Path, prepare: Sequence[Callable[[], None]], streams: list[int]) -> None:
    """What the child does until its end, as the interpreter would."""
    code = 1
    try:
        os.setsid()
        _move_in(folder, streams)
        for step in prepare:
            step()
        code = _status(work)
        gc.collect()  # what an interpreter that ends would close
        atexit._run_exitfuncs()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _status(work: Callable[[], None]) -> int:
    try:
        work()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def _move_in(folder: Path, streams: list[int]) -> None:
    for number, stream in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
        os.dup2(stream, number)
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does when it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable(all_threads=False)
    os.chdir(folder)
    home = folder.parent / "home"
    os.environ |= {"HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home), "PPF_TRACEBACK": "1"}
    tempfile.tempdir = str(home)

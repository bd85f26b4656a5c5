"""Running commands under torchrun in tests: real processes, which train for a few steps only."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fresh

TESTS = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")

# The real command with short training, and a pause before each evaluation: time to be killed in.
_QUICK = """
import os, sys, time, pytest
from factories import quick_learning
from ppf.cli import main
from ppf.fitting.evaluation import Evaluator
quick_learning(pytest.MonkeyPatch())
pause, measure = float(sys.argv.pop(1)), Evaluator.log_perplexities
Evaluator.log_perplexities = lambda self, policies, tokens=None: (time.sleep(pause), measure(self, policies, tokens))[1]
main()
"""


def together(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    """``ppf`` with ``arguments`` in so many processes, as users start it."""
    return subprocess.run([*_command(processes, ("-m", "ppf")), *map(str, arguments)], **_how(), timeout=300)


def quick_together(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    """The same, with short training."""
    return subprocess.run([*_quick(processes, 0), *map(str, arguments)], **_how(), timeout=300)


@contextmanager
def forks(processes: int, code: str, *arguments: object) -> Iterator[list[fresh.Process]]:
    """So many processes of one job that run Python ``code``, told what torchrun's are, for what is not about torchrun;
    all are gone at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    ranks = []
    try:
        for rank in range(processes):
            ranks.append(fresh.Process(code, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared))
        yield ranks
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)


def forked_together(processes: int, code: str, *arguments: object) -> list[subprocess.CompletedProcess]:
    """How they ended, all of them well."""
    with forks(processes, code, *arguments) as ranks:
        ended = [process.ended() for process in ranks]
    assert not any(done.returncode for done in ended), [done.stderr[-2000:] for done in ended]
    return ended


def quick_forked_together(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    """How the first of so many ended that ran ``ppf`` with ``arguments`` and short training, all of them well."""
    return forked_together(processes, _QUICK, 0, *arguments)[0]


@contextmanager
def running(processes: int, pause: float, *arguments: object) -> Iterator[subprocess.Popen]:
    """The same while it runs, with a ``pause`` in seconds before the evaluations of every process."""
    with subprocess.Popen([*_quick(processes, pause), *map(str, arguments)], **_how(), start_new_session=True) as job:
        try:
            yield job
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)


def workers(job: subprocess.Popen) -> list[int]:
    """Process ids of a job's ranks, by rank; as many as have been started."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = entry.joinpath("stat").read_text().rpartition(")")[2].split()[1] if entry.name.isdigit() else ""
            if parent == str(job.pid):
                environment = dict(
                    x.split("=", 1) for x in entry.joinpath("environ").read_text().split("\0") if "=" in x
                )
                found[int(environment["RANK"])] = int(entry.name)
        except (OSError, KeyError):
            continue
    return [found[rank] for rank in sorted(found)]


def rows(run: Path) -> list[tuple]:
    """All that is stored of a run's evaluations but the seconds they took and when."""
    with sqlite3.connect(f"file:{run / 'experience.sqlite'}?mode=ro", uri=True) as database:
        return database.execute(
            "SELECT id, policy, log_perplexity, ratio, round, source FROM evaluations ORDER BY id"
        ).fetchall()


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def files(run: Path) -> dict[str, bytes]:
    """What a run holds but for times: statistics, library, predictor and agent."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


def _command(processes: int, program: tuple[str, ...]) -> list[str]:
    return [*TORCHRUN, str(processes), *program]


def _quick(processes: int, pause: float) -> list[str]:
    return _command(processes, ("--no-python", sys.executable, "-c", _QUICK, str(pause)))


def _how() -> dict:
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    return {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": "/"}

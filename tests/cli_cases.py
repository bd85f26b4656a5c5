"""Running the command line in tests: in this process where possible, in a new one where signals matter."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from ppf.cli import app

TESTS = Path(__file__).parent

# The real command in a real process, with short training, and a pause before each evaluation: time to be interrupted.
_SLOW_PPF = """
import signal, time, pytest
from factories import quick_learning
from ppf.cli import main
from ppf.fitting.evaluation import Evaluator
quick_learning(pytest.MonkeyPatch())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
measure = Evaluator.log_perplexities
Evaluator.chunk = 1
Evaluator.log_perplexities = lambda self, policies, tokens=None: (time.sleep(0.25), measure(self, policies, tokens))[1]
main()
"""


def ppf(*arguments: object):
    """The result of one command: ``exit_code``, ``stdout``, ``stderr``."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def answer(*arguments: object) -> dict:
    """The one JSON object that a command with --json prints, and nothing else."""
    result = ppf(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refusal(*arguments: object, field: str, value: object = "", code: int = 2) -> str:
    """The one line of a refused command, after checks that hold for all of them."""
    result = ppf(*arguments)
    assert result.exit_code == code and result.stdout == ""
    message = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(message) == 1 and "Traceback" not in result.stderr
    assert re.match(rf"Error: .*{re.escape(field)}.* = .*{re.escape(str(value))}", message[0]), message[0]
    assert message[0].count(". ") >= 1  # what is wrong, then the remedy
    error = json.loads(ppf(*arguments, "--json").stdout)["error"]
    assert set(error) == {"field", "value", "problem", "remedy"} and error["remedy"]
    assert field in error["field"] and str(value) in error["value"]
    return message[0]


def interrupted(arguments: list[object], run: Path, rows: int, kind: signal.Signals) -> tuple[int, str]:
    """Start a command in a new process, send ``kind`` once ``run`` holds ``rows``; its exit code and stderr."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _SLOW_PPF, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": "/"}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            deadline = time.monotonic() + 120
            while stored(run) < rows and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert process.poll() is None, process.stderr.read()
            process.send_signal(kind)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, errors


def stored(run: Path) -> int:
    """Rows that a process has committed so far."""
    file = run / "experience.sqlite"
    if not file.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
            return database.execute("SELECT COUNT(*) FROM evaluations").fetchone()[0]
    except sqlite3.OperationalError:  # the table is not there yet
        return 0

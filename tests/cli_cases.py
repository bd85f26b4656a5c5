"""Running the command line in tests: in this process where possible, in a new one where signals matter."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import fresh
from typer.testing import CliRunner

from ppf.cli import app
from ppf.fitting.run import Run

# The real command in a real process, with short training, and a pause before each evaluation: time to be interrupted.
_SLOW_PPF = """
import time, pytest
from factories import quick_learning
from ppf.cli import main
from ppf.fitting.evaluation import Evaluator
quick_learning(pytest.MonkeyPatch())
measure = Evaluator.log_perplexities
Evaluator.chunk = 1
Evaluator.log_perplexities = lambda self, policies, tokens=None: (time.sleep(0.1), measure(self, policies, tokens))[1]
main()
"""


QUICK = ("--evaluations", 40, "--ffn-multiple", 8, "--sequence-length", 32, "--calibration-tokens", 2048)
"""The settings of ``tiny_run``."""


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
    process = fresh.Process(_SLOW_PPF, *arguments)
    deadline = time.monotonic() + 120
    while stored(run) < rows and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    early = process.poll() is not None
    process.send_signal(kind)
    ended = process.ended(within=60)
    assert not early, ended.stderr
    return ended.returncode, ended.stderr


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


def fit_arguments(model: Path, text: Path, output: Path) -> list:
    return ["fit", model, "--text", text, "--output", output, "--device", "cpu", *QUICK]


def rows(run: Path) -> list:
    """A run's rows but for the seconds they took."""
    return [replace(row, seconds=0.0) for row in Run(run).experience.rows()]

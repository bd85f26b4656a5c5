"""SIGTERM and SIGHUP end a command as Ctrl-C does: at any moment of writing, with nothing left, and their own code."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time

import pytest
import torch
from factories import quick_learning

from ppf.cli import main
from ppf.cli.signals import Ended, heed


def ended(arguments: list[object], number: signal.Signals, at: int, errors) -> int:
    """The exit code of a command, in a process of its own, that gets a signal in its ``at``-th fsync."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _run(arguments, at, writing, errors)
    os.close(writing)
    assert os.read(reading, 1) == b"x", errors.read_text()  # nothing comes from a command that ends before
    os.kill(child, number)
    status = os.waitpid(child, 0)[1]
    os.close(reading)
    return os.waitstatus_to_exitcode(status)


def _run(arguments: list[object], at: int, writing: int, errors) -> None:
    torch.set_num_threads(1)
    quick_learning(pytest.MonkeyPatch())
    os.dup2(os.open(errors, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
    sys.stderr = os.fdopen(2, "w")
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fsync, left = os.fsync, [at]

    def slow(handle: int) -> None:
        left[0] -= 1
        if not left[0]:
            os.write(writing, b"x")
            time.sleep(60)
        fsync(handle)

    os.fsync, sys.argv = slow, ["ppf", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        sys.stderr.flush()
        os._exit(stop.code)
    os._exit(0)


@pytest.mark.parametrize(
    "number, code, said",
    [
        (signal.SIGTERM, 143, "Ended by SIGTERM"),
        (signal.SIGHUP, 129, "Ended by SIGHUP"),
        (signal.SIGINT, 130, "Interrupted"),
    ],
)
def test_a_command_that_writes_a_result_leaves_nothing(tiny_run, tmp_path, number, code, said):
    arguments = ["prune", tiny_run / "run", "--ratio", "0.3", "--output", tmp_path / "out", "--device", "cpu"]
    for at in (1, 4):
        assert ended(arguments, number, at, tmp_path / "errors") == code
        last = (tmp_path / "errors").read_text().strip().splitlines()[-1]
        assert last == f"{said}. Nothing was written to OUT; evaluations of --search stay in RUN."
        assert os.listdir(tmp_path) == ["errors"]


def test_a_fit_goes_on_after_any_write(tiny_run, tmp_path):
    arguments = [
        "fit", tiny_run / "model", "--text", tiny_run / "text.txt", "--output", tmp_path / "run", "--evaluations", 24,
        "--ffn-multiple", 8, "--sequence-length", 32, "--calibration-tokens", 2048, "--device", "cpu",
    ]  # fmt: skip
    for at in (1, 2, 5, 9):
        assert ended(arguments, signal.SIGTERM, at, tmp_path / "errors") == 143
        assert "Start the same command again: it goes on" in (tmp_path / "errors").read_text()
        left = [name for _, _, names in os.walk(tmp_path) for name in names if re.search(r"tmp$|lock$", name)]
        assert not left
    shutil.rmtree(tmp_path / "run")


def test_a_process_that_was_told_to_ignore_hangups_does(monkeypatch):
    before = signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        heed()
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Ended, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)  # the same wish: what clears away is not disturbed
        time.sleep(0.01)
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])

"""Commands that are ended from outside: by a full or broken disk, Ctrl-C, kill -9."""

import itertools
import json
import signal
import subprocess
from pathlib import Path

import pytest
from cli_cases import answer, fit_arguments, interrupted, ppf, refusal, rows
from factories import quick_learning

from ppf.checkpoint import writing
from ppf.fitting.session import Session
from ppf.storage import files

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_learning(monkeypatch)


@pytest.fixture
def run(tiny_run) -> Path:
    return tiny_run / "run"


def test_no_space_left(run, tiny_run, tmp_path):
    """A real file system of 64 KB: a result and a run do not fit, and leave nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        arguments = ("prune", run, "--ratio", 0.3, "--output", disk / "out")
        assert "no space left" in refusal(*arguments, field="output", value=disk / "out")
        with pytest.MonkeyPatch.context() as patch:  # the estimate passes, the writing fails
            patch.setattr(writing, "require_space", lambda *_: None)
            assert "no space left" in refusal(*arguments, field="output", value=disk / "out")
        assert list(disk.iterdir()) == []
        fit = fit_arguments(tiny_run / "model", tiny_run / "text.txt", disk / "run")
        assert "no space left" in refusal(*fit, field="output", value=disk / "run")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_the_disk_says_is_one_line(run, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, "rename", broken)
    result = ppf("prune", run, "--ratio", 0.3, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "Input/output error" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_fit_resumes(tiny_run, tmp_path, kind):
    """Ctrl-C and kill -9 in a real process: no row is lost or doubled, and the finished run is as if never stopped."""
    output = tmp_path / "run"
    arguments = fit_arguments(tiny_run / "model", tiny_run / "text.txt", output)
    code, errors = interrupted(arguments, output, 15, kind)
    kept = rows(output)
    assert 15 <= len(kept) < 40 and kept == rows(tiny_run / "run")[: len(kept)]
    if kind is signal.SIGINT:
        assert code == 130 and "Traceback" not in errors
        assert [line for line in errors.splitlines() if "Start the same command again" in line]
    else:
        assert code == -signal.SIGKILL
    assert "ppf fit" in refusal("policy", output, "--ratio", 0.3, field="run", value=output)  # not finished yet
    assert answer(*arguments)["state"] == "complete"
    assert rows(output) == rows(tiny_run / "run")


def test_interrupting_another_command_writes_nothing(run, tmp_path, monkeypatch):
    tensors = Session.pruned_tensors

    def interrupted(self, *asked):
        """Ctrl-C once some have been written."""
        yield from itertools.islice(tensors(self, *asked), 9)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "pruned_tensors", interrupted)
    arguments = ("prune", run, "--ratio", 0.3, "--output", tmp_path / "out")
    result = ppf(*arguments)
    assert result.exit_code == 130 and result.stderr.splitlines()[-1].startswith("Interrupted. Nothing was written")
    assert json.loads(ppf(*arguments, "--json").stdout)["error"]["problem"] == "interrupted"
    assert list(tmp_path.iterdir()) == []

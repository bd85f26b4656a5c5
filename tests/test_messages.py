"""One line, whatever happens: odd characters, numbers out of range, what the system refuses, what nobody foresaw."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer
from cli_cases import ppf, refusal
from factories import TINY

from ppf import cli
from ppf.cli import unforeseen
from ppf.cli.options import COUNT
from ppf.errors import InputError, printable, shown
from ppf.storage.files import write_errors_named, write_text

# Their values are looked at where it is known what they are for; the tests of budgets and of `generate` do that.
_CHECKED_ELSEWHERE = {"ratio", "memory_gb", "flops", "latency_ms", "tokens_per_second", "temperature"}


def numbers() -> list[tuple[str, str, typer.models.OptionInfo]]:
    """(command, option, what typer knows) of every option that is a number."""
    found = []
    for command in (c for group in cli._GROUPS.values() for c in group.values()):
        hints = typing.get_type_hints(command, {**vars(sys.modules[command.__module__]), "Path": Path}, None, True)
        for name, hint in hints.items():
            kind = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else None
            if {int, float} & {kind, *typing.get_args(kind)}:
                found.append((command.__name__, name, hint.__metadata__[0]))
    return found


def test_every_number_on_the_command_line_has_its_range():
    found = numbers()
    assert len(found) > 50
    missing = [(command, name) for command, name, option in found if option.callback is None]
    assert {name for _, name in missing} <= _CHECKED_ELSEWHERE, missing


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e308", "-1", "0", "1e-320"])
@pytest.mark.parametrize("option", ["ratio", "memory-gb", "flops"])
def test_sizes_out_of_range_are_refused(option, value, tiny_run):
    done = ppf("policy", tiny_run / "run", f"--{option}={value}")
    possible = (option, value) in {("ratio", "0"), ("ratio", "1e-320"), ("memory-gb", "1e308"), ("flops", "1e308")}
    assert done.exit_code == 2 or possible, done.stderr
    assert done.exit_code == 0 or f"{option} = " in done.stderr


_OUTSIDE = [math.nan, math.inf, -math.inf, -1, 0, 10**9 + 1, 10**30, -(10**30), 10**5000, 1e308]


@pytest.mark.parametrize("value", _OUTSIDE, ids=list(range(len(_OUTSIDE))))
def test_ranges(value):
    class Option:
        name = "max_new_tokens"

    with pytest.raises(InputError, match=r"max-new-tokens = .*: is out of range\. Use a .*number from 1 to 1,000"):
        COUNT(Option(), value)
    assert COUNT(Option(), None) is None and COUNT(Option(), 3) == 3


@pytest.mark.parametrize("value", ["nan", "-1", "1e-320", "1e308", "inf"])
def test_temperatures_have_a_range(value):
    refusal("generate", TINY, "--prompt", "a", f"--temperature={value}", field="temperature")


def test_values_are_shown_short_and_without_codes():
    assert shown("a\x1b[31mb\n\udcff\u202e") == "a\\x1b[31mb\\n\\udcff\\u202e"
    assert len(shown("x" * 10**6)) <= 200 and len(shown([0] * 10**5)) <= 200
    assert "too large" in shown(10**5000)
    assert printable("a\tb\n\x1b\r") == "a\tb\n\\x1b\\r"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("2048 requested and 512 written"), "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left"),
        (OSError("something"), "cannot be written (something)"),
        (OSError(errno.EIO, "Input/output error"), "cannot be written (Input/output error)"),
        (RuntimeError("I/O error: Permission denied (os error 13)"), "cannot be written (Permission denied)"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left"),
    ],
    ids=str,
)
def test_what_keeps_a_folder_from_being_written_names_it(error, said, tmp_path):
    with pytest.raises(InputError) as caught, write_errors_named(tmp_path / "out"):
        raise error
    assert said in str(caught.value) and str(tmp_path / "out") in str(caught.value)


def test_errors_about_other_places_pass_through(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/x"), ValueError("x"), KeyError("x")):
        with pytest.raises(type(error)), write_errors_named(tmp_path / "out"):
            raise error
    with pytest.raises(InputError), write_errors_named(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".out.tmp" / "x"))


def test_names_of_any_bytes_are_written(tmp_path):
    write_text(tmp_path / "page.html", "a\udcff")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "a\\udcff"


@pytest.mark.parametrize(("encoding", "options"), [("ascii", []), ("latin-1", ["--json"])])
def test_encodings_end_no_command(encoding, options, tmp_path):
    folder = os.fsencode(tmp_path) + b"/model-\xff\xe2\x96\x88"
    shutil.copytree(os.fsencode(TINY), folder)
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    command = [sys.executable, "-m", "ppf", "info", folder, *options]
    done = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if options:
        assert json.loads(done.stdout)["path"] == os.fsdecode(folder)
    else:
        assert b"#" in done.stdout and b"\\udcff" in done.stdout  # bars and names, as far as ASCII has them


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A command line whose commands fail as nobody foresaw; tracebacks go to ``tmp_path``."""

    def fail(prog_name):
        raise ZeroDivisionError("division\x1b by zero")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "heed", lambda: None)
    monkeypatch.delenv(unforeseen.SWITCH, raising=False)
    monkeypatch.setattr(sys, "argv", ["ppf", "info", "--json"])


def stopped() -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_what_nobody_foresaw_is_one_line_and_a_file(broken, capsys):
    assert stopped() == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "ZeroDivisionError: division\\x1b by zero" in err and "Traceback" not in err
    error = json.loads(out)["error"]
    assert error["traceback"] in err and "Traceback" in Path(error["traceback"]).read_text()
    assert Path(error["traceback"]).stat().st_mode & 0o777 == 0o600


def test_its_traceback_is_shown_where_it_cannot_be_saved_or_is_asked_for(broken, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    assert stopped() == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv(unforeseen.SWITCH, "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_machine_without_memory_is_told_so(monkeypatch):
    def fill(*_):
        raise MemoryError

    monkeypatch.setattr(sys.modules["ppf.cli.info"], "_checkpoint_facts", fill)
    done = ppf("info", TINY)
    assert done.exit_code == 1 and "this machine's memory does not hold" in done.stderr


def test_a_file_that_may_not_be_read_is_not_called_damaged(monkeypatch):
    def forbid(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/a/config.json")

    monkeypatch.setattr(sys.modules["ppf.cli.info"], "_checkpoint_facts", forbid)
    done = ppf("info", TINY)
    assert done.exit_code == 1 and "/a/config.json: Permission denied. Get the right to use it" in done.stderr

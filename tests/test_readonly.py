"""Runs that may not be written can be asked, and users without a home, a name or a cache can ask them."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import stat
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_cases import answer, ppf, refusal
from safetensors.torch import save_file

from ppf.checkpoint import gguf
from ppf.errors import InputError
from ppf.fitting.experience import Experience
from ppf.fitting.run import Run
from ppf.model.policy import Policy
from ppf.storage import files
from ppf.storage.locks import locked_result

_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2


def without_rights(work: Callable[[], None]) -> None:
    """Run ``work`` in a process that permissions bind, also where the tests run as root, and that has neither a home
    nor a name. Raises ``AssertionError`` if it fails."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            _drop_rights()
            _forget_home()
            work()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def _drop_rights() -> None:
    """capset(2): root without its right to pass over permissions."""
    library = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert library.capget(header, sets) == 0
    for place in range(3):
        sets[place] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    assert library.capset(header, sets) == 0


def _forget_home() -> None:
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    for name in ("HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR"):
        os.environ[name] = "/proc/nowhere"

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    pwd.getpwuid = unknown


def protect(folder: Path, mode: int) -> None:
    """Give all folders ``mode``, and all files what of it files have."""
    for place in (folder, *folder.rglob("*")):
        place.chmod(mode if place.is_dir() else mode & 0o666)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.stat().st_size) for f in sorted(folder.rglob("*"))}


def append(run: Run, width: int) -> None:
    """One more row, as a search adds it."""
    policy = Policy([1, 2, 2, 2], [8, 8, 8, width])
    row = replace(run.experience.rows()[0], policy=policy, ratio=run.grid.ratio(policy), round=1000)
    run.experience.append(row)


def kill_a_search(run: Path) -> None:
    """Leave what a search leaves that is killed after a row: a write-ahead log and its index."""
    child = os.fork()
    if not child:
        append(Run(run), 8)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("left", ["nothing", "a log", "a log without its index"])
def test_a_run_that_may_not_be_written_is_asked(tiny_run, tmp_path, left):
    run, rows = shutil.copytree(tiny_run / "run", tmp_path / "run"), 40
    if left != "nothing":
        kill_a_search(run)
        rows = 41
    if left == "a log without its index":
        (run / "experience.sqlite-shm").unlink()
    protect(run, 0o555)
    before = state(run)

    def ask() -> None:
        with pytest.raises(PermissionError):
            (run / "new").write_text("x")
        assert answer("info", run)["experience"]["rows"] == rows
        assert answer("policy", run, "--ratio", "0.3")["delivered_ratio"] > 0.2
        if left == "nothing":
            ask_more()

    def ask_more() -> None:
        command = "prune", run, "--ratio", "0.3", "--output", tmp_path / "out", "--device", "cpu"
        assert ppf(*command).exit_code == 0 and ppf(*command, "--force").exit_code == 0
        line = refusal(*command[:-4], "--output", tmp_path / "other", "--search", "4", "--device", "cpu", field="run")
        assert "Permission denied" in line

    without_rights(ask)
    protect(run, 0o755)
    assert state(run) == before and not (tmp_path / "other").exists()


def test_a_reader_leaves_nothing_beside_the_store(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run / "run", tmp_path / "run")
    before = state(run)
    assert len(Run(run).experience) == 40
    kill_a_search(run)
    assert len(Run(run).experience) == 41
    assert {*state(run)} - {*before} == {"experience.sqlite-wal", "experience.sqlite-shm"}
    writer = Run(run)
    append(writer, 16)
    writer.experience.close()
    assert {*state(run)} == {*before} and len(Run(run).experience) == 42


def test_a_reader_sees_what_a_writer_writes_meanwhile(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run / "run", tmp_path / "run")
    writer, reader = Run(run), Run(run)
    for count, width in enumerate((8, 16, 24), 41):
        append(writer, width)
        assert len(reader.experience) == count
    writer.experience.close()
    assert len(reader.experience) == 43


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        files.write_json(tmp_path / "a.json", 1)
        files.write_safetensors(tmp_path / "b.safetensors", {"x": torch.zeros(2)})
        Experience(tmp_path / "c.sqlite").close()
        with files.new_directory(tmp_path / "d") as folder:
            save_file({"x": torch.zeros(2)}, folder / "e.safetensors")
    finally:
        os.umask(before)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in tmp_path.rglob("*")}
    assert modes == {"a.json": 0o664, "b.safetensors": 0o664, "c.sqlite": 0o664, "d": 0o775, "e.safetensors": 0o664}


def test_a_finished_run_is_for_everybody_that_the_umask_allows(tiny_run):
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tiny_run / "run").rglob("*.*")} == {0o666 & ~mask}


def test_a_cache_that_is_needed_is_named():
    def ask() -> None:
        with pytest.raises(InputError, match="XDG_CACHE_HOME = .*you have no home"):
            gguf._cache()
        os.environ["XDG_CACHE_HOME"] = "/proc/nowhere"
        lock = locked_result(gguf._cache() / "gguf" / "model", "XDG_CACHE_HOME")
        with pytest.raises(InputError, match="XDG_CACHE_HOME = .*cannot be written"), lock:
            pass

    without_rights(ask)

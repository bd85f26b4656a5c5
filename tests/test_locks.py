"""Locks: one command writes, the others are told who does, or wait; whatever a dead one left is nobody's."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest

from ppf.errors import InputError
from ppf.storage import files, lock_file
from ppf.storage.locks import INSIDE, for_all, locked_folder, locked_result, sweep, waiting


@contextmanager
def elsewhere(lock, path):
    """Another process holds ``lock(path)``; yields its id."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with lock(path):
            os.write(writing, b"x")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reading, 1) == b"x"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def refused(lock, path) -> str:
    with pytest.raises(InputError) as caught, lock(path):
        pass
    return str(caught.value)


@pytest.mark.parametrize("lock", [locked_folder, locked_result])
def test_a_second_process_is_told_who_holds_it(tmp_path, lock):
    with elsewhere(lock, tmp_path / "out") as child:
        message = refused(lock, tmp_path / "out")
    assert f"process {child} on {os.uname().nodename} (" in message and " since 20" in message and "--wait" in message
    assert message.count("\n") == 0


@pytest.mark.parametrize("one, other", [(locked_folder, locked_result), (locked_result, locked_folder)])
def test_what_is_written_in_place_is_not_replaced_meanwhile(tmp_path, one, other):
    with elsewhere(one, tmp_path / "out"):
        assert "is being written by process" in refused(other, tmp_path / "out")


@pytest.mark.parametrize("lock", [locked_folder, locked_result])
def test_nothing_is_left_of_a_lock(tmp_path, lock):
    with lock(tmp_path / "deep" / "out"):
        assert [name for _, _, names in os.walk(tmp_path) for name in names]
    assert os.listdir(tmp_path) == []  # folders that were made and stayed empty go, too


def test_a_killed_process_holds_nothing_and_what_it_left_is_swept(tmp_path):
    with elsewhere(locked_result, tmp_path / "out"):
        for name in (".out.0123abcd.tmp", ".other.0123abcd.tmp", ".out.old", ".out.0123abcg.tmp"):
            (tmp_path / name).mkdir()
        (tmp_path / ".out.0123abcd.tmp" / "half").write_text("x")
    with locked_result(tmp_path / "out"):
        pass
    # What has no lock beside it may be somebody's who needs none.
    assert sorted(os.listdir(tmp_path)) == [".other.0123abcd.tmp", ".out.0123abcg.tmp", ".out.old"]


def test_leftovers_of_other_results_are_swept_and_never_a_live_ones(tmp_path):
    with elsewhere(locked_result, tmp_path / "dead"):
        (tmp_path / ".dead.0123abcd.tmp").mkdir()
    with elsewhere(locked_result, tmp_path / "live"):
        (tmp_path / ".live.0123abcd.tmp").mkdir()
        with locked_result(tmp_path / "out"):
            pass
        assert sorted(os.listdir(tmp_path)) == [".live.0123abcd.tmp", ".live.ppf-lock"]


def test_a_folder_is_swept_by_who_holds_it(tmp_path):
    (tmp_path / "statistics").mkdir()
    left = [tmp_path / ".run.json.0123abcd.tmp", tmp_path / "statistics" / ".layer-000.safetensors.0123abcd.tmp"]
    for file in left:
        file.write_text("x")
    sweep(tmp_path)
    assert all(file.exists() for file in left)  # nobody holds it
    with locked_folder(tmp_path):
        sweep(tmp_path, "rounds.json")
        assert all(file.exists() for file in left)
        sweep(tmp_path)
    assert os.listdir(tmp_path) == ["statistics"] and os.listdir(tmp_path / "statistics") == []


def test_waiting_ends_with_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_file, "_POLL_SECONDS", 0.01)
    with elsewhere(locked_folder, tmp_path) as child:
        threading.Timer(0.3, os.kill, (child, signal.SIGKILL)).start()
        begun = time.monotonic()
        with (
            pytest.warns(UserWarning, match=f"waiting for process {child} on "),
            waiting(True),
            locked_folder(tmp_path),
        ):
            assert time.monotonic() - begun > 0.25
    assert "being written" not in os.listdir(tmp_path)


def test_only_one_of_many_is_inside(tmp_path, monkeypatch):
    """Locks that vanish with their holders are taken over and over, also by those who had opened a vanished one."""
    monkeypatch.setattr(lock_file, "_POLL_SECONDS", 0.0005)
    (tmp_path / "count").write_text("0")
    children = []
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            with waiting(True):
                for _ in range(40):
                    with locked_result(tmp_path / "out"):
                        seen = int((tmp_path / "count").read_text())
                        time.sleep(0.0005)
                        (tmp_path / "count").write_text(str(seen + 1))
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert (tmp_path / "count").read_text() == "160" and os.listdir(tmp_path) == ["count"]


def test_who_calls_itself_does_not_wait_for_itself_but_another_thread_does(tmp_path):
    said = []
    with locked_folder(tmp_path), for_all(lambda: locked_folder(tmp_path)):
        thread = threading.Thread(target=lambda: said.append(refused(locked_folder, tmp_path)))
        thread.start()
        thread.join()
        assert f"process {os.getpid()} " in said[0] and (tmp_path / INSIDE).exists()
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_named_and_nothing_swept(tmp_path, monkeypatch):
    def none_here(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none_here)
    (tmp_path / ".out.0123abcd.tmp").mkdir()
    with pytest.warns(UserWarning, match="has no locks: start no other command"), locked_result(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == [".out.0123abcd.tmp"]


def test_a_dead_lock_of_another_user_is_replaced(tmp_path, monkeypatch):
    """Its file may not be written, but the folder may."""
    (tmp_path / INSIDE).write_text("{}")
    theirs, real = (tmp_path / INSIDE).stat().st_ino, os.open

    def not_theirs(file, flags, *mode, **more):
        if flags & os.O_RDWR and os.path.exists(file) and os.stat(file).st_ino == theirs:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, flags, *mode, **more)

    held = real(tmp_path / INSIDE, os.O_RDONLY)  # so that the number of the file is not given again
    monkeypatch.setattr(os, "open", not_theirs)
    with locked_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / INSIDE).read_text()
    os.close(held)


def test_an_output_with_a_dead_lock_in_it_is_empty(tmp_path):
    with elsewhere(locked_folder, tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == [INSIDE]
    with files.new_directory(tmp_path / "out") as folder:
        (folder / "new").write_text("x")
    assert os.listdir(tmp_path / "out") == ["new"] and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    for lock, path in ((locked_folder, tmp_path / "file"), (locked_result, tmp_path / "file" / "out")):
        assert f"{tmp_path / 'file'} is not a folder" in refused(lock, path)

"""kill -9 at any moment of writing: what stood stands, the next command finds its way, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import threading

import pytest
from kill_cases import content, every_kill

from ppf.deliver.recovery.state import Unfinished
from ppf.errors import InputError
from ppf.fitting.experience import Experience
from ppf.lab import comparison
from ppf.storage import files
from ppf.storage.locks import locked_folder, locked_result, sweep

OLD, NEW = {"old": "old", "old2": "old"}, {"new": "new", "sub": None, "sub/new2": "new"}


def write(path, force=False):
    with files.new_directory(path, force) as folder:
        (folder / "sub").mkdir()
        for name, text in NEW.items():
            if text:
                (folder / name).write_text(text)


def old_at(out) -> None:
    shutil.rmtree(out.parent, ignore_errors=True)
    out.mkdir(parents=True)
    for name, text in OLD.items():
        (out / name).write_text(text)


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    out, seen, gone = tmp_path / "place" / "out", [], 0
    old_at(out)
    for _ in every_kill(lambda: write(out, force=True)):
        gone += not out.exists()
        with locked_result(out):  # as the next command does
            assert sorted(os.listdir(out.parent)) == [".out.ppf-lock", "out"]
        assert content(out) in (OLD, NEW)
        seen.append(content(out) == NEW)
        old_at(out)
    assert content(out) == NEW and len(seen) >= 10 and {*seen} == {False, True}
    assert gone == (0 if in_one_step else 1)


def test_an_observer_always_finds_a_version(tmp_path):
    """What is looked for while it is replaced is there, at every moment."""
    out, done, missed = tmp_path / "place" / "out", threading.Event(), []

    def look():
        while not done.is_set():
            if not (out / "new").exists() and not (out / "old").exists() and not (out / "new").exists():
                missed.append(1)

    old_at(out)
    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(30):
        write(out, force=True)
    done.set()
    watcher.join()
    assert not missed


def test_a_folder_that_was_never_there_leaves_nothing(tmp_path):
    out, kills = tmp_path / "deep" / "out", 0
    for _ in every_kill(lambda: write(out)):
        kills += 1
        if out.exists():
            assert content(out) == NEW
            shutil.rmtree(out)
        write(out)
        assert content(out.parent) == {"out": None} | {f"out/{name}": text for name, text in NEW.items()}
        shutil.rmtree(out.parent)
    assert kills >= 8


def test_a_file_is_old_or_new(tmp_path):
    file = tmp_path / "run.json"
    files.write_json(file, 0)

    def work():
        with locked_folder(tmp_path):
            sweep(tmp_path)
            files.write_json(file, 1)

    for _ in every_kill(work):
        assert file.read_text() in ("0\n", "1\n")
        with locked_folder(tmp_path):
            sweep(tmp_path)
        assert os.listdir(tmp_path) == ["run.json"]
        files.write_json(file, 0)
    assert file.read_text() == "1\n"


def test_a_store_that_was_killed_when_it_began_begins_again(tmp_path):
    path = tmp_path / "experience.sqlite"

    def work():
        with locked_folder(tmp_path):
            Experience(path).close()

    for _ in every_kill(work):
        with locked_folder(tmp_path):
            sweep(tmp_path)
            assert len(Experience(path)) == 0
        assert os.listdir(tmp_path) == ["experience.sqlite"]
        path.unlink()


def test_a_comparison_that_was_killed_when_it_began_goes_on(tmp_path):
    out = tmp_path / "cmp"

    def ask(question=1):
        with locked_folder(out):
            comparison._ask(out, {"question": question})

    for _ in every_kill(ask):
        ask()
        assert sorted(os.listdir(out)) == ["cells", "question.json"]
        with pytest.raises(InputError, match="another run"):
            ask(2)
        shutil.rmtree(out)


def test_a_recovery_that_was_killed_between_its_steps_goes_on(tmp_path):
    """From its first file to the moment when the result stands and the state is still there."""
    out, question = tmp_path / "out", {"settings": {"seed": 1}}

    def work():
        with locked_result(out):
            state = Unfinished(out, question)
            state.begin()
            state.save({})
            write(out, force=True)
            state.remove()

    for _ in every_kill(work):
        work()
        assert os.listdir(tmp_path) == ["out"]
        shutil.rmtree(out)

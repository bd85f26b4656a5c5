"""Files and folders are either complete or not there."""

import json
import os

import pytest

from ppf.errors import InputError
from ppf.storage import files


def refusal(call, *arguments, **options) -> str:
    """The message of the ``InputError`` that ``call`` must raise."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def fill(path, force=False) -> None:
    with files.new_directory(path, force) as folder:
        (folder / "new").write_text("x")


def test_file_is_written_completely_or_not_at_all(tmp_path):
    target = tmp_path / "run.json"
    files.write_json(target, {"a": [1, 2.5]})
    assert json.loads(target.read_text()) == {"a": [1, 2.5]}

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(target, fail)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(target, float("nan"))
    assert json.loads(target.read_text()) == {"a": [1, 2.5]} and os.listdir(tmp_path) == ["run.json"]


def test_full_disk_under_a_single_file(tmp_path):
    def fail(temporary):
        temporary.write_text("half")
        with open("/dev/full", "w") as full:
            full.write("x")

    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    assert "no space left" in refusal(files.write_atomically, tmp_path / "run.json", fail)
    assert os.listdir(tmp_path) == []


def test_folder_appears_when_it_is_complete(tmp_path):
    with files.new_directory(tmp_path / "a" / "b") as folder:
        (folder / "new").write_text("x")
        assert folder.parent == tmp_path / "a" and not (tmp_path / "a" / "b").exists()
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "a" / "b") == ["new"]


def test_forced_folder_is_replaced_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert "--force" in refusal(fill, tmp_path / "link")
    fill(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "real") == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_old_folder_comes_back_if_a_swap_in_two_steps_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    rename = os.rename

    def fail_on_new(source, target):
        if (source / "new").exists():
            raise PermissionError("no")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", fail_on_new)
    with pytest.raises(PermissionError):
        fill(tmp_path / "out", force=True)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["old"]


def test_force_never_replaces_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    assert "working" in refusal(fill, tmp_path / "work", force=True)


def test_space_is_checked_on_the_file_system_of_a_path_to_be(tmp_path):
    files.require_space(tmp_path / "not" / "yet", 1)
    assert "MB needed" in refusal(files.require_space, tmp_path / "not" / "yet", 1 << 60)

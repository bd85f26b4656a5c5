"""SHA-256 of files: right, several at a time, not twice for a file that stayed, and again for one that changed."""

import hashlib
import os
from pathlib import Path

import pytest

import ppf
from ppf.checkpoint import hashes

BUNDLED = sorted((Path(ppf.__file__).parent / "data" / "tiny-2m").iterdir())


@pytest.fixture
def read(monkeypatch) -> list[Path]:
    """The files that are read to be hashed, by a process that knows none yet."""
    found, digest = [], hashes._digest
    monkeypatch.setattr(hashes, "_known", {})
    monkeypatch.setattr(hashes, "_digest", lambda file: found.append(file) or digest(file))
    return found


def test_a_file_that_stayed_is_read_once(read):
    folder = BUNDLED[0].parent
    first = hashes.hash_folder(folder)
    assert first == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in BUNDLED}
    assert sorted(read) == BUNDLED
    assert hashes.hash_folder(folder) == first and hashes.sha256_of(BUNDLED[0]) == first[BUNDLED[0].name]
    assert sorted(read) == BUNDLED


@pytest.mark.parametrize("in_place", [True, False])
def test_a_change_shows_whatever_its_times_say(read, tmp_path, in_place):
    """Of the same size and with the old time, written into the file or over it, at once after it was hashed."""
    file = tmp_path / "file"
    file.write_bytes(b"one")
    before, first = file.stat(), hashes.sha256_of(file)
    target = file if in_place else tmp_path / "other"
    target.write_bytes(b"two")
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    target.replace(file)
    assert hashes.sha256_of(file) == hashlib.sha256(b"two").hexdigest() != first


def test_no_files_at_all():
    assert hashes._sha256s([]) == []


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        hashes.sha256_of(tmp_path / "nothing")

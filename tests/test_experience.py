"""Experience: append-only, one row a policy, and nothing acknowledged is ever lost."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ppf.errors import InputError
from ppf.fitting.experience import Evaluation, Experience
from ppf.model.policy import Policy


def row(index: int, round: int = 0) -> Evaluation:
    return Evaluation(Policy([index, 1], [64, 128]), 3.5 + index / 7, index / 100, round, "random", 0.25)


@pytest.fixture
def store(tmp_path) -> Experience:
    return Experience(tmp_path / "experience.sqlite")


def test_rows_come_back_as_they_were(store):
    rows = [row(index, index // 3) for index in range(7)]
    for each in rows:
        store.append(each)
    assert store.rows() == rows and len(store) == 7
    assert store.rows(before_round=1) == rows[:3] and store.rows(before_round=0) == []
    store.close()
    assert Experience(store.path).rows() == rows


def test_lookup(store):
    store.append(row(3))
    assert store.lookup(row(3).policy) == row(3).log_perplexity
    assert store.lookup(row(4).policy) is None


def test_a_policy_is_stored_once(store):
    store.append(row(1))
    with pytest.raises(ValueError, match="stored already"):
        store.append(replace(row(1), log_perplexity=1.0))
    assert store.rows() == [row(1)]


def test_nan_is_not_stored(store):
    with pytest.raises(ValueError, match="NOT NULL"):
        store.append(replace(row(1), log_perplexity=float("nan")))
    assert len(store) == 0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE evaluations SET log_perplexity = 1",
        "DELETE FROM evaluations",
        "DELETE FROM evaluations WHERE id = 1",
        "INSERT OR REPLACE INTO evaluations (id, policy, log_perplexity, ratio, round, source, seconds) "
        "SELECT id, policy, 1.0, ratio, round, source, seconds FROM evaluations",
    ],
)
def test_append_only_for_every_connection(store, statement):
    store.append(row(1))
    other = sqlite3.connect(store.path)
    with pytest.raises(sqlite3.DatabaseError, match="append-only"), other:
        other.execute(statement)
    assert store.rows() == [row(1)]


# The store needs neither torch nor transformers; a bare package spares the writer six seconds of imports.
_WRITER = """
import sys, types
package = types.ModuleType("ppf")
package.__path__ = ["ppf"]
sys.modules["ppf"] = package
from ppf.fitting.experience import Evaluation, Experience
from ppf.model.policy import Policy
store = Experience(sys.argv[1])
for index in range(len(store), 10**6):
    store.append(Evaluation(Policy([index], [64]), 3.5, 0.25, 0, "random", 0.0))
    print(index, flush=True)
"""


def test_kill_9_loses_no_acknowledged_row(tmp_path):
    path, draw, acknowledged = tmp_path / "experience.sqlite", random.Random(0), 0
    for _ in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        first = writer.stdout.readline()
        time.sleep(draw.uniform(0.02, 0.2))
        writer.send_signal(signal.SIGKILL)
        lines = [first, *writer.stdout.read().splitlines()]
        writer.wait()
        store = Experience(path)
        rows = store.rows()
        complete = [line for line in lines if line.strip()]
        assert len(complete) > 3 and int(complete[0]) == acknowledged
        # The last row may be stored and not yet reported, never the other way round.
        assert len(rows) - int(complete[-1]) in (1, 2)
        assert [r.policy.attention[0] for r in rows] == list(range(len(rows)))
        # What keeps a kill in the middle of a write harmless; five kills may all miss that moment.
        assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        acknowledged = len(rows)
        store.close()


@pytest.mark.parametrize(
    "content", [b"not a database at all, by any means " * 40, b"SQLite format 3\x00" + b"\x07" * 4096]
)
def test_corrupt_files_are_refused(tmp_path, content):
    path = tmp_path / "experience.sqlite"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        Experience(path)
    assert caught.value.field == "experience" and "Restore" in caught.value.remedy
    assert path.read_bytes() == content


def test_a_file_damaged_in_the_middle_is_refused_when_read(tmp_path):
    path = tmp_path / "experience.sqlite"
    store = Experience(path)
    for index in range(300):
        store.append(row(index))
    store.close()
    data = bytearray(path.read_bytes())
    assert len(data) > 5 * 4096
    data[2 * 4096 :] = b"\xa5" * (len(data) - 2 * 4096)
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        Experience(path).rows()
    assert caught.value.field == "experience"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be written .No such file or directory"):
        Experience(tmp_path / "nowhere" / "experience.sqlite")


def test_a_locked_store_says_so(store, monkeypatch):
    store.append(row(1))
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store._db.execute("PRAGMA busy_timeout = 50")
    with pytest.raises(InputError, match="locked.*end other commands"):
        store.append(row(2))
    other.execute("ROLLBACK")
    store.append(row(2))
    assert len(store) == 2


def test_a_pipe_in_its_place_is_refused_at_once(tmp_path):
    """SQLite would wait for what it may say."""
    os.mkfifo(tmp_path / "e.sqlite")
    with pytest.raises(InputError, match="e.sqlite"):
        Experience(tmp_path / "e.sqlite").rows()

"""An SQLite file that many may read and one command writes; reading changes nothing, also where nothing may be changed.

A write-ahead log keeps every committed row when the writer is killed. SQLite itself needs a log and its index beside
the file even to read it; here a reader makes neither.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ..storage.files import write_atomically


class Database:
    """The file ``path``, whose tables the script ``schema`` makes where they are not there. All methods but
    :meth:`close` raise ``sqlite3.DatabaseError``, and :meth:`begin` also ``InputError`` for what cannot be written."""

    def __init__(self, path: Path, schema: str):
        self.path, self._schema = path, schema
        self._connection: sqlite3.Connection | None = None  # for writing, from the first write on

    def begin(self) -> None:
        """Make the file if there is none: complete at once, so that no kill leaves a part of it."""

        def make(temporary: Path) -> None:
            with closing(sqlite3.connect(temporary, isolation_level=None)) as database:
                database.executescript(self._schema)

        if not self.path.exists() or not self.path.stat().st_size:
            write_atomically(self.path, make)

    def execute(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """Execute a ``statement`` that writes, or is part of a transaction."""
        if self._connection is None:
            self._connection = sqlite3.connect(self.path, isolation_level=None)
            self._connection.executescript(self._schema)
        return self._connection.execute(statement, values)

    @property
    def in_transaction(self) -> bool:
        return self._connection is not None and self._connection.in_transaction

    def read(self, query: str, values: Sequence[object] = ()) -> list[tuple]:
        """The rows of a ``query``."""
        if self._connection is not None:
            return self._connection.execute(query, values).fetchall()
        try:
            return self._read(query, values)
        except OSError as error:
            raise sqlite3.OperationalError(f"unable to open it: {error.strerror}") from None

    def close(self) -> None:
        """Fold the log into the file, which can be copied then."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read(self, query: str, values: Sequence[object]) -> list[tuple]:
        """Without a log the file is all there is. With one, a command is writing now or was killed: then its index is
        there too, or log and file are read from a copy. What came while the file was read may have changed it: it is
        read again."""
        log, index = (self.path.with_name(self.path.name + ending) for ending in ("-wal", "-shm"))
        while True:
            logged = log.exists()
            try:
                if logged and not index.exists():
                    return _from_copy(self.path, log, query, values)
                found = _rows(self.path, "mode=ro" if logged else "mode=ro&immutable=1", query, values)
            except (OSError, sqlite3.DatabaseError):
                if log.exists() == logged:
                    raise
                continue
            if log.exists() == logged:
                return found


def _rows(path: Path, how: str, query: str, values: Sequence[object]) -> list[tuple]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as database:
        return database.execute(query, values).fetchall()


def _from_copy(path: Path, log: Path, query: str, values: Sequence[object]) -> list[tuple]:
    with tempfile.TemporaryDirectory(prefix="ppf-experience-") as folder:
        for file in (path, log):
            shutil.copyfile(file, Path(folder) / file.name)
        return _rows(Path(folder) / path.name, "mode=ro", query, values)

"""Experience: the stored (policy → measured log-perplexity) pairs. Append-only; survives a kill at any moment.

Every row has a checksum over itself and the row before, the first one over whose store it is: a value that changed on
disk is found when it is read, and so are a row that is lost between others and a store of another run.
"""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from ..errors import InputError
from ..model.policy import Policy
from ..storage.checksums import checksum
from .database import Database

# One row is one transaction. WAL with synchronous=NORMAL keeps every committed row when the process is killed, and
# loses at most the last rows, never the file, when the machine loses power.
_JOURNAL = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
"""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS evaluations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    policy TEXT NOT NULL UNIQUE,
    log_perplexity REAL NOT NULL,
    ratio REAL NOT NULL,
    round INTEGER NOT NULL,
    source TEXT NOT NULL,
    seconds REAL NOT NULL,
    created TEXT NOT NULL,
    checksum TEXT NOT NULL
);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON evaluations BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON evaluations BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_replace BEFORE INSERT ON evaluations
WHEN EXISTS (SELECT 1 FROM evaluations WHERE policy = NEW.policy OR id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'append-only: this policy is stored already'); END;
"""
_COLUMNS = "id, policy, log_perplexity, ratio, round, source, seconds, created, checksum"
_REMEDY = "Restore the file from a copy, or fit into a new RUN"


SEARCH_ROUND = 1000
"""The round of what was measured after a fit, by searches say."""


@dataclass(frozen=True)
class Evaluation:
    """One measurement: ``log_perplexity`` in nats per token, ``round`` of the fit loop, what proposed it, seconds."""

    policy: Policy
    log_perplexity: float
    ratio: float
    round: int
    source: str
    seconds: float


class _Row(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A row as it is stored."""

    id: int
    policy: str
    log_perplexity: float
    ratio: float
    round: int
    source: str
    seconds: float
    created: str
    checksum: str

    def digest(self, before: str) -> str:
        """Its checksum behind a row with the checksum ``before``."""
        numbers = (value.hex() for value in (self.log_perplexity, self.ratio, self.seconds))
        texts = self.policy, self.source, self.created
        return checksum(before, str(self.id), str(self.round), *texts, *numbers)

    def evaluation(self) -> Evaluation:
        """Raises ``ValueError`` (``InputError`` is one) for what is no policy or no number."""
        if not all(map(math.isfinite, (self.log_perplexity, self.ratio, self.seconds))):
            raise ValueError("it holds numbers that are not finite")
        policy = Policy.from_json(self.policy)
        return Evaluation(policy, self.log_perplexity, self.ratio, self.round, self.source, self.seconds)


class Experience:
    """An SQLite store of evaluations, in order of arrival; a policy stands in it at most once.

    ``owner`` is whose it is, for instance a run's :attr:`ppf.storage.sealed.Sealed.owner`. A store that is not there
    is made, unless ``new`` is False: then it must be. ``check`` is given the rows that were read and raises
    ``InputError`` for those that cannot be. Rows are read, and checked, once: what others append meanwhile comes when
    it is asked for.
    """

    def __init__(
        self, path: str | Path, owner: str = "", new: bool = True,
        check: Callable[[Sequence[Evaluation]], None] | None = None,
    ):  # fmt: skip
        self.path, self._check = Path(path), check
        self._rows: list[Evaluation] = []
        self._values: dict[Policy, float] = {}
        self._last, self._chain = 0, [checksum(owner, self.path.name)]  # the checksums of all rows behind that
        self._require_file(new)
        self._db = Database(self.path, _JOURNAL + (_SCHEMA if new else ""))
        try:
            if new:
                self._db.begin()
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from None
        self._read("SELECT COUNT(*) FROM evaluations")

    def append(self, evaluation: Evaluation) -> None:
        """Store one row durably. Raises ``ValueError`` if its policy is already there."""
        try:
            self._db.execute("BEGIN IMMEDIATE")  # the row before must be the last one
            try:
                self._refresh()
                row = self._insert(evaluation)
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        except sqlite3.IntegrityError as error:
            raise ValueError(f"cannot store {evaluation}: {error}") from None
        except sqlite3.OperationalError as error:
            remedy = "Free some space, end other commands that write to this RUN, and start the command again"
            raise InputError("experience", self.path, str(error), remedy) from None
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from None
        self._take(row, evaluation)

    def rows(self, before_round: int | None = None) -> list[Evaluation]:
        """All rows in order, or those of the rounds before ``before_round``."""
        self._refresh()
        return [row for row in self._rows if before_round is None or row.round < before_round]

    def lookup(self, policy: Policy) -> float | None:
        """The measured log-perplexity of ``policy``, or None if it was never measured."""
        self._refresh()
        return self._values.get(policy)

    def __len__(self) -> int:
        self._refresh()
        return len(self._rows)

    @property
    def state(self) -> tuple[int, str]:
        """How many rows there are, and the checksum of the last one."""
        self._refresh()
        return len(self._rows), self._chain[-1]

    def require(self, rows: int, checksum: str) -> None:
        """Raise ``InputError`` unless the store begins with what it was when :attr:`state` said this."""
        self._refresh()
        if len(self._rows) < rows:
            raise self._damaged(f"holds {len(self._rows)} rows of at least {rows}: it is damaged")
        if self._chain[rows] != checksum:
            raise self._damaged("does not match its checksum: it is damaged, or belongs to another run")

    def close(self) -> None:
        self._db.close()

    def _require_file(self, new: bool) -> None:
        """What SQLite would call "unable to open", or make anew."""
        if not new and not self.path.exists():
            raise self._damaged("is missing")
        if self.path.exists() and not self.path.is_file():  # SQLite waits for ever for what a pipe may say
            raise self._damaged("is not a file")
        if self.path.exists() and not os.access(self.path, os.R_OK):
            remedy = "Ask whoever owns it for permission to read it"
            raise InputError("experience", self.path, "may not be read (permission denied)", remedy)

    def _insert(self, evaluation: Evaluation) -> _Row:
        created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        e = evaluation
        values = float(e.log_perplexity), float(e.ratio), int(e.round), e.source, float(e.seconds), created
        row = _Row(self._last + 1, e.policy.to_json(), *values, checksum="")
        row.checksum = row.digest(self._chain[-1])
        marks = ", ".join("?" * len(row.__struct_fields__))
        self._db.execute(f"INSERT INTO evaluations ({_COLUMNS}) VALUES ({marks})", msgspec.structs.astuple(row))
        return row

    def _refresh(self) -> None:
        """Read and check the rows that have come since."""
        query = f"SELECT {_COLUMNS} FROM evaluations WHERE id > ? ORDER BY id"
        found, before, evaluations = self._read(query, self._last), self._chain[-1], []
        for values in found:
            row, evaluation = self._parsed(values)
            if row.digest(before) != row.checksum:
                problem = f"row {row.id} does not match its checksum: the file is damaged, or belongs to another run"
                raise self._damaged(problem)
            before = row.checksum
            evaluations.append((row, evaluation))
        if self._check is not None and evaluations:
            try:
                self._check([evaluation for _, evaluation in evaluations])
            except InputError as error:
                raise self._damaged(f"holds {error.field} = {error.value}, which {error.problem}") from None
        for row, evaluation in evaluations:
            self._take(row, evaluation)

    def _take(self, row: _Row, evaluation: Evaluation) -> None:
        self._rows.append(evaluation)
        self._values[evaluation.policy] = evaluation.log_perplexity
        self._chain.append(row.checksum)
        self._last = row.id

    def _parsed(self, values: tuple) -> tuple[_Row, Evaluation]:
        try:
            row = msgspec.convert(values, _Row)
            return row, row.evaluation()
        except ValueError as error:  # msgspec's ValidationError and InputError are such
            raise self._damaged(f"row {values[0]} is damaged ({error})") from None

    def _read(self, query: str, *values: object) -> list[tuple]:
        try:
            return self._db.read(query, values)
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: sqlite3.DatabaseError) -> InputError:
        return self._damaged(f"is not a readable database ({error})")

    def _damaged(self, problem: str) -> InputError:
        return InputError("experience", self.path, problem, _REMEDY)

"""Experience: the stored (policy → measured log-perplexity) pairs. Append-only; survives a kill at any moment."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..model.policy import Policy

# One row is one transaction. WAL with synchronous=NORMAL keeps every committed row when the process is killed, and
# loses at most the last rows, never the file, when the machine loses power.
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS evaluations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    policy TEXT NOT NULL UNIQUE,
    log_perplexity REAL NOT NULL,
    ratio REAL NOT NULL,
    round INTEGER NOT NULL,
    source TEXT NOT NULL,
    seconds REAL NOT NULL,
    created TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON evaluations BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON evaluations BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_replace BEFORE INSERT ON evaluations
WHEN EXISTS (SELECT 1 FROM evaluations WHERE policy = NEW.policy OR id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'append-only: this policy is stored already'); END;
"""


@dataclass(frozen=True)
class Evaluation:
    """One measurement: ``log_perplexity`` in nats per token, ``round`` of the fit loop, what proposed it, seconds."""

    policy: Policy
    log_perplexity: float
    ratio: float
    round: int
    source: str
    seconds: float


class Experience:
    """An SQLite store of evaluations, in order of arrival; a policy stands in it at most once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from None

    def append(self, evaluation: Evaluation) -> None:
        """Store one row durably. Raises ``ValueError`` if its policy is already there."""
        row = (
            evaluation.policy.to_json(), evaluation.log_perplexity, evaluation.ratio,
            evaluation.round, evaluation.source, evaluation.seconds,
        )  # fmt: skip
        columns = "policy, log_perplexity, ratio, round, source, seconds"
        try:
            self._db.execute(f"INSERT INTO evaluations ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError as error:
            raise ValueError(f"cannot store {row}: {error}") from None
        except sqlite3.OperationalError as error:
            remedy = "Free some space, end other commands that write to this RUN, and start the command again"
            raise InputError("experience", self.path, str(error), remedy) from None
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from None

    def rows(self, before_round: int | None = None) -> list[Evaluation]:
        """All rows in order, or those of the rounds before ``before_round``."""
        query = "SELECT policy, log_perplexity, ratio, round, source, seconds FROM evaluations"
        query += "" if before_round is None else f" WHERE round < {int(before_round)}"
        return [Evaluation(Policy.from_json(row[0]), *row[1:]) for row in self._read(query + " ORDER BY id")]

    def lookup(self, policy: Policy) -> float | None:
        """The measured log-perplexity of ``policy``, or None if it was never measured."""
        query = "SELECT log_perplexity FROM evaluations WHERE policy = ?"
        found = self._read(query, policy.to_json())
        return found[0][0] if found else None

    def __len__(self) -> int:
        return self._read("SELECT COUNT(*) FROM evaluations")[0][0]

    def close(self) -> None:
        self._db.close()

    def _read(self, query: str, *values: str) -> list[tuple]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: sqlite3.DatabaseError) -> InputError:
        remedy = "Restore the file from a copy, or fit into a new RUN"
        return InputError("experience", self.path, f"is not a readable database ({error})", remedy)

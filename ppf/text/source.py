"""What a user names as a text, and what kind of thing that is: the name decides, never the content."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

STANDARD_INPUT = "-"
DEFAULT_SPLIT = "train"
_COMPRESSIONS = (".gz", ".zst")
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
# A name that ends so and is not there is a missing file, not a dataset of that name.
_FILES = {*_COMPRESSIONS, *_FORMATS, ".txt", ".text", ".md", ".raw", ".csv", ".tsv", ".log", ".xml", ".html"}
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True)
class Text:
    """A text as it is given: a path, ``-`` for standard input, a dataset's id on the hub (``org/name`` or
    ``org/name:config``) or folder, an iterable of strings, chats or token ids, or token sequences int64 [N, T].

    ``field`` is the column of a dataset that holds the text, "text" if None; ``split`` that of a dataset on the hub or
    in a folder, "train" if None.
    """

    given: Any
    field: str | None = None
    split: str | None = None

    @classmethod
    def of(cls, given: Any) -> Text:
        """``given`` itself if it is a ``Text``."""
        return given if isinstance(given, Text) else cls(given)

    @property
    def path(self) -> Path | None:
        """The path, None for what has none: standard input, a dataset on the hub, and Python's own objects."""
        if not isinstance(self.given, (str, Path)) or self.is_hub or str(self.given) == STANDARD_INPUT:
            return None
        return Path(self.given)

    @property
    def is_hub(self) -> bool:
        """True for the string ``org/name``, unless something on disk has that name, or it ends as files' names do."""
        if not isinstance(self.given, str) or not _HUB.fullmatch(self.given):
            return False
        return not (Path(self.given).exists() or Path(self.given).suffix.lower() in _FILES)

    @property
    def is_file(self) -> bool:
        """True for a regular file, which can be read again; pipes cannot."""
        return self.path is not None and self.path.is_file()

    @property
    def is_plain(self) -> bool:
        """True for a file or a pipe of plain text."""
        return not self.in_python and not self.is_dataset and self.format == "text"

    @property
    def column(self) -> str:
        """The field of a dataset's rows that holds the text."""
        return self.field or "text"

    @property
    def in_python(self) -> bool:
        """True for a Python object."""
        return not isinstance(self.given, (str, Path))

    @property
    def is_dataset(self) -> bool:
        """True for what the ``datasets`` library reads: a folder, or an id on the hub."""
        return self.is_hub or (self.path is not None and self.path.is_dir())

    @property
    def form(self) -> dict[str, str] | None:
        """As what it is read: "format", "field" and "split", as far as they apply; None for plain text."""
        if self.is_plain:
            return None
        if self.in_python:
            return {"format": "python"} | ({"field": self.field} if self.field else {})
        if self.is_dataset:
            return {"format": "dataset", "field": self.column, "split": self.split or DEFAULT_SPLIT}
        return {"format": self.format + self.compression, "field": self.column}

    @property
    def compression(self) -> str:
        """What the name says of compression: ".gz", ".zst" or nothing."""
        suffix = self.path.suffix.lower() if self.path else ""
        return suffix if suffix in _COMPRESSIONS else ""

    @property
    def format(self) -> str:
        """One of jsonl, json, parquet and text, by the name without what says the compression. What has no name, such
        as standard input, is JSON lines if a field is asked for."""
        path = self.path
        if path is None or (self.is_stream and not path.suffix):
            return "text" if self.field is None else "jsonl"
        return _FORMATS.get((path.with_suffix("") if self.compression else path).suffix.lower(), "text")

    @property
    def is_stream(self) -> bool:
        """True for standard input and pipes, which can be read once."""
        if str(self.given) == STANDARD_INPUT:
            return isinstance(self.given, (str, Path))
        return self.path is not None and self.path.exists() and not self.path.is_file() and not self.path.is_dir()

    @property
    def name(self) -> str:
        """What a protocol calls it."""
        if str(self.given) == STANDARD_INPUT:
            return "standard input"
        if self.path is not None:
            return str(self.path.resolve()) if not self.is_stream else str(self.path)
        return str(self.given) if self.is_hub else f"Python {type(self.given).__name__}"

    @property
    def shown(self) -> Any:
        """What an error calls it."""
        return self.given if isinstance(self.given, (str, Path)) else self.name

    def refuse(self, field: str, problem: str, remedy: str) -> InputError:
        """The error about this text, given as the argument ``field``."""
        return InputError(field, self.shown, problem, remedy)

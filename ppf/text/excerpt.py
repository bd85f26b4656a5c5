"""The beginning of a text as it stands, untokenised, and in two parts: for what must hand one on to another process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .documents import column_of
from .hub import dataset_rows
from .raw import opened
from .rows import file_rows
from .source import Text


@dataclass(frozen=True)
class Excerpt:
    """``parts``: two strings in ``form`` "txt", or two lists of documents in "jsonl", with the field "text"."""

    parts: tuple[Any, Any]
    form: str

    def written(self, index: int) -> str:
        """A part as a file of its form holds it."""
        part = self.parts[index]
        if self.form == "txt":
            return part
        return "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in part)

    def given(self, index: int) -> Text:
        """A part as a text in memory."""
        return Text([self.parts[index]] if self.form == "txt" else self.parts[index])


def excerpt(text: Text, share: float, most: int, field: str = "text") -> Excerpt:
    """No more than the first ``most`` characters of ``text``: the first ``share`` of them, and the rest.

    Plain text is cut behind a line, a dataset between documents, of which the last may go beyond ``most``. Raises
    ``InputError`` about ``field`` for what cannot be read, and for what cannot be cut.
    """
    if text.is_plain:
        content = _plain(text, most, field)
        cut = content.find("\n", int(len(content) * share)) + 1
        found = Excerpt((content[:cut], content[cut:]), "txt")
    else:
        rows = dataset_rows(text, field) if text.is_dataset else file_rows(text, field)
        documents = list(_first(column_of(rows, text, field), most, _characters))
        cut = int(len(documents) * share)
        found = Excerpt((documents[:cut], documents[cut:]), "jsonl")
    if not all(found.parts):
        what = "line ends" if text.is_plain else "documents"
        raise text.refuse(field, f"has too few {what} to be cut in two", "Give a longer text")
    return found


def _plain(text: Text, most: int, field: str) -> str:
    with opened(text, field) as (stream, _):
        try:
            return io.TextIOWrapper(stream, encoding="utf-8-sig").read(most)
        except UnicodeDecodeError:
            raise text.refuse(field, "cannot be read (not UTF-8)", "Give a UTF-8 text file") from None


def _first(documents: Iterable[Any], most: int, size: Callable[[Any], int]) -> Iterator[Any]:
    total = 0
    for document in documents:
        yield document
        total += size(document)
        if total >= most:
            return


def _characters(document: str | list[dict[str, Any]]) -> int:
    return len(document) if isinstance(document, str) else len(json.dumps(document))

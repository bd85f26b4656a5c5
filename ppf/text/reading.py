"""A text, whatever it is given as, read as tokens: as much of it as is needed, and what is to be said of it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .documents import Writer, column_of
from .hub import dataset_rows
from .raw import opened
from .rows import file_rows
from .source import Text
from .tokens import require_known, whole


@dataclass(frozen=True)
class Tokens:
    """``ids`` int32, [n] or, of sequences given as such, [N, T].

    ``sha256`` is that of a plain text's bytes as they are stored, of the documents taken from a dataset, or of int64
    ids. ``read_as`` says how anything but plain text was read, ``whole`` whether nothing of it was left unread.
    """

    ids: Tensor
    sha256: str
    read_as: dict[str, Any] | None = None
    whole: bool = True


def read(
    text: Text, tokenizer: Any, vocabulary: int | None = None, field: str = "text", most: int | None = None
) -> Tokens:
    """The tokens of ``text``, without special tokens but those that it spells out and those that end documents.

    Of plain text all; of documents as many as give ``most`` tokens, from the beginning. Raises ``InputError`` about
    ``field`` for what is missing, unreadable, empty or binary, for a dataset without the field or with something else
    in it, and for a token that a model with so large a ``vocabulary`` does not have.
    """
    if text.is_plain:
        return _plain(text, tokenizer, vocabulary, field)
    if isinstance(text.given, Tensor):
        return _ids(text, text.given, tokenizer, vocabulary, field)
    if text.in_python:
        return _python(text, tokenizer, vocabulary, field, most)
    rows = dataset_rows(text, field) if text.is_dataset else file_rows(text, field)
    return _documents(text, column_of(rows, text, field), tokenizer, vocabulary, field, most)


def documents(text: Text, field: str) -> Iterator[str | list[dict[str, Any]]]:
    """The documents of ``text`` as they stand, texts or chats, one after the other; of plain text its lines. Empty ones
    are left out. Raises ``InputError`` about ``field`` as :func:`read` does."""
    if text.is_plain:
        content, _ = _content(text, field)
        return (line for line in content.splitlines() if line.strip())
    if text.in_python:
        first, items = _items(text, field)
        rows = items if isinstance(first, dict) else ({text.column: item} for item in items)
    else:
        rows = dataset_rows(text, field) if text.is_dataset else file_rows(text, field)
    return column_of(rows, text, field)


def read_tokens(path: str | Path, tokenizer: Any, vocabulary: int | None = None) -> Tensor:
    """All tokens of a text as int64 [n]; see :func:`read`."""
    return read(Text.of(path), tokenizer, vocabulary).ids.long()


def _plain(text: Text, tokenizer: Any, vocabulary: int | None, field: str) -> Tokens:
    content, sha256 = _content(text, field)
    ids = whole(content, tokenizer)
    require_known(ids, tokenizer, vocabulary, field, text.shown)
    return Tokens(ids, sha256)


def _content(text: Text, field: str) -> tuple[str, str]:
    """A plain text and its SHA-256."""
    with opened(text, field) as (stream, hashed):
        try:
            content = io.TextIOWrapper(stream, encoding="utf-8-sig").read()
        except UnicodeDecodeError:
            raise text.refuse(field, "cannot be read (not UTF-8)", "Give a UTF-8 text file") from None
    if not content.strip():
        raise text.refuse(field, "is empty", "Give a text with at least one sequence of tokens")
    if text.path is None or (text.is_stream and not text.path.suffix):
        _refuse_json(text, content, field)
    return content, hashed.sha256


def _refuse_json(text: Text, content: str, field: str) -> None:
    """A file's name says that it holds JSON; a pipe has none, and JSON lines must not pass for prose."""
    if content.lstrip().startswith('{"'):
        problem = "looks like JSON lines, and a pipe has no name that says so"
        raise text.refuse(field, problem, "Say which field holds the text: --field text")


def _documents(
    text: Text, documents: Iterable[Any], tokenizer: Any, vocabulary: int | None, field: str, most: int | None
) -> Tokens:
    documents, writer = iter(documents), Writer(text, field, tokenizer, vocabulary)
    ids = writer.tokens(documents, most)
    if not writer.count:
        raise text.refuse(field, "is empty: it has no document with text", "Give at least one sequence of tokens")
    told = (text.form or {}) | {"documents": writer.count, "joined": writer.joined}
    return Tokens(ids, writer.sha256, told, most is None or len(ids) < most)


def _ids(text: Text, given: Tensor, tokenizer: Any, vocabulary: int | None, field: str) -> Tokens:
    if given.dtype not in (torch.int64, torch.int32) or given.dim() not in (1, 2) or not given.numel():
        problem = f"is {given.dtype} {list(given.shape)}, no token ids"
        raise text.refuse(field, problem, "Give int64 [N, T] or [n]")
    given = given.detach().cpu()
    require_known(given, tokenizer, vocabulary, field, text.shown)
    sha256 = hashlib.sha256(given.long().contiguous().numpy().tobytes()).hexdigest()
    return Tokens(given.int(), sha256, {"format": "token ids"})


def _python(text: Text, tokenizer: Any, vocabulary: int | None, field: str, most: int | None) -> Tokens:
    """An iterable: of texts, of chats, of a dataset's rows, or of token ids for every document."""
    first, items = _items(text, field)
    if isinstance(first, dict):
        return _documents(text, column_of(items, text, field), tokenizer, vocabulary, field, most)
    if isinstance(first, str) or (isinstance(first, list) and first and isinstance(first[0], dict)):
        rows = ({text.column: item} for item in items)
        return _documents(text, column_of(rows, text, field), tokenizer, vocabulary, field, most)
    return _ids(text, _joined(text, items, field), tokenizer, vocabulary, field)


def _items(text: Text, field: str) -> tuple[Any, Iterator[Any]]:
    """The first item of an iterable, and all of them."""
    try:
        items: Iterator[Any] = iter(text.given)
    except TypeError:
        problem = "is neither a path nor an iterable"
        raise text.refuse(field, problem, "Give a file, a dataset, strings or token ids") from None
    first = next(items, None)
    if first is None:
        raise text.refuse(field, "is empty", "Give at least one sequence of tokens")
    return first, chain([first], items)


def _joined(text: Text, items: Iterator[Any], field: str) -> Tensor:
    try:
        found = [torch.as_tensor(item) for item in items]
        return torch.cat([ids.reshape(-1) for ids in found if ids.numel()])
    except (TypeError, ValueError, RuntimeError) as error:
        problem = f"holds neither strings, chats nor token ids ({' '.join(str(error).split())[:200]})"
        raise text.refuse(field, problem, "Give strings, lists of messages, or int64 ids") from None

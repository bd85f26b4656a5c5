"""Documents of a dataset, and how they become one sequence of tokens.

Every document is tokenised on its own. Texts are followed by the tokenizer's end token, as models are trained; without
one, by a blank line. Chats are written by the model's own chat template, which ends them, and nothing is added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .source import Text
from .tokens import pieces, require_known, token_lists

_TOGETHER = 64  # documents


def column_of(rows: Iterable[Any], text: Text, argument: str) -> Iterator[str | list[dict[str, Any]]]:
    """The documents in the column of ``text``, texts or chats; empty ones are left out.

    Raises ``InputError`` about ``argument`` for a row without the column and for one that holds something else.
    """
    name, kind = text.column, None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            problem = f"row {number} is {_named(row)}, not an object with fields"
            raise text.refuse(argument, problem, 'Write one object a row: {"text": "…"}')
        if name not in row:
            problem = f"has no field {name!r} in row {number}; there are: {', '.join(map(str, row)) or 'none'}"
            raise text.refuse(argument, problem, "Name one of them with --field")
        document = row[name]
        if not _is_document(document):
            problem = f"its field {name!r} holds {_named(document)} in row {number}, neither text nor chat messages"
            raise text.refuse(argument, problem, "Name another with --field")
        kind = kind or type(document)
        if type(document) is not kind:
            problem = f"its field {name!r} holds texts and chats (row {number})"
            raise text.refuse(argument, problem, "Give a dataset of one kind")
        if document and not (kind is str and document.isspace()):
            yield document


@dataclass
class Writer:
    """Turns documents into tokens; ``count``, ``sha256`` and ``joined`` say what was taken and how it was joined."""

    text: Text
    argument: str
    tokenizer: Any
    vocabulary: int | None
    count: int = 0
    joined: str = ""
    _digest: Any = field(default_factory=hashlib.sha256)

    @property
    def sha256(self) -> str:
        """Of the documents taken, each as JSON in a line of UTF-8."""
        return self._digest.hexdigest()

    def tokens(self, documents: Iterator[str | list[dict[str, Any]]], most: int | None) -> Tensor:
        """int32 [n] of whole documents, until there are ``most`` tokens; all if that is None."""
        found, total = [torch.empty(0, dtype=torch.int32)], 0
        while group := list(islice(documents, _TOGETHER)):
            for document, ids in zip(group, self._ids(group), strict=True):
                self._digest.update(as_line(document))
                self.count, total = self.count + 1, total + len(ids)
                found.append(ids)
                if most is not None and total >= most:
                    return torch.cat(found)
        return torch.cat(found)

    def _ids(self, group: list[str | list[dict[str, Any]]]) -> Iterator[Tensor]:
        """The ids of every document, with what ends it."""
        chats, end = not isinstance(group[0], str), self.tokenizer.eos_token_id
        texts = [self._written(chat, number) for number, chat in enumerate(group, self.count + 1)] if chats else group
        if not chats and end is None:
            texts = [text + "\n\n" for text in texts]
        ending = [] if chats or end is None else [end]
        self.joined = template_name(self.tokenizer) if chats else "a blank line" if end is None else f"token {end}"
        parts = [list(pieces(text, self.tokenizer)) for text in texts]
        lists = token_lists((part for document in parts for part in document), self.tokenizer)
        for document in parts:
            ids = torch.tensor([id for _ in document for id in next(lists)] + ending, dtype=torch.int32)
            require_known(ids, self.tokenizer, self.vocabulary, self.argument, self.text.shown)
            yield ids

    def _written(self, chat: list[dict[str, Any]], number: int) -> str:
        return written(chat, self.tokenizer, self.text, self.argument, number)


def written(
    chat: list[dict[str, Any]], tokenizer: Any, text: Text, argument: str, number: int, asks: bool = False
) -> str:
    """``chat`` by the model's own template; with what begins an answer behind it if it ``asks`` for one.

    Raises ``InputError`` about ``argument`` for a tokenizer without a template, and for chat ``number`` of ``text`` if
    it does not suit that.
    """
    if not tokenizer.chat_template:
        problem = "holds chats, and the model's tokenizer has no chat template"
        raise text.refuse(argument, problem, "Use a model that chats, or a dataset of texts")
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # templates raise what they like
        problem = f"its chat {number} does not suit the model's template ({' '.join(str(error).split())})"
        raise text.refuse(argument, problem, "Repair it, or leave it out") from None


def _is_document(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message for message in value
    )


def as_line(document: str | list[dict[str, Any]]) -> bytes:
    """A document as JSON in a line of UTF-8, which is what is hashed of it."""
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def template_name(tokenizer: Any) -> str:
    """What a protocol calls the chat template."""
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False).encode()
    return f"chat template {hashlib.sha256(template).hexdigest()[:12]}"


def _named(value: Any) -> str:
    names = {type(None): "nothing (null)", list: "a list", dict: "an object", str: "a string", bool: "a truth value"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)

"""Prompts as a model reads them: chats by its own template up to where its answer begins, other texts as they are."""

from __future__ import annotations

import hashlib
from collections import deque
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load_tokenizer, local_folder, read_config
from ..families import family_of
from ..text import Text, begin_token, documents
from ..text.documents import as_line, template_name, written
from ..text.tokens import require_known
from ..timings import timed

FIELD = "own-answers"
"""What errors about prompts call them."""

_USER = "user"


class Prompts:
    """The prompts in ``text`` for the checkpoint ``model``, read as they are asked for.

    A prompt may have ``longest`` tokens in sequences of ``length``. ``read_as`` says how the prompts became tokens.
    Everything raises ``InputError`` for prompts that cannot be read, that are too long, and that have a token which the
    model does not know.
    """

    def __init__(self, model: str | Path, text: Text, longest: int, length: int):
        self.text, self.read_as = text, "as they are"
        self._model, self._longest, self._length = model, longest, length
        self._ahead: deque[list[int]] = deque()
        self._count, self._digest = 0, hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the prompts read so far, each as JSON in a line of UTF-8."""
        return self._digest.hexdigest()

    def look(self, count: int) -> None:
        """Read so many prompts beforehand, or all if there are fewer: what is wrong with them is said now."""
        self._ahead.extend(self._read(count - len(self._ahead)))
        if not self._count:
            raise self.text.refuse(FIELD, "is empty: it has no prompt", "Give at least one prompt")

    def take(self, count: int) -> list[list[int]]:
        """The ids of the next prompts; fewer than ``count`` at the end."""
        self._ahead.extend(self._read(count - len(self._ahead)))
        return [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        return load_tokenizer(self._model)

    @timed("reading text")
    def _read(self, count: int) -> list[list[int]]:
        return [self._ids(document) for document in islice(self._documents, max(0, count))]

    @cached_property
    def _documents(self) -> Any:
        return documents(self.text, FIELD)

    @cached_property
    def _begin(self) -> int | None:
        config = read_config(local_folder(self._model))
        return begin_token(family_of(config.model_type), self.tokenizer)

    def _ids(self, document: str | list[dict[str, Any]]) -> list[int]:
        self._count += 1
        self._digest.update(as_line(document))
        if isinstance(document, str):  # with the special tokens that any program puts in front of a prompt
            ids = self.tokenizer(document, verbose=False)["input_ids"]
        else:
            self.read_as = template_name(self.tokenizer)
            content = written(self._question(document), self.tokenizer, self.text, FIELD, self._count, asks=True)
            ids = self.tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        if self._begin is not None and ids[:1] != [self._begin]:
            ids = [self._begin, *ids]
        self._check(ids)
        return ids

    def _question(self, chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``chat`` up to its last message of a user: the answers that data sets have are not the model's own."""
        last = max((at for at, message in enumerate(chat) if message["role"] == _USER), default=None)
        if last is None:
            problem = f"its chat {self._count} has no message of a user"
            raise self.text.refuse(FIELD, problem, "Leave it out, or give one that asks")
        return chat[: last + 1]

    def _check(self, ids: list[int]) -> None:
        vocabulary, context = self._sizes
        if not ids:
            problem = f"its prompt {self._count} has no tokens"
            raise self.text.refuse(FIELD, problem, "Leave it out")
        require_known(torch.tensor(ids), self.tokenizer, vocabulary, FIELD, self.text.shown)
        if len(ids) > self._longest:
            answer = self._length - self._longest
            problem = (
                f"its prompt {self._count} has {len(ids)} tokens: with an answer of {answer} more than sequences of "
                f"{self._length}"
            )
            needed = len(ids) + answer
            longer = f"Use --sequence-length {needed}" if needed <= context else "Leave it out"
            raise self.text.refuse(FIELD, problem, f"{longer}, or fewer --answer-tokens")

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """How many tokens the model knows, and its context."""
        config = read_config(local_folder(self._model))
        return config.vocab_size, config.max_position_embeddings

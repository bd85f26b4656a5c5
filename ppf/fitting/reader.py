"""A text as a model reads it: tokenised by its own tokenizer, cut into sequences that begin as its family wants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import load_tokenizer, read_config
from ..checkpoint.checks import existing_folder
from ..families import family_of
from ..text import begin_token, check_context, pack, read_tokens
from ..timings import timed


@dataclass(frozen=True)
class Reader:
    """``tokenizer`` of a model with so large a ``vocabulary``; sequences of ``length`` tokens, each with the id
    ``begin`` in front unless that is None."""

    tokenizer: Any
    vocabulary: int
    length: int
    begin: int | None

    @classmethod
    @timed("reading text")
    def of(cls, model: str | Path, length: int) -> Reader:
        """The reader of a checkpoint. Raises ``InputError`` for sequences longer than its context, and for a missing
        tokenizer or begin token."""
        config = read_config(existing_folder(model))
        check_context(length, config.max_position_embeddings)
        tokenizer = load_tokenizer(model)
        return cls(tokenizer, config.vocab_size, length, begin_token(family_of(config.model_type), tokenizer))

    @timed("reading text")
    def sequences(self, text: str | Path, field: str = "text") -> Tensor:
        """The whole text as int64 [N, length]. Raises ``InputError`` about ``field``."""
        return pack(read_tokens(text, self.tokenizer, self.vocabulary), self.length, field, self.begin)

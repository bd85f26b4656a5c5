"""A text as a model reads it: tokenised by its own tokenizer, cut into sequences that begin as its family wants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoint import load_tokenizer, local_folder, read_config
from ..checkpoint.hashes import sha256_of
from ..errors import InputError
from ..families import family_of
from ..text import Text, begin_token, check_context, pack, read
from ..timings import timed


@dataclass(frozen=True)
class Reading:
    """``sequences`` int32 [N, T] of a text called ``name``, each behind the id ``begin`` unless that is None.

    ``sha256`` is that of a file's bytes, or of what came through a pipe, from the hub or from Python. ``read_as`` says
    how anything but plain text became tokens; ``whole`` whether all of it was read.
    """

    sequences: Tensor
    name: str
    sha256: str
    begin: int | None
    read_as: dict[str, Any] | None
    whole: bool

    def part(self, all_taken: bool) -> str:
        """Which part of the text is used if its sequences are all taken, or some of them, evenly spaced."""
        if not self.whole:
            return "its beginning"
        return "all of it" if all_taken else "evenly spaced sequences"


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
        return cls.with_tokenizer(read_config(local_folder(model)), load_tokenizer(model), length)

    @classmethod
    def with_tokenizer(cls, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, length: int) -> Reader:
        """The same for a model of which these are at hand."""
        check_context(length, config.max_position_embeddings)
        return cls(tokenizer, config.vocab_size, length, begin_token(family_of(config.model_type), tokenizer))

    @timed("reading text")
    def read(self, text: Any, field: str = "text", most: int | None = None) -> Reading:
        """``text`` (:class:`ppf.Text`, or what one is made of): all of it, or of documents about the first ``most``
        sequences. Token sequences that are given as such stay as they are. Raises ``InputError`` about ``field``."""
        text, step = Text.of(text), self.length - (self.begin is not None)
        tokens = read(text, self.tokenizer, self.vocabulary, field, None if most is None else most * step)
        sha256 = sha256_of(text.path) if text.is_file else tokens.sha256
        if tokens.ids.dim() == 2:
            self._require_length(tokens.ids, text, field)
            return Reading(tokens.ids, text.name, sha256, None, tokens.read_as, tokens.whole)
        sequences = pack(tokens.ids, self.length, field, self.begin)
        return Reading(sequences, text.name, sha256, self.begin, tokens.read_as, tokens.whole)

    def sequences(self, text: Any, field: str = "text") -> Tensor:
        """The whole text as int64 [N, length]. Raises ``InputError`` about ``field``."""
        return self.read(text, field).sequences.long()

    def _require_length(self, sequences: Tensor, text: Text, field: str) -> None:
        if sequences.shape[1] != self.length:
            problem = f"holds sequences of {sequences.shape[1]} tokens, not of {self.length}"
            raise InputError(field, text.shown, problem, f"Use sequence_length={sequences.shape[1]}")

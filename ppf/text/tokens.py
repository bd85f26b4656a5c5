"""Text to token ids, piece by piece: a tokenizer takes some 150 bytes a character for what it is working on.

A text may be cut where its tokens stay the same. Byte pair encoding never undoes a merge: where a whole text's tokens
have a border, both sides were merged on their own. So a cut between two lines is taken if a window around it gives the
same tokens whole and in halves; tokenizers that put a space in front of every text pass nowhere, and get it whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..families import Family

_PIECE = 1 << 16  # characters
_TOGETHER = 8  # pieces that the tokenizer's threads share
_WINDOW = 512  # characters on each side of a cut
_TRIES = 16


def pieces(text: str, tokenizer: Any) -> Iterator[str]:
    """Consecutive parts of ``text`` whose tokens, one after another, are those of the whole."""
    start = 0
    while len(text) - start > 2 * _PIECE and (cut := _cut(text, start + _PIECE, tokenizer)):
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text


def token_lists(parts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    """The ids of every part, without special tokens but those that it spells out."""
    while group := list(islice(parts, _TOGETHER)):
        yield from _ids(group, tokenizer)


def whole(text: str, tokenizer: Any) -> Tensor:
    """All ids of ``text`` as int32 [n]."""
    found = [torch.tensor(ids, dtype=torch.int32) for ids in token_lists(pieces(text, tokenizer), tokenizer)]
    return torch.cat(found)


def require_known(tokens: Tensor, tokenizer: Any, vocabulary: int | None, field: str, shown: object) -> None:
    """Raise ``InputError`` for a token that a model with so large a ``vocabulary`` does not have."""
    if vocabulary is None or not tokens.numel():
        return
    if (highest := int(tokens.max())) >= vocabulary:
        name = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(highest)!r})"
        token = f"token {highest}{name}"
        problem = f"yields {token}, and the model's vocabulary ends at {vocabulary - 1}"
        raise InputError(field, shown, problem, "Use the tokenizer that the model was trained with, or another text")
    if (lowest := int(tokens.min())) < 0:
        raise InputError(field, shown, f"holds {lowest}, which is no token", "Give token ids from 0")


def begin_token(family: Family, tokenizer: Any) -> int | None:
    """The id that must stand in front of every sequence, None if ``family`` does not need one.

    Raises ``InputError`` if the tokenizer has none for a family whose models have never seen a sequence without it.
    """
    if not family.begins:
        return None
    token = tokenizer.bos_token_id
    if token is None:
        problem = f"has no begin token, without which models of the family {family.model_type} compute nothing sensible"
        raise InputError("tokenizer", type(tokenizer).__name__, problem, "Use the tokenizer that the model came with")
    return token


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    # verbose=False: the tokenizer warns about texts longer than the model's context, which are cut into sequences
    return tokenizer(texts, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]


def _cut(text: str, place: int, tokenizer: Any) -> int:
    """Where to cut at the end of one of the next lines; 0 if nowhere."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return 0
    for _ in range(_TRIES):
        place = text.find("\n", place) + 1
        if not 0 < place < len(text):
            return 0
        if _splits(text, place, tokenizer):
            return place
    return 0


def _splits(text: str, place: int, tokenizer: Any) -> bool:
    before, after = text[place - _WINDOW : place], text[place : place + _WINDOW]
    if not before.strip() or not after.strip():  # white space is taken together, and begins or ends out of sight
        return False
    left, right, both = _ids([before, after, before + after], tokenizer)
    return left + right == both

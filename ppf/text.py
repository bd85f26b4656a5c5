"""Text to token sequences: reading, packing, and the disjoint parts that calibration and evaluation use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .families import Family


@dataclass(frozen=True)
class Splits:
    """Token sequences, int64 [N, T] each; no token belongs to both."""

    calibration: Tensor
    evaluation: Tensor


def read_tokens(path: str | Path, tokenizer: Any, vocabulary: int | None = None) -> Tensor:
    """Tokens of a UTF-8 text file as int64 [n], without special tokens.

    Raises ``InputError`` for a missing, unreadable, non-UTF-8 or empty file, and for a token that a model with so large
    a ``vocabulary`` does not have: tokenizers may know more than their model.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError("text", path, f"cannot be read ({reason})", "Give a UTF-8 text file") from None
    if not text.strip():
        raise InputError("text", path, "is empty", "Give a text with at least one sequence of tokens")
    # verbose=False: the tokenizer warns about texts longer than the model's context, which are cut into sequences below
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)
    if vocabulary is not None and len(tokens) and (highest := int(tokens.max())) >= vocabulary:
        token = f"token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r})"
        problem = f"yields {token}, and the model's vocabulary ends at {vocabulary - 1}"
        raise InputError("text", path, problem, "Use the tokenizer that the model was trained with, or another text")
    return tokens


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


def pack(tokens: Tensor, length: int, field: str = "text", begin: int | None = None) -> Tensor:
    """Consecutive sequences int64 [N, length] of tokens [n]; the incomplete tail is dropped.

    ``begin`` is put in front of every sequence, which then has one token less of the text.
    """
    if length < 2:
        raise InputError("sequence-length", length, "is too short to predict a token", "Use at least 2")
    step = length if begin is None else length - 1
    if len(tokens) < step:
        remedy = f"Give at least {step} tokens or a smaller --sequence-length"
        raise InputError(field, f"{len(tokens)} tokens", "is shorter than one sequence", remedy)
    sequences = tokens[: len(tokens) // step * step].view(-1, step)
    if begin is None:
        return sequences
    return torch.cat((sequences.new_full((len(sequences), 1), begin), sequences), 1)


def check_context(length: int, context: int) -> None:
    """Raise ``InputError`` if sequences of ``length`` tokens do not fit the model's ``context``."""
    if length > context:
        problem = f"is longer than the model's context of {context} tokens"
        raise InputError("sequence-length", length, problem, f"Use at most {context}")


def take_tokens(sequences: Tensor, tokens: int | None) -> Tensor:
    """About ``tokens`` tokens of ``sequences`` [N, T], evenly spaced over the text; all if ``tokens`` is None."""
    if tokens is None:
        return sequences
    if tokens < 1:
        raise InputError("tokens", tokens, "leaves nothing to measure", "Use a positive number of tokens")
    total, length = sequences.shape
    count = min(max(1, tokens // length), total)
    return sequences[torch.arange(count) * total // count]


def split(sequences: Tensor, calibration_tokens: int, evaluation_tokens: int, share: float = 0.75) -> Splits:
    """Disjoint parts of one text: calibration from its first ``share``, evaluation from the rest.

    Raises ``InputError`` when the text has fewer than two sequences.
    """
    total = len(sequences)
    if total < 2:
        remedy = "Give a longer text, a smaller --sequence-length, or a second text with --eval-text"
        raise InputError("text", f"{total} sequence(s)", "is too short to split", remedy)
    cut = min(max(1, int(total * share)), total - 1)
    return Splits(take_tokens(sequences[:cut], calibration_tokens), take_tokens(sequences[cut:], evaluation_tokens))


# Tokens a forward pass takes at once. A GPU needs many to be busy between launches; a CPU wants them to stay in cache.
BATCH_TOKENS = {"cuda": 65_536, "cpu": 8_192}


def batches(sequences: Tensor, device: torch.device, most: int | None = None) -> Sequence[Tensor]:
    """Views of ``sequences`` [N, T], in order, with as many tokens as suit a forward pass on ``device``, at most
    ``most``, but at least one sequence."""
    tokens = BATCH_TOKENS[device.type] if most is None else min(most, BATCH_TOKENS[device.type])
    return sequences.split(max(1, tokens // sequences.shape[1]))

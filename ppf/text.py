"""Text to token sequences: reading, packing, and the disjoint parts that calibration and evaluation use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class Splits:
    """Token sequences, int64 [N, T] each; no token belongs to both."""

    calibration: Tensor
    evaluation: Tensor


def read_tokens(path: str | Path, tokenizer: Any) -> Tensor:
    """Tokens of a UTF-8 text file as int64 [n], without special tokens.

    Raises ``InputError`` for a missing, unreadable, non-UTF-8 or empty file.
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
    return torch.tensor(ids, dtype=torch.int64)


def pack(tokens: Tensor, length: int, field: str = "text") -> Tensor:
    """Consecutive sequences int64 [N, length] of tokens [n]; the incomplete tail is dropped."""
    if length < 2:
        raise InputError("sequence-length", length, "is too short to predict a token", "Use at least 2")
    if len(tokens) < length:
        problem = "is shorter than one sequence"
        raise InputError(
            field, f"{len(tokens)} tokens", problem, f"Give at least {length} tokens or a smaller --sequence-length"
        )
    return tokens[: len(tokens) // length * length].view(-1, length)


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


def batches(sequences: Tensor, device: torch.device) -> Sequence[Tensor]:
    """Views of ``sequences`` [N, T] with as many tokens as suit a forward pass on ``device``, in order."""
    return sequences.split(max(1, BATCH_TOKENS[device.type] // sequences.shape[1]))

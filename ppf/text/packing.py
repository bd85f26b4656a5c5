"""Tokens to sequences, and the disjoint parts of them that calibration and evaluation use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Splits:
    """Token sequences, int64 [N, T] each; no token belongs to both.

    ``calibration_scored`` and ``evaluation_scored``, bool [N, T], are True for the tokens that count; None where all of
    them do.
    """

    calibration: Tensor
    evaluation: Tensor
    calibration_scored: Tensor | None = None
    evaluation_scored: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored: ids as int32, and what is not None of the others."""
        held = {"calibration": self.calibration.int(), "evaluation": self.evaluation.int()}
        scored = {f"{part}.scored": getattr(self, f"{part}_scored") for part in tuple(held)}
        return held | {name: mask for name, mask in scored.items() if mask is not None}


def pack(tokens: Tensor, length: int, field: str = "text", begin: int | None = None) -> Tensor:
    """Consecutive sequences [N, length] of integer tokens [n]; the incomplete tail is dropped.

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


def unpadded(sequences: Tensor, scored: Tensor) -> Tensor:
    """Sequences [M, T] of what those in [N, T] hold up to the last token that is ``scored``: as if it were one text."""
    lengths = scored.shape[1] - scored.flip(1).int().argmax(1)
    return pack(torch.cat([row[:length] for row, length in zip(sequences, lengths, strict=True)]), sequences.shape[1])


def check_context(length: int, context: int) -> None:
    """Raise ``InputError`` if sequences of ``length`` tokens do not fit the model's ``context``."""
    if length > context:
        problem = f"is longer than the model's context of {context} tokens"
        raise InputError("sequence-length", length, problem, f"Use at most {context}")


def predicting(scored: Tensor) -> Tensor:
    """The positions, bool [N, T], from which the tokens that are ``scored`` [N, T] are predicted: those before them."""
    return torch.nn.functional.pad(scored[:, 1:], (0, 1))


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

"""The parts in which a batch goes through the models: as large as memory allows, the same number in every process."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ... import memory, ranks
from ...errors import InputError
from .settings import RecoverySettings

# Bytes that one token's activations take in a layer, for each number of the hidden state: about 34 numbers in bf16.
_ACTIVATION_BYTES = 70
_ACTIVATION_MEMORY = {"cuda": 16 << 30, "cpu": 1 << 30}
# What torch's allocator cannot use between its blocks.
_USABLE = 0.9

Part = tuple[Tensor, bool]
"""Sequences int64 [B, T], and whether they count; what does not only keeps step with other processes."""


def parts_of(batch: Tensor, sequences: int) -> list[Part]:
    """This process's share of int64 ``batch`` [B, T], at most so many ``sequences`` a part.

    Shares differ by a sequence where a batch does not divide. Layers are gathered by all processes together, so all
    have equally many parts: whoever has no more sequences computes the first one again, for nothing.
    """
    own = batch.tensor_split(ranks.world())[ranks.rank()]
    most = math.ceil(len(batch) / ranks.world())
    parts = [(part, True) for part in own.split(sequences) if len(part)]
    return parts + [(batch[:1], False)] * (math.ceil(most / sequences) - len(parts))


class Micro:
    """How many ``sequences`` go through the models at once, in one process: what the settings say, or should fit."""

    def __init__(self, config: PreTrainedConfig, device: torch.device, settings: RecoverySettings):
        self.device, self.settings = device, settings
        tokens = settings.micro_tokens or fitting_tokens(config, device)
        self.sequences = max(1, tokens // settings.sequence_length)

    def halve(self) -> None:
        """After an attempt that did not fit. Raises ``InputError`` if one sequence did not."""
        if self.sequences == 1:
            raise self._beyond("sequence-length", self.settings.sequence_length, "one sequence", "Use shorter ones")
        if ranks.world() > 1:  # others wait in the middle of the attempt, and cannot be called back
            given = self.sequences * self.settings.sequence_length
            remedy = f"Go on with --micro-tokens {given // 2} and else the same command"
            raise self._beyond("micro-tokens", given, "as much at once", remedy)
        self._shrink(self.sequences // 2)

    def agree(self, row: Tensor, attempt: Callable[[Tensor], object]) -> None:
        """Of many processes with a GPU each: take as many sequences as fit in all of them, found by ``attempt``.

        ``attempt`` takes the forward and backward pass of a part: of ``row``, int64 [1, T], once and twice. With one
        process there is nothing to find: it may try, and halve.
        """
        if ranks.world() == 1 or self.device.type != "cuda":
            return
        room = min(ranks.gather(memory.room(self.device)))
        one = max(ranks.gather(self._peak(row, attempt)))
        two = max(ranks.gather(self._peak(row.expand(2, -1), attempt))) if 2 * one <= room else 2 * one
        fit = fitting_sequences(room, one, two)
        if fit < self.sequences:
            wanted = self.sequences
            while wanted > fit:
                wanted //= 2
            self._shrink(max(1, wanted))

    def _peak(self, rows: Tensor, attempt: Callable[[Tensor], object]) -> int:
        """Bytes that a part takes while it is computed."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            attempt(rows)
        except torch.OutOfMemoryError:
            raise self._beyond(
                "sequence-length", self.settings.sequence_length, "one sequence", "Use shorter ones"
            ) from None
        return torch.cuda.max_memory_allocated(self.device) - before

    def _shrink(self, sequences: int) -> None:
        self.sequences = sequences
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if ranks.first():
            tokens = sequences * self.settings.sequence_length
            memory.note(f"memory is short: {tokens:,} tokens at once from here on (--micro-tokens)")

    def _beyond(self, field: str, value: int, what: str, remedy: str) -> InputError:
        method = self.settings.method
        problem = f"{what} does not fit into the memory of {self.device} with method {method}"
        others = {"full": "--method lora or norms, ", "lora": "--method norms, ", "norms": ""}[method]
        return InputError(field, value, problem, f"{remedy}, {others}or --weights host for the teacher")


def fitting_tokens(config: PreTrainedConfig, device: torch.device) -> int:
    """Tokens whose activations should fit beside the model."""
    a_token = config.num_hidden_layers * config.hidden_size * _ACTIVATION_BYTES
    return max(1, _ACTIVATION_MEMORY[device.type] // a_token)


def fitting_sequences(room: int, one: int, two: int) -> int:
    """How many sequences at once fit into ``room`` bytes, if one takes ``one`` and two take ``two``: at least one."""
    return 1 + max(0, int((_USABLE * room - one) / max(1, two - one)))

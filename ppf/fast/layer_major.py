"""Layer-major evaluation: all policies of a wave go through one layer, then through the next.

A layer's weights are needed once for a whole wave, wherever they come from. Policies that begin alike are one state
until they part: at every sub-layer the distinct pairs of a state and a level are the *moves* to the states after it.
What carries them out is a stepper: one move after the other (:class:`ppf.fast.one_by_one.OneByOne`), or all of a wave
in a few launches (:class:`ppf.fast.together.Together`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import memory
from ..errors import InputError
from ..families import KINDS
from ..model.decoder import Decoder
from ..model.grid import Grid
from ..text import batches
from .plan import executed, order, shared

Move = tuple[int, int]
"""The number of a state before a sub-layer, and a level of it."""

# For activations of the dense model below the first pruned sub-layer: at most so many bytes and this share of the room.
_DENSE_BYTES, _DENSE_SHARE = 2 << 30, 0.1
# Share of the room for a wave's states; the rest is for one state's inner activations, logits and solutions.
_STATE_SHARE = 0.6
# Share of a GPU's memory for the activations inside a layer.
_INNER_SHARE = 0.3
# More policies share no more work, and a kill would lose more of it.
_LARGEST_WAVE = 256


class Stepper(Protocol):
    """Carries states through sub-layers. ``states[s]`` is a state's activations [B, T, hidden]."""

    def begin(self, x: Tensor) -> Any:
        """One state, ``x`` [B, T, hidden]; may overwrite it later."""
        ...

    def advance(self, index: int, kind: str, states: Any, moves: Sequence[Move]) -> Any:
        """The states that ``moves`` lead to through sub-layer ``kind`` of layer ``index``; may reuse the old ones."""
        ...

    def losses(self, states: Any, tokens: Tensor, scored: Tensor | None = None) -> Tensor:
        """Summed negative log-likelihood of every state, fp64 [S] in nats, of int64 ``tokens`` [B, T], or of those of
        them that are ``scored``, bool [B, T]."""
        ...


class LayerMajor:
    """Evaluates levels in execution order (attention 0, FFN 0, attention 1, …) on int64 ``sequences`` [N, T].

    A policy's result does not depend on those it is evaluated with. A wave that does not fit into memory is halved; a
    single policy's text too, whose figure may then differ by a rounding.
    """

    def __init__(
        self, decoder: Decoder, grid: Grid, sequences: Tensor, stepper: Stepper, reserved: int = 0,
        scored: Tensor | None = None,
    ):  # fmt: skip
        """``reserved`` bytes of the device's memory are for what others will keep there; ``scored`` bool [N, T] are the
        tokens that count, None for all."""
        self.decoder, self.grid, self.stepper = decoder, grid, stepper
        self._dense_levels = executed(grid.maximum)
        room, width = memory.room(decoder.device) - reserved, grid.structure.hidden * decoder.dtype.itemsize
        most = memory.tokens_at_once(decoder.device, _INNER_SHARE, decoder.token_bytes)
        masks = None if scored is None else batches(scored, decoder.device, most)
        self._set_parts(batches(sequences, decoder.device, most), masks)
        kept = max(0, int(min(_DENSE_BYTES, _DENSE_SHARE * room)))
        self._deepest = kept // max(1, sequences.numel() * width)
        # While a sub-layer runs, a state that several policies go on from exists twice.
        state = 2 * max(part.numel() for part in self.parts) * width
        self.wave = max(1, min(_LARGEST_WAVE, int(_STATE_SHARE * room) // state))

    def _set_parts(self, parts: Sequence[Tensor], scored: Sequence[Tensor | None] | None = None) -> None:
        self.parts = list(parts)
        self._scored = [None] * len(self.parts) if scored is None else list(scored)
        self._dense: list[list[Tensor]] = [[] for _ in self.parts]  # of every part: depth 0, 1, …

    @torch.no_grad()
    def losses(self, levels: Sequence[Sequence[int]]) -> Tensor:
        """Summed negative log-likelihood of every policy, fp64 [P] in nats. Raises ``InputError`` if one policy on one
        sequence does not fit into memory."""
        ordered, done = order(levels), 0
        total = torch.zeros(len(levels), dtype=torch.float64, device=self.decoder.device)
        while done < len(ordered):
            wave = ordered[done : done + self.wave]
            rows = [levels[index] for index in wave]
            try:
                sums = sum(self._sums(part, rows) for part in range(len(self.parts)))
            except torch.OutOfMemoryError:
                self._shrink(len(wave))
                continue
            total[torch.tensor(wave, device=total.device)] = sums
            done += len(wave)
        return total

    @torch.no_grad()
    def hidden(self, levels: Sequence[int]) -> Tensor:
        """One policy's hidden states [N, T, hidden] before the last norm."""
        return torch.cat([self._through(part, [levels])[0][0] for part in range(len(self.parts))])

    def _sums(self, part: int, rows: Sequence[Sequence[int]]) -> Tensor:
        states, ends = self._through(part, rows)
        found = self.stepper.losses(states, self.parts[part], self._scored[part])
        return found[torch.tensor(ends, device=self.decoder.device)]

    def _through(self, part: int, rows: Sequence[Sequence[int]]) -> tuple[Any, list[int]]:
        """The states after the last layer, and which of them every policy has come to."""
        start = min(self._deepest, min(shared(self._dense_levels, row) for row in rows))
        states = self.stepper.begin(self._dense_state(part, start).clone())
        at = [0] * len(rows)
        for depth, moves in enumerate(_moves(rows, start, at), start):
            states = self.stepper.advance(depth // 2, KINDS[depth % 2], states, moves)
        return states, at

    def _dense_state(self, part: int, depth: int) -> Tensor:
        """The dense model's activations [B, T, hidden] at ``depth``."""
        known = self._dense[part]
        if not known:
            known.append(self.decoder.frame.begin(self.parts[part]))
        while len(known) <= depth:
            at = len(known) - 1
            states = self.stepper.begin(known[at].clone())
            known.append(self.stepper.advance(at // 2, KINDS[at % 2], states, [(0, self._dense_levels[at])])[0])
        return known[depth]

    def _shrink(self, policies: int) -> None:
        """After a wave of ``policies`` has not fitted: fewer at once, or, of one policy, fewer sequences at once."""
        self._dense, self._deepest = [[] for _ in self.parts], 0
        torch.cuda.empty_cache()
        if policies > 1:
            self.wave = policies // 2
            memory.note(f"{policies} policies at once do not fit into the GPU's memory: going on with {self.wave}")
            return
        longest = max(len(part) for part in self.parts)
        if longest == 1:
            given = f"{self.parts[0].shape[1]} tokens"
            problem = f"of one policy do not fit into the memory of {self.decoder.device}"
            remedy = "Use a shorter --sequence-length, a larger --gpu-memory-gb, or --weights host"
            raise InputError("sequence-length", given, problem, remedy)
        half = -(-longest // 2)
        memory.note(f"{longest} sequences of one policy do not fit into the GPU's memory: going on with {half} at once")
        masks = [piece for part, mask in zip(self.parts, self._scored, strict=True) for piece in _cut(part, mask, half)]
        self._set_parts([piece for part in self.parts for piece in part.split(half)], masks)


def _cut(part: Tensor, scored: Tensor | None, rows: int) -> Sequence[Tensor | None]:
    """``scored`` as ``part`` is cut: so many rows at a time."""
    return [None] * -(-len(part) // rows) if scored is None else scored.split(rows)


def _moves(rows: Sequence[Sequence[int]], start: int, at: list[int]) -> Iterator[list[Move]]:
    """The moves at every depth from ``start`` on; ``at`` holds the state that every policy is in, before and after."""
    for depth in range(start, len(rows[0])):
        found: dict[Move, int] = {}
        for policy, row in enumerate(rows):
            at[policy] = found.setdefault((at[policy], row[depth]), len(found))
        yield list(found)

"""Layer-major evaluation on a GPU: all states of a wave go through a sub-layer in a few launches.

For models too small to fill a GPU policy by policy (hidden sizes around 512 to 1,024), where launches and elementwise
passes cost as much as the products. A state is the activations of what several policies have in common so far. Per
sub-layer: norms of the states that go on, one grouped masked GEMM over their widest prefix (with rotation or activation
in its epilogue), attention, and one grouped GEMM with every new state's own output projection and its residual sum.
Every state is computed in tiles of its own, so its bits do not depend on which others there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError
from ..families import KINDS
from ..families.traits import activation
from ..model.decoder import Decoder
from ..model.grid import Grid
from ..text import predicting
from .members import PreparedLayer, Told, norm_weight, prepared, told
from .ops import dispatch
from .ops.grouped import ACTIVATIONS, STEP
from .outputs import Outputs
from .serving import foreign_arithmetic, foreign_device

SERVES = frozenset({
    "activation", "head norm", "length-dependent rotation", "logit transform", "one-plus norm", "residual scale",
    "sandwich norms", "scaled embedding", "score scale", "several rotations", "unrotated layers", "window",
})  # fmt: skip
"""The traits that this path computes; biases it computes too."""

# Tokens of the states that go through a sub-layer together: launches long enough for the host to stay ahead, and inner
# activations of some GB at most.
_TOKENS = 1 << 19
# What a program of the widest kernel keeps in shared memory.
_SHARED_BYTES = 200 * 1024

States = Tensor
"""[S, B, T, H]: the activations of S states on B sequences of T tokens."""


def unserved_by(decoder: Decoder) -> str | None:
    """Why this path cannot run the model, as the end of a sentence; None if it can."""
    if not decoder.resident:
        return "its layers stream"
    return (
        foreign_arithmetic(decoder, SERVES, ACTIVATIONS)
        or _foreign_sizes(decoder)
        or foreign_device(decoder, _SHARED_BYTES)
        or _foreign_copies(decoder)
    )


def _foreign_sizes(decoder: Decoder) -> str | None:
    s = decoder.structure
    if s.head_dim not in (16, 32, 64, 128, 256):
        return f"its head size is {s.head_dim}, not a power of two from 16 to 256"
    # The copy engine wants rows of whole 16 bytes.
    if s.hidden % 8 or any(sublayer.width % 8 for sublayer in s.sublayers):
        return "its hidden size or a width of its FFNs is not a multiple of 8"
    return None


def _foreign_copies(decoder: Decoder) -> str | None:
    if not dispatch.copy_engine(decoder.frame.head):
        return "the GPU has no copy engine (that of Hopper), or it cannot address the head"
    return None


@dataclass(frozen=True)
class _Jobs:
    """What some states have to go through in a sub-layer, and what the states after it make of that."""

    runs: list[int]  # the states that any new state goes on from at a level above 0
    widest: list[int]  # of every run: the highest level
    inners: list[int]  # of every job: its run
    levels: list[int]
    sources: list[int]
    targets: list[int]


def _jobs(moves: Sequence[tuple[int, int]], most: int, passing: bool) -> list[_Jobs]:
    """Jobs of up to ``most`` runs at a time. ``passing``: moves at level 0 are jobs, too; they go with the first."""
    widest: dict[int, int] = {}
    for source, level in moves:
        if level:
            widest[source] = max(widest.get(source, 0), level)
    runs, found = list(widest), []
    for first in range(0, len(runs), most):
        part = runs[first : first + most]
        place = {source: at for at, source in enumerate(part)}
        mine = [
            (target, source, level)
            for target, (source, level) in enumerate(moves)
            if (source in place if level else passing and first == 0)
        ]
        inners = [place[source] if level else 0 for _, source, level in mine]
        targets, sources, levels = (list(values) for values in zip(*mine, strict=True))
        found.append(_Jobs(part, [widest[source] for source in part], inners, levels, sources, targets))
    return found


@dataclass(frozen=True)
class _Outputs:
    """Output projections [L, hidden, columns] of a sub-layer, and which of them a level's is: the first if not said."""

    weights: Tensor
    bias: Tensor | None
    place: dict[int, int]


class Together:
    """Steps the states of a wave from sub-layer to sub-layer; inference only."""

    def __init__(self, decoder: Decoder, grid: Grid, library: Outputs | None):
        """``decoder`` in ranking order, with all its weights on the device; ``library`` in its dtype, or None for the
        dense output projections cut to the width."""
        self.decoder, self.grid, self.library = decoder, grid, library
        self.layers: list[PreparedLayer] = [prepared(decoder, grid, None, i) for i in range(grid.structure.layers)]
        self._epsilon, self._activation = decoder.config.rms_norm_eps, activation(decoder.config)
        self._scale = float(getattr(decoder.config, "residual_multiplier", 1.0))
        self._norm = norm_weight(decoder, decoder.frame.norm.weight.detach())
        self._told: dict[int, list[Told]] = {}

    @torch.no_grad()
    def begin(self, x: Tensor) -> States:
        """One state from x [B, T, H], which may be overwritten later."""
        return x[None].contiguous()

    @torch.no_grad()
    def advance(self, index: int, kind: str, states: States, moves: Sequence[tuple[int, int]]) -> States:
        """The states after sub-layer ``kind`` ("attention" or "ffn") of layer ``index``.

        ``moves[d]`` = (source state, level) of new state d; at level 0 the sub-layer is absent and the state passes. A
        source may have several moves; one that has none is dropped. May overwrite ``states``. Raises ``InputError`` for
        a state or a level that there is not.
        """
        at = index + KINDS.index(kind) * self.grid.structure.layers
        _check(moves, len(states), self.grid.maximum[at])
        sources = [source for source, _ in moves]
        stays = sources == list(range(len(states)))
        if not any(level for _, level in moves):
            return states if stays else states[sources]
        x, after = states.flatten(1, 2), getattr(self.layers[index], kind).after
        # What a state makes of itself may take its place. The sum with a norm in between is a step of its own.
        y = x if stays and after is None else x.new_empty(len(moves), *x.shape[1:])
        given = torch.empty_like(y) if after is not None else None
        outputs = self._outputs(index, at, kind, {level for _, level in moves})
        for jobs in _jobs(moves, self._together(x), passing=after is None and not stays):
            inner = (self._attended if kind == "attention" else self._hidden)(index, x, states.shape[2], jobs)
            self._add((y, x) if after is None else (given, None), inner, outputs, at, jobs)
        if after is not None:
            which = [target if level else -1 for target, (_, level) in enumerate(moves)]
            y = torch.ops.ppf.grouped_residual(x, given, after, sources, which, self._epsilon, self._scale)
        return y.view(-1, *states.shape[1:])

    @torch.no_grad()
    def losses(self, states: States, tokens: Tensor, scored: Tensor | None = None) -> Tensor:
        """Summed negative log-likelihood, fp64 [S] in nats, of ``tokens`` int64 [B, T] in every state, each sequence
        from its second token on; of those that are ``scored``, bool [B, T], if that is not None."""
        frame, x, length = self.decoder.frame, states.flatten(1, 2), states.shape[2]
        targets, most, sums = tokens.roll(-1, dims=1).flatten(), self._together(x), []
        counted = None if scored is None else predicting(scored).flatten()
        for first in range(0, len(x), most):
            some = range(first, min(len(x), first + most))
            normed = torch.ops.ppf.grouped_norm(x, self._norm, some, self._epsilon)
            losses = torch.ops.ppf.grouped_losses(normed, frame.head, targets, length, frame.scale, frame.cap)
            # One by one: how torch splits a sum depends on how many it is asked for.
            sums += [(row if counted is None else row[counted]).double().sum() for row in losses]
        return torch.stack(sums)

    @staticmethod
    def _together(x: Tensor) -> int:
        """How many of the states x [S, N, H] go through a step together."""
        return max(1, _TOKENS // x.shape[1])

    def _attended(self, index: int, x: Tensor, length: int, jobs: _Jobs) -> Tensor:
        """The input of o, [runs, N, columns]."""
        w, t, d = self.layers[index].attention, self._tell(length)[index], self.grid.structure.head_dim
        heads = self.grid.structure.attention[index].columns // d
        normed, rows = torch.ops.ppf.grouped_norm(x, w.norm, jobs.runs, self._epsilon), (heads + 2) * d
        qkv = torch.ops.ppf.grouped_heads(
            normed, w.qkv, w.bias, w.head_norm, t.cos, t.sin, [groups * rows for groups in jobs.widest], length, rows,
            self._epsilon,
        )  # fmt: skip
        del normed
        return torch.ops.ppf.grouped_attention(qkv, jobs.widest, length, heads, d, t.scale, t.window)

    def _hidden(self, index: int, x: Tensor, length: int, jobs: _Jobs) -> Tensor:
        """The input of down, [runs, N, columns]."""
        w, widths = self.layers[index].ffn, [level * self.grid.ffn_multiple for level in jobs.widest]
        normed = torch.ops.ppf.grouped_norm(x, w.norm, jobs.runs, self._epsilon)
        return torch.ops.ppf.grouped_hidden(normed, w.gate_up, w.bias, widths, self._activation)

    def _add(self, into: tuple[Tensor, Tensor | None], inner: Tensor, outputs: _Outputs, at: int, jobs: _Jobs) -> None:
        """The products of some jobs, written into the first of ``into`` and added to the second, if any."""
        which = [outputs.place.get(level, 0) for level in jobs.levels]
        widths = [level * self._unit(at) for level in jobs.levels]
        torch.ops.ppf.grouped_outputs(
            *into, inner, outputs.weights, outputs.bias, jobs.inners, widths, which, jobs.sources, jobs.targets,
            self._scale,
        )  # fmt: skip

    def _unit(self, at: int) -> int:
        """Columns of an output projection that a level has."""
        return self.grid.steps[at] * self.grid.structure.sublayers[at].columns

    def _outputs(self, index: int, at: int, kind: str, levels: set[int]) -> _Outputs:
        """The output projections of some levels of sub-layer ``at``, all in one tensor."""
        w = getattr(self.layers[index], kind)
        dense, bias = (w.o[0], w.o_bias) if kind == "attention" else (w.down[0], w.down_bias)
        if self.library is None and self._unit(at) % STEP == 0:
            return _Outputs(dense[None].contiguous(), bias, {})
        # Each one by itself is zero from its width to the end of the step.
        wanted = sorted(levels - {0}, reverse=True)
        if self.library is None:
            weights = [dense[:, : level * self._unit(at)] for level in wanted]
        else:
            weights = [weight for _, weight in self.library.descending(at, wanted)]
        columns = -(-weights[0].shape[1] // 8) * 8  # the copy engine wants rows of whole 16 bytes
        place = {level: which for which, level in enumerate(wanted)}
        return _Outputs(torch.ops.ppf.grouped_stack(weights, columns), bias, place)

    def _tell(self, length: int) -> list[Told]:
        """What every layer knows of positions in sequences of ``length``; of the last length asked for it is kept."""
        if length not in self._told:
            dtype = self.decoder.dtype
            known = told(self.decoder, length)
            self._told = {length: [replace(t, cos=t.cos.to(dtype), sin=t.sin.to(dtype)) for t in known]}
        return self._told[length]


def _check(moves: Sequence[tuple[int, int]], states: int, maximum: int) -> None:
    for source, level in moves:
        if not (0 <= source < states and 0 <= level <= maximum):
            remedy = f"Use states below {states} and levels up to {maximum}"
            raise InputError("moves", (source, level), "names a state or a level that there is not", remedy)

"""Many policies at once on a GPU, for models so small that launches and memory traffic are what they cost.

Policies go in chunks, those that begin alike together; a layer is run once for every distinct beginning among a chunk's
policies. The first layers that all of a chunk's policies keep whole come from the dense model's activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families.traits import activation
from ..model.decoder import Decoder
from ..model.grid import Grid
from ..text import batches
from .members import PreparedLayer, norm_weight, prepared, told
from .ops.members import ACTIVATIONS
from .outputs import Outputs
from .plan import executed, order, shared
from .serving import foreign_arithmetic, foreign_device

SERVES = frozenset({
    "activation", "head norm", "length-dependent rotation", "one-plus norm", "sandwich norms", "scaled embedding",
    "score scale", "several rotations", "unrotated layers", "window",
})  # fmt: skip
"""The traits that this path computes; biases it computes too."""

# Tokens of all members of a chunk: work for a GPU to be busy for some milliseconds, in about 1.5 GB.
CHUNK_TOKENS = 1 << 19
_MEMBERS = 256
_DENSE_BYTES = 2 << 30
# What a program of the widest kernel keeps in shared memory.
_SHARED_BYTES = 200 * 1024


def applies(decoder: Decoder) -> bool:
    """True for what the kernels are made for; see :func:`unserved_by`."""
    return unserved_by(decoder) is None


def unserved_by(decoder: Decoder) -> str | None:
    """Why this path cannot run the model, as the end of a sentence; None if it can."""
    if not decoder.resident:
        return "its layers stream"
    return (
        foreign_arithmetic(decoder, SERVES, ACTIVATIONS)
        or _foreign_sizes(decoder)
        or foreign_device(decoder, _SHARED_BYTES)
    )


def _foreign_sizes(decoder: Decoder) -> str | None:
    s = decoder.structure
    if s.hidden not in (64, 128, 256) or s.head_dim not in (16, 32, 64, 128):
        return f"its hidden size is {s.hidden} and its head size {s.head_dim}, not powers of two up to 256 and 128"
    return None


@dataclass(frozen=True)
class _Tables:
    """The members of one layer, int32 on the device."""

    widest: Tensor  # of every member before the layer: the most kv-groups that a policy goes on with
    after: tuple[Tensor, ...]  # of every member after it: the member it continues, its kv-groups, its FFN level


class Batched:
    """Evaluates levels in execution order (attention 0, FFN 0, attention 1, …) on int64 ``sequences`` [N, T]."""

    def __init__(self, decoder: Decoder, grid: Grid, layers: Sequence[PreparedLayer], sequences: Tensor):
        self.decoder, self.grid, self.layers = decoder, grid, layers
        self.length = sequences.shape[1]
        self.targets = sequences.roll(-1, dims=1).flatten()
        self.told = told(decoder, self.length)
        self._epsilon, self._activation = decoder.config.rms_norm_eps, activation(decoder.config)
        self._norm = norm_weight(decoder, decoder.frame.norm.weight.detach())
        begun = torch.cat([decoder.frame.begin(part) for part in batches(sequences, decoder.device)])
        self._dense = [begun.flatten(0, 1)[None]]  # [1, N·T, hidden] before every layer
        self._dense_levels = executed(grid.maximum)
        self._deepest = min(grid.structure.layers, _DENSE_BYTES // self._dense[0].nbytes)
        self.members = max(1, min(_MEMBERS, CHUNK_TOKENS // sequences.numel()))

    @torch.no_grad()
    def losses(self, levels: Sequence[Sequence[int]]) -> Tensor:
        """Summed negative log-likelihood of every policy, fp64 [P] in nats."""
        head, device = self.decoder.frame.head, self.decoder.device
        total = torch.empty(len(levels), dtype=torch.float64, device=device)
        for chunk, members, x in self._chunks(levels):
            sums = torch.ops.ppf.members_losses(x, self._norm, head, self.targets, self.length, self._epsilon)
            total[_to_device(chunk, torch.int64, device)] = sums[_to_device(members, torch.int64, device)]
        return total

    def _chunks(self, levels: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Indices of some policies, the member each one ends as, and the members' activations [D, N·T, hidden]."""
        ordered = order(levels)
        for start in range(0, len(ordered), self.members):
            chunk = ordered[start : start + self.members]
            rows = [levels[index] for index in chunk]
            first = min(min(shared(self._dense_levels, row) for row in rows) // 2, self._deepest)
            tables, members = _tables(rows, first, self.decoder.device)
            x = self._dense_state(first)
            for index, table in enumerate(tables, first):
                x = self._layer(index, x, table)
            yield chunk, members, x

    def _layer(self, index: int, x: Tensor, tables: _Tables) -> Tensor:
        """The members' activations after layer ``index``."""
        a, f = self.layers[index].attention, self.layers[index].ffn
        columns = self.grid.structure.attention[index].columns
        inner = self._inner(index, x, tables.widest) if len(a.qkv) else x.new_empty(*x.shape[:2], 0)
        return torch.ops.ppf.members_mix(
            x, inner, a.o, a.o_bias, a.after, f.norm, f.gate_up, f.bias, f.down, f.down_bias, f.after, *tables.after,
            columns, self.grid.ffn_multiple, self._epsilon, self._activation,
        )  # fmt: skip

    def _inner(self, index: int, x: Tensor, widest: Tensor) -> Tensor:
        """The input of the layer's o, [D, N·T, G·g·d]."""
        w, t, d = self.layers[index].attention, self.told[index], self.grid.structure.head_dim
        columns = self.grid.structure.attention[index].columns
        qkv = torch.ops.ppf.members_project(
            x, w.norm, w.qkv, w.bias, w.head_norm, t.cos, t.sin, widest, self.length, columns + 2 * d, self._epsilon
        )
        return torch.ops.ppf.members_attention(qkv, widest, self.length, columns // d, d, t.scale, t.window)

    def _dense_state(self, depth: int) -> Tensor:
        """The dense model's activations [1, N·T, hidden] before layer ``depth``."""
        while len(self._dense) <= depth:
            at = len(self._dense) - 1
            table = _tables([self._dense_levels], at, self.decoder.device)[0][0]
            self._dense.append(self._layer(at, self._dense[at], table))
        return self._dense[depth]


def prepare(decoder: Decoder, grid: Grid, library: Outputs | None) -> list[PreparedLayer]:
    """The layers of ``decoder`` (in ranking order) with the o and down of every level: those of ``library``, or the
    dense ones cut to the width."""
    return [prepared(decoder, grid, library, index) for index in range(grid.structure.layers)]


def _tables(levels: list[Sequence[int]], first: int, device: torch.device) -> tuple[list[_Tables], list[int]]:
    """The members of every layer from ``first`` on, all starting from one state; and every policy's last member."""
    state = [0] * len(levels)  # of every policy: its member before the layer
    rows: list[list[int]] = []
    for layer in range(first, len(levels[0]) // 2):
        widest = [0] * (max(state) + 1)
        after: dict[tuple[int, int, int], int] = {}
        for policy, row in enumerate(levels):
            key = state[policy], row[2 * layer], row[2 * layer + 1]
            widest[key[0]] = max(widest[key[0]], key[1])
            state[policy] = after.setdefault(key, len(after))
        rows += [widest, *([key[at] for key in after] for at in range(3))]
    # Every row starts at a multiple of 16 bytes: kernels are compiled anew for pointers of another alignment.
    padded = [row + [0] * (_MEMBERS - len(row)) for row in rows]
    packed = _to_device([value for row in padded for value in row], torch.int32, device).view(-1, _MEMBERS)
    views = [row[: len(values)] for row, values in zip(packed, rows, strict=True)]
    tables = [_Tables(views[at], tuple(views[at + 1 : at + 4])) for at in range(0, len(views), 4)]
    return tables, state


def _to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One copy that does not wait for the GPU: pinned memory, which the allocator keeps until the copy is done."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

"""Many policies at once on a GPU, for models so small that launches and memory traffic are what they cost.

Policies go in chunks, those that begin alike together; a layer is run once for every distinct beginning among a chunk's
policies. The first layers that all of a chunk's policies keep whole come from the dense model's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fitting.library import Library
from ..model.grid import Grid
from ..model.structure import Structure
from ..model.weights import DecoderWeights, LayerWeights
from .ops import dispatch
from .ops.members import interleave, interleave_heads
from .plan import executed, order, shared

# Tokens of all members of a chunk: work for a GPU to be busy for some milliseconds, in about 1.5 GB.
CHUNK_TOKENS = 1 << 19
_MEMBERS = 256
_DENSE_BYTES = 2 << 30
# What a program of the widest kernel keeps in shared memory.
_SHARED_BYTES = 200 * 1024


def applies(weights: DecoderWeights) -> bool:
    """True for what the kernels are made for: 16-bit weights, powers of two, a GPU with enough shared memory."""
    s = weights.structure
    if weights.device.type != "cuda" or not dispatch.kernels_apply(weights.embedding):
        return False
    memory = torch.cuda.get_device_properties(weights.device).shared_memory_per_block_optin
    return s.hidden in (64, 128, 256) and s.head_dim in (16, 32, 64, 128) and memory >= _SHARED_BYTES


@dataclass(frozen=True)
class PreparedLayer:
    """One layer's weights as ``ppf.fast.ops.members`` takes them."""

    attention_norm: Tensor
    qkv: Tensor  # [G·(g+2)·d, hidden]
    o: Tensor  # [levels, hidden, G·g·d]
    ffn_norm: Tensor
    gate_up: Tensor  # [2C, hidden]
    down: Tensor  # [levels, hidden, C]


@dataclass(frozen=True)
class _Tables:
    """The members of one layer, int32 on the device."""

    widest: Tensor  # of every member before the layer: the most kv-groups that a policy goes on with
    after: tuple[Tensor, ...]  # of every member after it: the member it continues, its kv-groups, its FFN level


class Batched:
    """Evaluates levels in execution order (attention 0, FFN 0, attention 1, …) on int64 ``sequences`` [N, T]."""

    def __init__(self, weights: DecoderWeights, grid: Grid, layers: Sequence[PreparedLayer], sequences: Tensor):
        self.weights, self.grid, self.layers = weights, grid, layers
        self.length, self.tokens, self.parts = sequences.shape[1], sequences.numel(), [sequences]
        self.targets = sequences.roll(-1, dims=1).flatten()
        single = torch.empty(0, device=weights.device)
        cos, sin = weights.rotary(single, torch.arange(self.length, device=weights.device)[None])
        self.cos, self.sin = (t[0, :, : grid.structure.head_dim // 2].contiguous() for t in (cos, sin))
        self._dense = [F.embedding(sequences.flatten(), weights.embedding)[None]]  # [1, N, hidden] before every layer
        self._dense_levels = executed(grid.maximum)
        self._deepest = min(grid.structure.layers, _DENSE_BYTES // self._dense[0].nbytes)
        self.members = max(1, min(_MEMBERS, CHUNK_TOKENS // self.tokens))

    @torch.no_grad()
    def losses(self, levels: Sequence[Sequence[int]]) -> Tensor:
        """Summed negative log-likelihood of every policy, fp64 [P] in nats."""
        w, device = self.weights, self.weights.device
        total = torch.empty(len(levels), dtype=torch.float64, device=device)
        for chunk, members, x in self._chunks(levels):
            sums = torch.ops.ppf.members_losses(x, w.norm, w.head, self.targets, self.length, w.epsilon)
            total[_to_device(chunk, torch.int64, device)] = sums[_to_device(members, torch.int64, device)]
        return total

    @torch.no_grad()
    def visit(self, levels: Sequence[Sequence[int]], use: Callable[[int, int, Tensor], None]) -> None:
        """Call ``use(index, 0, hidden)`` for every policy, with the final hidden states [B, T, hidden] of the text
        before the last norm."""
        for chunk, members, x in self._chunks(levels):
            for index, member in zip(chunk, members, strict=True):
                use(index, 0, x[member].view(-1, self.length, x.shape[2]))

    def _chunks(self, levels: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Indices of some policies, the member each one ends as, and the members' activations [D, N, hidden]."""
        ordered = order(levels)
        for start in range(0, len(ordered), self.members):
            chunk = ordered[start : start + self.members]
            rows = [levels[index] for index in chunk]
            first = min(min(shared(self._dense_levels, row) for row in rows) // 2, self._deepest)
            tables, members = _tables(rows, first, self.weights.device)
            x = self._dense_state(first)
            for layer, table in zip(self.layers[first:], tables, strict=True):
                x = self._layer(layer, x, table)
            yield chunk, members, x

    def _layer(self, layer: PreparedLayer, x: Tensor, tables: _Tables) -> Tensor:
        s, epsilon = self.grid.structure, self.weights.epsilon
        rows = s.group_rows + 2 * s.head_dim
        qkv = torch.ops.ppf.members_project(
            x, layer.attention_norm, layer.qkv, self.cos, self.sin, tables.widest, self.length, rows, epsilon
        )
        inner = torch.ops.ppf.members_attention(qkv, tables.widest, self.length, s.heads_per_group, s.head_dim)
        return torch.ops.ppf.members_mix(
            x, inner, layer.o, layer.ffn_norm, layer.gate_up, layer.down, *tables.after, s.group_rows,
            self.grid.ffn_multiple, epsilon,
        )  # fmt: skip

    def _dense_state(self, depth: int) -> Tensor:
        """The dense model's activations [1, N, hidden] before layer ``depth``."""
        while len(self._dense) <= depth:
            at = len(self._dense) - 1
            table = _tables([self._dense_levels], at, self.weights.device)[0][0]
            self._dense.append(self._layer(self.layers[at], self._dense[at], table))
        return self._dense[depth]


def prepare(weights: DecoderWeights, grid: Grid, library: Library | None) -> list[PreparedLayer]:
    """The layers of ``weights`` (in ranking order) with the o and down of every level."""
    return [_prepare(w, grid, library, index) for index, w in enumerate(weights.layers)]


def _prepare(w: LayerWeights, grid: Grid, library: Library | None, index: int) -> PreparedLayer:
    s = grid.structure
    if library is None:
        o, down = w.o[None].expand(s.kv_groups + 1, -1, -1), w.down[None].expand(grid.maximum[-1] + 1, -1, -1)
    else:
        o, down = library.levels(index), library.levels(s.layers + index)
    return PreparedLayer(w.attention_norm, _grouped_rows(w, s), o, w.ffn_norm, interleave(w.gate, w.up), down)


def _grouped_rows(w: LayerWeights, s: Structure) -> Tensor:
    """[G·(g+2)·d, hidden]: of every kv-group the rows of its query heads, of its key and of its value."""
    parts = interleave_heads(w.q, s.head_dim), interleave_heads(w.k, s.head_dim), w.v
    return torch.cat([part.view(s.kv_groups, -1, s.hidden) for part in parts], 1).flatten(0, 1)


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

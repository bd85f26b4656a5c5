"""Which units of one dimension a masked op keeps: a prefix, a list of 64-unit blocks, or any list of indices.

The list is checked once, on the host, when the selection is made; the ops trust it afterwards, so that no call has to
synchronise with the device. Device copies are cached: make a selection once and reuse it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import InputError

BLOCK = 64

# How a selection travels through an op schema, which knows only integers and tensors.
PREFIX, BLOCKS, INDICES = 0, 1, 2
# Indices without repetition: an input side may then be put back in place (``input_kind``).
UNIQUE = 3
KIND_NAMES = ("prefix", "blocks", "indices")


class Selection:
    """``width`` kept units of ``total``. Make one with :meth:`prefix`, :meth:`blocks`, :meth:`indices` or :meth:`full`.

    Order matters and is kept; a unit may be listed twice (it then counts twice, forward and backward).
    """

    def __init__(self, kind: int, total: int, width: int, entries: Tensor | None):
        """Internal: use the named constructors, which check their arguments."""
        self.kind, self.total, self.width = kind, total, width
        self.input_kind = UNIQUE if kind == INDICES and entries.unique().numel() == width else kind
        self._entries = entries
        self._rows = None if entries is None else _expand(entries, kind)
        self._copies: dict[tuple[str, torch.device], Tensor] = {}
        self._grouped: dict[int, Selection] = {}

    @classmethod
    def prefix(cls, width: int, total: int) -> Selection:
        """Keep units [0, width). Raises ``InputError`` unless 0 <= width <= total."""
        if not 0 <= width <= total:
            raise InputError("width", width, "is not a prefix of the dimension", f"Use 0 to {total}")
        return cls(PREFIX, total, int(width), None)

    @classmethod
    def full(cls, total: int) -> Selection:
        """Keep all ``total`` units."""
        return cls.prefix(total, total)

    @classmethod
    def blocks(cls, blocks: Sequence[int] | Tensor, total: int) -> Selection:
        """Keep the 64-unit blocks ``blocks`` (block b is units [64·b, 64·b+64)); ``total`` is a multiple of 64."""
        if total % BLOCK:
            raise InputError("total", total, f"is not a multiple of {BLOCK}", "Use Selection.indices here")
        entries = _checked(blocks, "blocks", total // BLOCK)
        return cls(BLOCKS, total, entries.numel() * BLOCK, entries)

    @classmethod
    def indices(cls, indices: Sequence[int] | Tensor, total: int) -> Selection:
        """Keep the listed units. A list that is a prefix, or whole aligned blocks, becomes that cheaper kind.

        An index tensor on a device is read back once, here.
        """
        rows = _checked(indices, "indices", total)
        width = rows.numel()
        if torch.equal(rows, torch.arange(width, dtype=torch.int32)):
            return cls.prefix(width, total)
        if width % BLOCK == 0 and total % BLOCK == 0:
            heads = rows[::BLOCK]
            if not (heads % BLOCK).any() and torch.equal(_expand(heads // BLOCK, BLOCKS), rows):
                return cls(BLOCKS, total, width, heads // BLOCK)
        return cls(INDICES, total, width, rows)

    def groups(self, size: int) -> Selection:
        """The same selection when every unit stands for ``size`` consecutive rows (kv-groups to rows of q, k or v).

        Made once per size; call it before ``torch.compile``, which cannot trace the host-side list work.
        """
        known = self._grouped.get(size)
        if known is None:
            known = self._grouped[size] = self._expand_groups(size)
        return known

    def _expand_groups(self, size: int) -> Selection:
        if self._rows is None:
            return Selection.prefix(self.width * size, self.total * size)
        rows = (self._rows.long()[:, None] * size + torch.arange(size)).flatten()
        return Selection.indices(rows, self.total * size)

    def rows(self, device: torch.device) -> Tensor | None:
        """Kept units as int32 [width] on ``device``; None for a prefix."""
        return self._copy("rows", self._rows, device)

    def entries(self, device: torch.device) -> Tensor | None:
        """Block numbers (blocks) or kept units (indices), int32, on ``device``; None for a prefix."""
        return self._copy("entries", self._entries, device)

    def block_list(self, device: torch.device) -> Tensor | None:
        """Kept block numbers as int32 on ``device`` if this is a block selection, else None."""
        return self.entries(device) if self.kind == BLOCKS else None

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """The kept part of ``tensor`` along ``dim``: a view for a prefix, else a copy."""
        rows = self.rows(tensor.device)
        return tensor.narrow(dim, 0, self.width) if rows is None else tensor.index_select(dim, rows)

    def check(self, field: str, size: int) -> None:
        """Raise ``InputError`` unless this selection was made for a dimension of ``size`` units."""
        if self.total != size:
            raise InputError(field, self, f"does not fit a dimension of {size}", f"Make it with total={size}")

    def _copy(self, name: str, source: Tensor | None, device: torch.device) -> Tensor | None:
        if source is None or source.device == device:
            return source
        copy = self._copies.get((name, device))
        if copy is None:
            copy = source.to(device)
            # A tensor made while tracing belongs to the graph, not to us.
            if not torch.compiler.is_compiling():
                self._copies[name, device] = copy
        return copy

    def __repr__(self) -> str:
        return f"Selection({KIND_NAMES[self.kind]}, {self.width} of {self.total})"


def _expand(entries: Tensor, kind: int) -> Tensor:
    if kind != BLOCKS:
        return entries
    return (entries[:, None] * BLOCK + torch.arange(BLOCK, dtype=torch.int32)).flatten()


def _checked(values: Sequence[int] | Tensor, field: str, limit: int) -> Tensor:
    given = values if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.int64)
    if given.dim() != 1 or given.dtype not in (torch.int32, torch.int64):
        shown = f"{given.dtype} {list(given.shape)}"
        raise InputError(field, shown, "is not a list of integers", "Give a 1-D integer tensor or a list")
    given = given.detach().cpu()
    outside = given[(given < 0) | (given >= limit)]
    if outside.numel():
        raise InputError(field, int(outside[0]), "is out of range", f"Use 0 to {limit - 1}")
    return given.to(torch.int32).contiguous().clone()

"""Index lists: checked once on the host, then trusted by every kernel that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...errors import InputError

INDEX_DTYPES = (torch.int32, torch.int64)


class Index:
    """An index list for a dimension of size ``limit``: checked when built, with its copy on every device used so far.

    ``values`` is a 1-D int32 or int64 tensor [N] on any device (on a GPU: one synchronisation). ``unit`` is the largest
    of 8, 4, 2 and 1 such that the list consists of whole aligned blocks of ``unit`` consecutive channels. Raises
    ``IndexError`` naming position, value and limit for an entry outside [0, limit), ``InputError`` for all else.
    """

    def __init__(self, values: Tensor, limit: int):
        check_index("index", values)
        if not 0 <= limit < 2**31:
            raise InputError("limit", limit, "is not the size of a dimension", "Use 0 to 2^31 - 1")
        self.limit = int(limit)
        self.host, (self.unit,) = pack([("index", values.cpu(), self.limit)])
        self._copies: dict[torch.device, Tensor] = {self.host.device: self.host}

    def __len__(self) -> int:
        return self.host.numel()

    def on(self, device: torch.device) -> Tensor:
        """The list as int32 [N] on ``device``."""
        if device not in self._copies:
            self._copies[device] = self.host.to(device)
        return self._copies[device]


def check_index(name: str, index: Any) -> None:
    """Raises ``InputError`` unless ``index`` is a 1-D int32 or int64 tensor; entries are not looked at."""
    if not isinstance(index, Tensor):
        raise InputError(
            name, type(index).__name__, "is not an index list", "Pass a tensor or a ppf.fast.ops.index.Index"
        )
    if index.dtype not in INDEX_DTYPES:
        raise InputError(name, index.dtype, "is no index dtype", "Use int32 or int64")
    if index.dim() != 1:
        raise InputError(name, list(index.shape), f"has {index.dim()} dimensions, 1 expected", "Flatten it")


def pack(lists: Sequence[tuple[str, Tensor, int]], pinned: bool = False) -> tuple[Tensor, list[int]]:
    """Checks (name, host list, limit) triples; returns them as one int32 tensor, back to back, and their units."""
    packed = torch.empty(sum(values.numel() for _, values, _ in lists), dtype=torch.int32, pin_memory=pinned)
    units, at = [], packed.data_ptr()
    for name, values, limit in lists:
        values = values.contiguous()
        count = values.numel()
        units.append(_C.pack_index(name, values.data_ptr(), values.element_size(), count, limit, at))
        at += 4 * count
    return packed, units

"""What fast paths ask of refitted output projections; :class:`ppf.fitting.library.Library` gives it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

from torch import Tensor


class Outputs(Protocol):
    """Output projections refitted to every level of every sub-layer, numbered as in :class:`ppf.model.grid.Grid`."""

    def weight(self, sublayer: int, level: int) -> Tensor:
        """The one of a level, [hidden, width]."""
        ...

    def descending(self, sublayer: int, levels: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Those of some levels, each once, the highest level first."""
        ...

    def levels(self, sublayer: int) -> Tensor:
        """Those of one sub-layer, [levels, hidden, n], zero past each level's width."""
        ...

"""The library: for every sub-layer and level, the output projection refitted to reproduce the dense output best.

With the units in ranking order, the kept inputs of a level are the leading block of the Gram H. One Cholesky
factorisation H + λI = L Lᵀ therefore serves every level: the leading block of L⁻¹ inverts the leading block of L, and
with Y = W H L⁻ᵀ the least-squares solution W H[:,S] (H[S,S] + λI)⁻¹ is Y[:, :w] · L⁻¹[:w, :w]. Only Y and L⁻¹ are kept
(C² + hidden·C numbers, whatever the number of levels). L⁻¹ is triangular, so that a level's solution is the one before
plus one product with the rows in between: all levels together cost what a single dense product does.

Everything up to Y and L⁻¹ is fp64: rounding a Gram with a few dominant directions to tf32 or fp32 before factorising it
asks for a hundred times the damping. Rounded afterwards to fp32, a solution is off by √cond(H + λI) roundings, at most
some 3,000 for 11,008 inputs at the default damping: 2e-4, an eighteenth of a bf16 rounding. Products with L⁻¹ are full
fp32 for the same reason; tf32 would be off by as much as the weight itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PPFError
from ..families import KINDS
from ..files import write_safetensors
from ..model.grid import Grid
from ..model.layer import LayerRanking, expand_units
from .calibration import LayerStatistics, Statistics

# Share of the Gram's mean diagonal added to it. See dev/LOG.md for the values tried.
DAMPING = 1e-3
# Up to this many inputs the factors are kept in fp64: it costs megabytes. Beyond, fp32 halves gigabytes.
_EXACT_INPUTS = 2048
# Solved levels to keep: on a CPU so many bytes, on a GPU this share of the memory that is free.
_CACHE_BYTES, _FREE_SHARE = 8 << 30, 0.85


@dataclass(frozen=True)
class Refit:
    """One sub-layer's refits in factored form; n inputs in ranking order.

    ``error[level]`` is the level's error energy (E‖(Ŵ − W)x‖² + λ‖Ŵ‖²) / E‖Wx‖² over the calibration text, fp64: what
    the refit minimises, 1 at width 0 and 0 at full width, where the dense weight itself stands.
    """

    dense: Tensor  # [hidden, n]
    half: Tensor  # Y = W H L⁻ᵀ [hidden, n]; with ``inverse`` on the device, or in a memory-mapped file
    inverse: Tensor  # L⁻¹ [n, n]
    widths: tuple[int, ...]  # channels of each level
    error: Tensor  # [levels]

    def weight(self, level: int) -> Tensor:
        """The refitted output projection [hidden, widths[level]] in the dense one's dtype; solved at each call."""
        if self.widths[level] == self.dense.shape[1]:
            return self.dense
        *_, solution = self.solutions(level)
        return solution

    def solutions(self, last: int | None = None) -> Iterator[Tensor]:
        """The weights of all levels from 0 to ``last``, to the bit those of :meth:`weight`."""
        device, dtype = self.dense.device, self.half.dtype
        total = torch.zeros(self.dense.shape, dtype=dtype, device=device)
        before = 0
        for width in self.widths[: None if last is None else last + 1]:
            new = slice(before, width)
            total[:, :width].addmm_(self.half[:, new].to(device), self.inverse[new, :width].to(device))
            before = width
            yield self.dense if width == total.shape[1] else total[:, :width].to(self.dense.dtype).contiguous()


def refit(
    weight: Tensor, statistics: Statistics, order: Tensor, widths: Sequence[int], damping: float = DAMPING
) -> Refit:
    """Least-squares refits of an output projection for each prefix width.

    ``weight`` [hidden, n] is already in ranking order; ``order`` int64 [n] is that order, which takes the statistics'
    channels (in checkpoint order) along; ``widths`` are channel counts. The full width keeps ``weight`` bit for bit.
    Raises ``PPFError`` for NaN or Inf among the activations.
    """
    order = order.to(statistics.gram.device)
    gram = statistics.gram[order][:, order].double()
    if not gram.isfinite().all():
        raise PPFError(f"the calibration Gram of {len(gram)} inputs holds NaN or Inf: so do the model's activations")
    dense = weight.double()
    target = dense @ gram
    inverse = _inverse_factor(gram, damping)
    half = target @ inverse.T
    dtype = torch.float64 if len(gram) <= _EXACT_INPUTS else torch.float32
    error = _error_energies(half, (target * dense).sum(), widths)
    return Refit(weight, half.to(dtype), inverse.to(dtype), tuple(widths), error)


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """L⁻¹ of H + λI = L Lᵀ, fp64 [n, n]; ``gram`` is overwritten.

    The Gram comes as fp32 sums. Where a few inputs dwarf all others, rounding makes it indefinite by more than λ: then
    λ grows tenfold, as often as it must.
    """
    # The floor is for a sub-layer whose input is always zero: it has nothing to refit, and that is no error.
    mean, added = gram.diagonal().mean().clamp_min(1e-30), 0.0
    while True:
        gram.diagonal().add_((damping - added) * mean)
        factor, info = torch.linalg.cholesky_ex(gram)
        if not int(info):
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            return torch.linalg.solve_triangular(factor, identity, upper=False)
        added, damping = damping, max(10 * damping, DAMPING)


def _error_energies(half: Tensor, energy: Tensor, widths: Sequence[int]) -> Tensor:
    """Relative error energies fp64 [levels]: a prefix of w inputs explains ‖Y[:, :w]‖² of the dense output's energy."""
    explained = torch.cat((half.new_zeros(1), half.square().sum(0).cumsum(0)))[list(widths)]
    error = (1 - explained / energy.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0).cpu()
    error[torch.tensor(widths) == half.shape[1]] = 0
    return error


def refit_layer(
    outputs: Mapping[str, Tensor], statistics: LayerStatistics, ranking: LayerRanking, grid: Grid, index: int,
    damping: float = DAMPING,
) -> dict[str, Refit]:  # fmt: skip
    """One layer's refits by kind of sub-layer; ``outputs`` are its output projections [hidden, n] in ranking order,
    ``statistics`` in checkpoint order."""
    found = {}
    for kind, output in outputs.items():
        order = expand_units(ranking.of(kind), grid.structure.of(kind)[index].columns)
        found[kind] = refit(output, statistics.of(kind), order, widths_of(grid, kind, index), damping)
    return found


class Library:
    """Refitted output projections by sub-layer (numbered as in :class:`Grid`) and level.

    If the solutions of all levels fit into ``cache_bytes`` (default: 8 GiB on a CPU, 85 % of what is free on a GPU), a
    sub-layer's are solved together when the first one is asked for, and kept. Otherwise each is solved when asked for,
    and the most recently used are kept. The results are the same, bit for bit.
    """

    def __init__(
        self, refits: Sequence[Refit | None], dtype: torch.dtype | None = None, cache_bytes: int | None = None
    ):
        """``refits``: one a sub-layer; None where the model has none."""
        self._refits, self._dtype = tuple(refits), dtype
        there = [refit for refit in self._refits if refit is not None]
        self._limit = _room(there[0].dense.device) if cache_bytes is None else cache_bytes
        self._all_fit = sum(_solved_bytes(refit, dtype) for refit in there) <= self._limit
        self._cache: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._bytes = 0

    @classmethod
    def of_layers(cls, layers: Sequence[Mapping[str, Refit]]) -> Library:
        """From every layer's refits by kind."""
        return cls([layer.get(kind) for kind in KINDS for layer in layers])

    def weight(self, sublayer: int, level: int) -> Tensor:
        """The refitted output projection, [hidden, width of that level]."""
        key = (sublayer, level)
        if key not in self._cache:
            refit = self._refits[sublayer]
            solved = enumerate(refit.solutions()) if self._all_fit else [(level, refit.weight(level))]
            for at, weight in solved:
                self._keep((sublayer, at), weight if self._dtype is None else weight.to(self._dtype))
        self._cache.move_to_end(key)
        return self._cache[key]

    def levels(self, sublayer: int) -> Tensor:
        """The refitted output projections of all levels, [levels, hidden, n], zero past each width. Not kept here."""
        refit = self._refits[sublayer]
        stacked = refit.dense.new_zeros((len(refit.widths), *refit.dense.shape), dtype=self._dtype)
        for level, weight in enumerate(refit.solutions()):
            stacked[level, :, : weight.shape[1]] = weight
        return stacked

    def _keep(self, key: tuple[int, int], weight: Tensor) -> None:
        self._cache[key] = weight
        self._bytes += weight.nbytes
        while self._bytes > self._limit and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1].nbytes

    def to(self, dtype: torch.dtype) -> Library:
        """The same refits, handed out in ``dtype``."""
        return Library(self._refits, dtype, self._limit)

    def error(self, sublayer: int) -> Tensor:
        """Relative output error energy of every level of a sub-layer, fp64 [levels]; one zero where there is none."""
        refit = self._refits[sublayer]
        return torch.zeros(1, dtype=torch.float64) if refit is None else refit.error


def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return _CACHE_BYTES
    return int(_FREE_SHARE * torch.cuda.mem_get_info(device)[0])


def _solved_bytes(refit: Refit, dtype: torch.dtype | None) -> int:
    return sum(refit.widths) * len(refit.dense) * (dtype or refit.dense.dtype).itemsize


_STORED = "half", "inverse", "error"


def save_refits(path: Path, refits: Mapping[str, Refit]) -> None:
    """Write one layer's factors; the dense weights are the checkpoint's and are not stored again."""
    write_safetensors(path, {f"{kind}.{n}": getattr(part, n) for kind, part in refits.items() for n in _STORED})


def load_refits(
    tensors: dict[str, Tensor], outputs: Mapping[str, Tensor], grid: Grid, index: int, on_device: bool = True
) -> dict[str, Refit]:
    """Inverse of :func:`save_refits`, for the output projections of the same layer in ranking order and the same grid.

    ``on_device`` moves the factors to the layer's device; otherwise they stay where ``tensors`` are (memory-mapped, as
    safetensors reads them), and what a solution needs of them is copied when it is solved. Raises ``KeyError`` for a
    factor that is not there.
    """
    found = {}
    for kind, dense in outputs.items():
        half, inverse, error = (tensors[f"{kind}.{name}"] for name in _STORED)
        if on_device:
            half, inverse = half.to(dense.device), inverse.to(dense.device)
        found[kind] = Refit(dense, half, inverse, tuple(widths_of(grid, kind, index)), error)
    return found


def fits_on_device(grid: Grid, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a GPU has room for all factors and all solutions; always true on a CPU, where they are mapped anyway."""
    if device.type != "cuda":
        return True
    columns = sum(sum(widths_of(grid, kind, i)) for kind in KINDS for i in range(grid.structure.layers))
    return library_bytes(grid) + grid.structure.hidden * dtype.itemsize * columns <= _room(device)


def library_bytes(grid: Grid) -> int:
    """Bytes of all factors of a model, in memory and on disk."""
    inputs = [sublayer.width for sublayer in grid.structure.sublayers]
    return sum((8 if n <= _EXACT_INPUTS else 4) * n * (n + grid.structure.hidden) for n in inputs)


def widths_of(grid: Grid, kind: str, index: int) -> list[int]:
    """Columns of the output projection at every level of a sub-layer."""
    at = KINDS.index(kind) * grid.structure.layers + index
    return [level * grid.steps[at] * grid.structure.of(kind)[index].columns for level in range(grid.maximum[at] + 1)]

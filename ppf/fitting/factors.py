"""The library's factors: for one output projection, what every level's least-squares solution follows from.

With the units in ranking order and H̃ = H + λI = L Lᵀ the damped Gram of the inputs, going down from one width to the
next predicts the inputs that leave, P, from those that stay, S: x_P ≈ B x_S with B = H̃[P,S] H̃[S,S]⁻¹ =
L[P,S] L[S,S]⁻¹. Their weights are carried over: W_S + W_P B. Regressions on nested sets compose, so that from the dense
weight at full width this gives, at every width, the Ŵ that minimises E‖(Ŵ − W)x‖² + λ‖Ŵ − W‖², which is
W_S + W_P H̃[P,S] H̃[S,S]⁻¹ (the surgeon's update of Hassibi and Stork, 1993, for all of P at once). All levels follow
from the B of neighbouring widths, under n²/2 numbers whatever the number of levels, and the dense weight, which is the
checkpoint's. All levels together cost what one dense product does.

Everything up to B is fp64: rounding a Gram with a few dominant directions to tf32 or fp32 before factorising it asks
for a hundred times the damping. B itself holds coefficients of regressions, for which 16 bits are enough.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PPFError
from ..families import KINDS
from ..model.grid import Grid, unrestricted
from ..model.layer import LayerRanking, expand_units
from ..timings import timed
from .calibration import LayerStatistics, Statistics

# Share of the Gram's mean diagonal added to it. See dev/LOG.md for the values tried.
DAMPING = 1e-3
# Up to this many inputs regressions are kept in fp32: it costs megabytes. Beyond, bf16 halves gigabytes.
_EXACT_INPUTS = 2048
# Side of the blocks in which triangular systems are solved, and columns of a product that exist at once in fp64.
_BLOCK = 4096
# Inputs whose levels are carried over together: with fewer, writing the weights would take longer than the products.
_GROUP = 512
STORED = "regression", "error", "boundaries"
"""What a layer's file holds of every kind of sub-layer, as ``{kind}.{name}``."""


@dataclass(frozen=True)
class Factors:
    """One sub-layer's regressions; n inputs in ranking order.

    ``boundaries`` are widths, ascending from 0 to n. ``packed`` 1-D, fp32 or bf16, holds for every width w and the one
    below, v, the coefficients B [w - v, v], row by row, ascending. ``error`` fp64 [len(boundaries)] is, of the level
    that keeps w inputs, (E‖(Ŵ − W)x‖² + λ‖Ŵ − W‖²) / (E‖Wx‖² + λ‖W‖²) over the calibration text, Ŵ padded with zeros:
    what the solution minimises, as a share of what width 0 has; 1 there and 0 at full width.
    """

    packed: Tensor
    boundaries: tuple[int, ...]
    error: Tensor

    def __post_init__(self) -> None:
        if self.packed.numel() != packed_size(self.boundaries) or len(self.error) != len(self.boundaries):
            raise PPFError(f"{self.packed.numel()} coefficients do not belong to the widths {self.boundaries}")

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """v, w and B [w - v, v], a view, of all neighbouring widths, descending."""
        stop = self.packed.numel()
        for low, high in reversed(list(zip(self.boundaries, self.boundaries[1:], strict=False))):
            start = stop - low * (high - low)
            yield low, high, self.packed[start:stop].view(high - low, low)
            stop = start


def packed_size(boundaries: Sequence[int]) -> int:
    """How many coefficients there are."""
    return sum(low * (high - low) for low, high in zip(boundaries, boundaries[1:], strict=False))


def stored_dtype(inputs: int) -> torch.dtype:
    """What the coefficients of so many inputs are kept in."""
    return torch.float32 if inputs <= _EXACT_INPUTS else torch.bfloat16


def factorise(
    weight: Tensor, statistics: Statistics, order: Tensor, boundaries: Sequence[int], damping: float = DAMPING,
    dtype: torch.dtype | None = None,
) -> Factors:  # fmt: skip
    """The regressions of an output projection's inputs between ``boundaries`` (ascending from 0 to n).

    ``weight`` [hidden, n] is already in ranking order, on the statistics' device; ``order`` int64 [n] is that order,
    which takes the statistics' channels (in checkpoint order) along. ``damping`` is λ as a share of the Gram's mean
    diagonal. ``dtype`` is the coefficients', by default :func:`stored_dtype`. Takes at most some 12 n² bytes beside the
    Gram's own 4 n². Raises ``PPFError`` for NaN or Inf among the activations.
    """
    factor = _cholesky(statistics.gram, order.to(statistics.gram.device), damping)
    packed = factor.new_empty(packed_size(boundaries), dtype=dtype or stored_dtype(len(factor)))
    start = 0
    for low, high in zip(boundaries, boundaries[1:], strict=False):
        stop = start + low * (high - low)
        packed[start:stop] = _regression(factor, low, high).flatten()
        start = stop
    return Factors(packed, tuple(boundaries), _errors(weight, factor, boundaries))


def _cholesky(gram: Tensor, order: Tensor, damping: float) -> Tensor:
    """L of H + λI = L Lᵀ, fp64 [n, n] in column order.

    The Gram comes as fp32 sums. Where a few inputs dwarf all others, rounding makes it indefinite by more than λ: then
    λ grows tenfold, as often as it must.
    """
    while True:
        damped = gram[order][:, order].double()
        if not damped.sum().isfinite():
            problem = "holds NaN or Inf: so do the model's activations"
            raise PPFError(f"the calibration Gram of {len(gram)} inputs {problem}")
        # The floor is for a sub-layer whose input is always zero: it has nothing to refit, and that is no error.
        damped.diagonal().add_(damping * damped.diagonal().mean().clamp_min(1e-30))
        # In place: it is symmetric, so that its transpose is itself in the order that LAPACK wants.
        factor, info = damped.mT, torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if not int(info):
            return factor
        damping = max(10 * damping, DAMPING)
        del damped, factor  # before there is another


def _regression(factor: Tensor, low: int, high: int) -> Tensor:
    """B = L[low:high, :low] L[:low, :low]⁻¹, fp64 [high - low, low].

    Block by block from the right: torch would copy the whole of L[:low, :low].
    """
    found = factor[low:high, :low].clone(memory_format=torch.contiguous_format)
    for stop in range(low, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        square = factor[start:stop, start:stop]
        part = torch.linalg.solve_triangular(square, found[:, start:stop], upper=False, left=False)
        found[:, start:stop] = part
        found[:, :start].addmm_(part, factor[start:stop, :start], alpha=-1)
    return found


def _errors(weight: Tensor, factor: Tensor, boundaries: Sequence[int]) -> Tensor:
    """Relative error energies fp64 [len(boundaries)]: those of ‖W_P L_PP‖², for H̃[P,P] − H̃[P,S] H̃[S,S]⁻¹ H̃[S,P] =
    L_PP L_PPᵀ. Since L is triangular, that is the energy of the columns P of W L."""
    n = len(factor)
    columns = [
        (weight[:, start:].double() @ factor[start:, start : start + _BLOCK]).square().sum(0)
        for start in range(0, n, _BLOCK)
    ]
    lost = torch.cat((*columns, factor.new_zeros(1))).flip(0).cumsum(0).flip(0)[list(boundaries)]
    error = (lost / lost[0].clamp_min(torch.finfo(torch.float64).tiny)).cpu()
    error[0] = 1  # a weight of zeros too
    return error


def solve(dense: Tensor, factors: Factors, widths: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """The solutions [hidden, width] at ``widths``, in the dtype of ``dense`` [hidden, n], which is the one at full
    width; descending, each with its width.

    Computed in fp32 (or fp64, if ``dense`` is) and rounded when handed out, in the same steps whatever is asked for.
    Coefficients may be on another device than ``dense``: they are copied as they are needed. Raises ``PPFError`` for
    widths that are not among the boundaries.
    """
    wanted, n = set(widths), dense.shape[1]
    if unknown := sorted(wanted - set(factors.boundaries)):
        raise PPFError(f"there are no solutions for the widths {unknown}, only for {factors.boundaries}")
    if n in wanted:
        yield n, dense
    if between := wanted - {0, n}:
        yield from _descend(dense, factors, between)
    if 0 in wanted and n:
        yield 0, dense.new_empty(len(dense), 0)


def _descend(dense: Tensor, factors: Factors, wanted: Collection[int]) -> Iterator[tuple[int, Tensor]]:
    """Group by group: what lies below a group is written once for all its levels, and for each that is asked for."""
    carried = _copied(dense, torch.promote_types(dense.dtype, torch.float32))
    for group in _groups(factors):
        top, bottom = group[0][1], group[-1][0]
        held: list[Tensor] = []  # what the group's levels so far have below it, ascending
        for low, high, block in group:
            if low < min(wanted):
                return
            block = block.to(dense.device)
            _carry(carried[:, bottom:low], carried[:, low:high], block[:, bottom:])
            held.insert(0, block[:, :bottom])
            if low in wanted and low > bottom:
                found = _copied(carried[:, :low], carried.dtype)
                _carry(found[:, :bottom], carried[:, low:top], torch.cat(held))
                yield low, found.to(dense.dtype)
        _carry(carried[:, :bottom], carried[:, bottom:top], torch.cat(held))
        if bottom in wanted:
            yield bottom, _copied(carried[:, :bottom], dense.dtype)


def _groups(factors: Factors) -> Iterator[list[tuple[int, int, Tensor]]]:
    """The blocks, descending, in lists that span at least ``_GROUP`` inputs each, but for the last."""
    group = []
    for block in factors.blocks():
        group.append(block)
        if group[0][1] - block[0] >= _GROUP:
            yield group
            group = []
    if group:
        yield group


def _carry(stay: Tensor, leave: Tensor, block: Tensor) -> None:
    """Add to the weights of inputs that stay what those of inputs that leave contribute, ``leave`` @ ``block``."""
    if not stay.numel():
        return
    if not (block.is_cuda and block.dtype is torch.bfloat16 and stay.dtype is torch.float32):
        stay.addmm_(leave, block.to(stay.dtype))
        return
    # On the matrix units: the weights as two bf16 numbers each, whose products with bf16 are exact in fp32.
    large = leave.bfloat16()
    for part in (large, (leave - large).bfloat16()):
        stay += torch.mm(part, block, out_dtype=torch.float32)


def _copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


@timed("factorising")
def factorise_layer(
    outputs: Mapping[str, Tensor], statistics: LayerStatistics, ranking: LayerRanking, grid: Grid, index: int,
    damping: float = DAMPING,
) -> dict[str, Factors]:  # fmt: skip
    """One layer's factors by kind of sub-layer; ``outputs`` are its output projections [hidden, n] in ranking order,
    ``statistics`` in checkpoint order. Raises as :func:`factorise` does."""
    found = {}
    for kind, output in outputs.items():
        order = expand_units(ranking.of(kind), grid.structure.of(kind)[index].columns)
        found[kind] = factorise(output, statistics.of(kind), order, boundaries_of(grid, kind, index), damping)
    return found


def tensors_of(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """One layer's factors by kind as the tensors of its file, named as ``STORED`` says. The dense weights are the
    checkpoint's and are not stored again."""
    tensors = {}
    for kind, part in factors.items():
        values = part.packed, part.error, torch.tensor(part.boundaries)
        tensors |= {f"{kind}.{name}": value for name, value in zip(STORED, values, strict=True)}
    return tensors


def widths_of(grid: Grid, kind: str, index: int) -> list[int]:
    """Columns of the output projection at every level of a sub-layer."""
    at = KINDS.index(kind) * grid.structure.layers + index
    return [level * grid.steps[at] * grid.structure.of(kind)[index].columns for level in range(grid.maximum[at] + 1)]


def boundaries_of(grid: Grid, kind: str, index: int) -> list[int]:
    """The widths between which a sub-layer's factors are kept: those of the grid's levels; where it holds portable
    policies only, those of all, for their price is measured."""
    return widths_of(unrestricted(grid), kind, index)

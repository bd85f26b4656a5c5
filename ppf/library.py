"""The library: for every sub-layer and level, the output projection refitted to reproduce the dense output best.

With the units in ranking order, the kept inputs of a level are the leading block of the Gram H. One Cholesky
factorisation H + λI = L Lᵀ therefore serves every level: the leading block of L factorises the leading block of H, and
the least-squares solution W H[:,S] (H[S,S] + λI)⁻¹ is (W H L⁻ᵀ)[:, :w] · L[:w, :w]⁻¹, one triangular solve a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .calibration import LayerStatistics, Statistics
from .errors import PPFError
from .files import write_safetensors
from .grid import Grid
from .weights import LayerRanking, LayerWeights, expand_units

# Share of the Gram's mean diagonal added to it. See dev/LOG.md for the values tried.
DAMPING = 1e-3


@dataclass(frozen=True)
class Refit:
    """One sub-layer's levels 0…top: ``weights[level]`` is [hidden, width], ``error[level]`` its output error energy.

    The energy is E‖(Ŵ − W)x‖² / E‖Wx‖² over the calibration text, fp64: 1 at width 0, about 0 at full width.
    """

    weights: tuple[Tensor, ...]
    error: Tensor


def refit(
    weight: Tensor, statistics: Statistics, order: Tensor, widths: Sequence[int], damping: float = DAMPING
) -> Refit:
    """Least-squares refits of an output projection for each prefix width.

    ``weight`` [hidden, n] is already in ranking order; ``order`` int64 [n] is that order, which takes the statistics'
    channels (in checkpoint order) along; ``widths`` are channel counts. The full width keeps ``weight`` bit for bit.
    Raises ``PPFError`` if the Gram is not positive definite even after damping (NaN activations, say).
    """
    order = order.to(statistics.gram.device)
    gram = statistics.gram[order][:, order].double()
    dense = weight.double()
    # The floor is for a sub-layer whose input is always zero: it has nothing to refit, and that is no error.
    added = damping * gram.diagonal().mean().clamp_min(1e-30)
    damped = gram + added * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        raise PPFError("the calibration Gram is not positive definite: the model's activations hold NaN or Inf")
    target = dense @ gram
    energy = (target * dense).sum()
    half = torch.linalg.solve_triangular(factor.T, target, upper=True, left=False)
    weights, errors = [], []
    for width in widths:
        if width == len(gram):
            weights.append(weight)
            errors.append(torch.zeros((), dtype=torch.float64))
            continue
        block = factor[:width, :width]
        solution = torch.linalg.solve_triangular(block, half[:, :width], upper=False, left=False)
        # E‖(Ŵ−W)x‖² expanded; the cross term uses the undamped Gram, so the energy is the true one.
        residual = (
            energy - 2 * (solution * target[:, :width]).sum() + ((solution @ gram[:width, :width]) * solution).sum()
        )
        weights.append(solution.to(weight.dtype).contiguous())
        errors.append((residual / energy.clamp_min(torch.finfo(torch.float64).tiny)).cpu())
    return Refit(tuple(weights), torch.stack(errors))


def refit_layer(
    layer: LayerWeights, statistics: LayerStatistics, ranking: LayerRanking, grid: Grid, damping: float = DAMPING
) -> tuple[Refit, Refit]:
    """All levels of one layer's o and down; ``layer`` is in ranking order, ``statistics`` in checkpoint order."""
    s = grid.structure
    groups = [level * s.group_rows for level in range(s.kv_groups + 1)]
    channels = [level * grid.ffn_multiple for level in range(s.channels // grid.ffn_multiple + 1)]
    query = expand_units(ranking.attention, s.group_rows)
    return (
        refit(layer.o, statistics.attention, query, groups, damping),
        refit(layer.down, statistics.ffn, ranking.ffn, channels, damping),
    )


class Library:
    """Refitted output projections by sub-layer (numbered as in :class:`Grid`) and level."""

    def __init__(self, refits: Sequence[Refit]):
        self._refits = tuple(refits)

    def weight(self, sublayer: int, level: int) -> Tensor:
        """The refitted o or down, [hidden, width of that level]."""
        return self._refits[sublayer].weights[level]

    def to(self, dtype: torch.dtype) -> Library:
        """The same library in ``dtype``; no copy if it has it already."""
        return Library([Refit(tuple(w.to(dtype) for w in r.weights), r.error) for r in self._refits])

    def error(self, sublayer: int) -> Tensor:
        """Relative output error energy of every level of a sub-layer, fp64 [levels]."""
        return self._refits[sublayer].error


def save_refits(path: Path, attention: Refit, ffn: Refit) -> None:
    """Write one layer's refits; the full width is the dense weight and is not stored again."""
    tensors = {}
    for name, part in (("attention", attention), ("ffn", ffn)):
        tensors[f"{name}.error"] = part.error
        tensors |= {f"{name}.{level}": w for level, w in enumerate(part.weights[:-1])}
    write_safetensors(path, tensors)


def load_refits(tensors: dict[str, Tensor], layer: LayerWeights) -> tuple[Refit, Refit]:
    """Inverse of :func:`save_refits`, for the same layer in ranking order."""
    return _load(tensors, "attention", layer.o), _load(tensors, "ffn", layer.down)


def _load(tensors: dict[str, Tensor], name: str, dense: Tensor) -> Refit:
    error = tensors[f"{name}.error"]
    levels = [tensors[f"{name}.{level}"].to(dense.device, dense.dtype) for level in range(len(error) - 1)]
    return Refit((*levels, dense), error)

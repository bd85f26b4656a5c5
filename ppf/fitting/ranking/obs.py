"""The OBS ranking: units leave in rounds, and after each round the others are refitted before they are judged again.

Optimal brain surgeon for structures, as ZipLM (arXiv 2302.04089) and Týr use it: removing the inputs S from a layer
with weight W and damped Gram H costs tr(W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ), if the others make up for it by W − W_S ((H⁻¹)_SS)⁻¹
(H⁻¹)_S; H⁻¹ of what stays is H⁻¹ − (H⁻¹)_{:,S} ((H⁻¹)_SS)⁻¹ (H⁻¹)_S. Two units that carry the same signal look both
dispensable to any one-shot score; here the second becomes precious as soon as the first is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import PPFError

# As in the library: share of the Gram's mean diagonal added to it.
_DAMPING = 1e-3
# Units leave one at a time if there are at most so many; else in so many rounds of equal size.
_ROUNDS = 256


def removal_scores(output: Tensor, gram: Tensor, unit: int, rounds: int = _ROUNDS) -> Tensor:
    """When each input leaves, fp32 [n]: 0 for the inputs of the first unit to go, the highest for those of the last.

    ``output`` [hidden, n], ``gram`` [n, n]; a unit is ``unit`` consecutive inputs. Units of one round leave together,
    the cheapest first. Works in fp64 on the tensors' device. Raises ``PPFError`` for a Gram that is not finite.
    """
    h, weight = gram.double(), output.to(torch.float64, copy=True)
    h = h + _DAMPING * h.diagonal().mean().clamp_min(1e-30) * torch.eye(len(h), dtype=h.dtype, device=h.device)
    factor, info = torch.linalg.cholesky_ex(h)
    if int(info) or not factor.isfinite().all():
        raise PPFError("the calibration Gram is not positive definite: the model's activations hold NaN or Inf")
    inverse = torch.cholesky_inverse(factor)
    units = len(h) // unit
    gone = torch.zeros(units, dtype=torch.bool, device=h.device)
    position = torch.zeros(units, device=h.device)
    step = -(-units // rounds)
    for start in range(0, units, step):
        costs = _costs(weight, inverse, unit).masked_fill(gone, torch.inf)
        leaving = costs.argsort(stable=True)[: min(step, units - start)]
        position[leaving] = torch.arange(start, start + len(leaving), device=h.device, dtype=position.dtype)
        gone[leaving] = True
        if start + step < units:
            weight, inverse = _without(weight, inverse, leaving, unit)
    return position.repeat_interleave(unit)


def _costs(weight: Tensor, inverse: Tensor, unit: int) -> Tensor:
    """tr(W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ) of every unit S, fp64 [units]; what has left already gives anything."""
    if unit == 1:
        return weight.square().sum(0) / inverse.diagonal()
    units = len(inverse) // unit
    blocks = inverse.view(units, unit, units, unit).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    columns = weight.view(len(weight), units, unit).permute(1, 2, 0)  # W_Sᵀ [units, unit, hidden]
    factor, _ = torch.linalg.cholesky_ex(blocks)
    return torch.linalg.solve_triangular(factor, columns, upper=False).square().sum((1, 2)).nan_to_num(torch.inf)


def _without(weight: Tensor, inverse: Tensor, leaving: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Weight and inverse Gram after the ``leaving`` units have gone; their own rows and columns are rounding noise."""
    inputs = (leaving[:, None] * unit + torch.arange(unit, device=leaving.device)).flatten()
    rows = inverse[inputs]
    share = torch.cholesky_solve(rows, torch.linalg.cholesky(rows[:, inputs]))
    return weight.addmm_(weight[:, inputs], share, alpha=-1), inverse.addmm_(rows.T, share, alpha=-1)

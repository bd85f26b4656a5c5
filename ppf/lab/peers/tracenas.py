"""TraceNAS (arXiv 2602.02891): evolution on a zero-shot proxy, how well a candidate's gradients agree with the dense
model's. No true evaluation is spent."""

from __future__ import annotations

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...families import KINDS
from ...fitting.masked import masked_losses
from ...model.decoder import Decoder
from ...model.policy import Policy
from ...model.structure import Structure
from ...text import take_tokens
from .evolution import evolve
from .layers import projections
from .statistics import PeerStatistics

_PROXIES = 300
_PROXY_TOKENS = 4_096


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """The candidate with the best gradient agreement among 300 that an elitist evolution scores.

    The proxy is Σ over all projections of (kept share) · (Pearson correlation between the loss gradients of the dense
    and of the candidate's weights), removed weights having gradient zero; on 4,096 tokens of calibration text, with the
    dense output projections cut to the width. The authors add low-rank gradients to save memory; here they are exact,
    and all weights must be resident: ``InputError`` if they stream.
    """
    statistics.decoder.require_resident("TraceNAS")
    agreement = _Agreement(statistics, budget)
    return evolve(statistics, budget, _PROXIES, lambda policies: [-agreement(policy) for policy in policies])


class _Agreement:
    """The proxy of one model; holds the dense model's gradients, centred and scaled to length one."""

    def __init__(self, statistics: PeerStatistics, budget: Budget):
        self.grid, self.decoder = budget.grid, statistics.decoder
        self.tokens = take_tokens(statistics.sequences, _PROXY_TOKENS).to(self.decoder.device)
        self.layers, self.leaves, self.owners = _with_gradients(self.decoder)
        self.dense = [_unit(gradient) for gradient in self._gradients(self.grid.dense())]

    def __call__(self, policy: Policy) -> float:
        gradients = self._gradients(policy)
        shares = (self.grid.encode([policy])[0] / torch.tensor(self.grid.top))[self.owners]
        found = [float(a @ _unit(b)) if b.any() else 0.0 for a, b in zip(self.dense, gradients, strict=True)]
        return float(shares.double() @ torch.tensor(found, dtype=torch.float64))

    def _gradients(self, policy: Policy) -> list[Tensor]:
        """Loss gradients of all projections, flattened, zero where a weight is removed."""
        levels = self.grid.encode([policy])[0].tolist()
        with torch.enable_grad():
            loss = masked_losses(self.decoder, self.grid, levels, self.tokens, self.layers).mean()
        found = torch.autograd.grad(loss, self.leaves, allow_unused=True)
        return [torch.zeros(1) if g is None else g.flatten().float() for g in found]


def _with_gradients(decoder: Decoder) -> tuple[list[dict[str, Tensor]], list[Tensor], list[int]]:
    """The layers with their projections as leaves of a graph of their own; the leaves, and the sub-layer of each."""
    layers, leaves, owners = [], [], []
    for index, layer in enumerate(decoder.layers):
        layers.append(dict(layer))
        for kind, name, matrix in projections(decoder, index):
            leaves.append(matrix.detach().requires_grad_())
            owners.append(index + KINDS.index(kind) * decoder.structure.layers)
            layers[-1][f"{name}.weight"] = leaves[-1]
    return layers, leaves, owners


def _unit(gradient: Tensor) -> Tensor:
    centred = gradient - gradient.mean()
    return centred / centred.norm().clamp_min(1e-30)

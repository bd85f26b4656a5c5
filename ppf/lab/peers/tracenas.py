"""TraceNAS (arXiv 2602.02891): evolution on a zero-shot proxy, how well a candidate's gradients agree with the dense
model's. No true evaluation is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...fast.plain import masked_losses
from ...model.policy import Policy
from ...model.structure import Structure
from ...model.weights import DecoderWeights
from ...text import take_tokens
from .evolution import evolve
from .statistics import PeerStatistics

_PROXIES = 300
_PROXY_TOKENS = 4_096
_MATRICES = "q", "k", "v", "o", "gate", "up", "down"


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """The candidate with the best gradient agreement among 300 that an elitist evolution scores.

    The proxy is Σ over all projections of (kept share) · (Pearson correlation between the loss gradients of the dense
    and of the candidate's weights), removed weights having gradient zero; on 4,096 tokens of calibration text, with the
    dense o and down cut to the width. The authors add low-rank gradients to save memory; at this size they are exact.
    """
    agreement = _Agreement(statistics, budget)
    return evolve(statistics, budget, _PROXIES, lambda policies: [-agreement(policy) for policy in policies])


class _Agreement:
    """The proxy of one model; holds the dense model's gradients, centred and scaled to length one."""

    def __init__(self, statistics: PeerStatistics, budget: Budget):
        self.grid, self.tokens = budget.grid, take_tokens(statistics.sequences, _PROXY_TOKENS)
        self.weights = _with_gradients(statistics.weights)
        self.dense = [_unit(gradient) for gradient in self._gradients(self.grid.dense())]

    def __call__(self, policy: Policy) -> float:
        gradients = self._gradients(policy)
        levels = self.grid.encode([policy])[0] / torch.tensor(self.grid.maximum)
        attention, ffn = levels.chunk(2)
        shares = torch.stack([attention] * 4 + [ffn] * 3, 1).flatten()  # in the order of the matrices, by layer
        found = [float(a @ _unit(b)) if b.any() else 0.0 for a, b in zip(self.dense, gradients, strict=True)]
        return float(shares.double() @ torch.tensor(found, dtype=torch.float64))

    def _gradients(self, policy: Policy) -> Sequence[Tensor]:
        """Loss gradients of all projections, flattened, zero where a weight is removed."""
        leaves = [getattr(layer, name) for layer in self.weights.layers for name in _MATRICES]
        with torch.enable_grad():
            levels = self.grid.encode([policy])[0].tolist()
            tokens = self.tokens.to(self.weights.device)
            loss = masked_losses(self.weights, self.grid, levels, tokens).mean()
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros(1) if g is None else g.flatten().float() for g in found]


def _with_gradients(weights: DecoderWeights) -> DecoderWeights:
    """The same weights as leaves of a graph of their own."""
    layers = tuple(
        replace(layer, **{f.name: getattr(layer, f.name).detach().requires_grad_() for f in fields(layer)})
        for layer in weights.layers
    )
    return replace(weights, layers=layers)


def _unit(gradient: Tensor) -> Tensor:
    centred = gradient - gradient.mean()
    return centred / centred.norm().clamp_min(1e-30)

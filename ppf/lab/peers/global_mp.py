"""Global MP (arXiv 2209.14624): one magnitude threshold for all weights of the model. Needs no data.

As is, from the paper and its published code (github.com/manasgupta-1/GlobalMP), in its vanilla form: all weights of all
linear layers are ranked by |w| together, and the smallest go, as many as the ratio says.

Adapted: the paper prunes single weights, here units go. What a sub-layer keeps of its kv-groups or channels is the
share of its weights at or above the threshold, those of all matrices of attention or of the FFN together; which units
stay is the ranking's matter, as for everybody. Embeddings and norms are no units. The paper's variant with a minimum
for every layer, against collapse at high ratios, is left out: residual streams go round a sub-layer that is absent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...choose.budget import Budget
from ...families import KINDS
from ...model.decoder import Decoder
from ...model.policy import Policy
from ...model.structure import Structure
from .layers import projections
from .statistics import PeerStatistics

# Magnitudes are told apart by the leading bits of their fp32 pattern, exponent and 8 of the mantissa: exactly where
# weights are bf16, to 0.4 % elsewhere. Weights may stream, and counts are all that is kept of them.
_DROPPED_BITS = 15
_BINS = 1 << (31 - _DROPPED_BITS)


def allocate(structure: Structure, statistics: PeerStatistics, budget: Budget) -> Policy:
    """Keep of every sub-layer the share of its weights that one threshold for all leaves."""
    counts = magnitude_counts(statistics.decoder)
    costs = [sublayer.units * sublayer.cost for sublayer in structure.sublayers]
    return budget.policy(shares_above(counts, costs, budget.kept))


def magnitude_counts(decoder: Decoder) -> Tensor:
    """How many weights of every sub-layer have which magnitude, int64 [S, bins] on the CPU, smallest first."""
    layers = decoder.structure.layers
    counts = torch.zeros(len(KINDS) * layers, _BINS, dtype=torch.int64)
    for index in range(layers):  # layer by layer: they may stream
        for kind, _, matrix in projections(decoder, index):
            pattern = matrix.float().abs().flatten().view(torch.int32) >> _DROPPED_BITS
            counts[KINDS.index(kind) * layers + index] += torch.bincount(pattern, minlength=_BINS).cpu()
    return counts


def shares_above(counts: Tensor, costs: Sequence[int], kept: float) -> Tensor:
    """Share of every sub-layer's weights, fp64 [S], at or above the threshold at which ``kept`` of all ``costs`` [S]
    stays, as nearly as the bins allow; 0 for a sub-layer without weights."""
    cost = torch.tensor(costs, dtype=torch.float64)
    above = counts.flip(1).cumsum(1).double()  # [S, bins], largest first
    shares = above / above[:, -1:].clamp_min(1)
    return shares[:, (cost @ shares - kept * cost.sum()).abs().argmin()]

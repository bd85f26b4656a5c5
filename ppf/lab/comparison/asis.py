"""Two methods as their users run them: without the refit, each with its own ranking."""

from __future__ import annotations

import torch
from torch import Tensor

from ...choose.budget import ratio_budget
from ...fast.plain import masked_losses
from ...fitting.calibration import LayerStatistics
from ...fitting.ranking import rank_layer
from ...fitting.run import Run
from ...model.policy import Policy
from ...model.precision import compute_dtype
from ...model.weights import DecoderWeights, LayerRanking, expand_units
from ..peers import PEERS, PeerStatistics

# At once: all their logits are in memory.
_TOKENS = 8_192

# Ranking, allocation, and whether the removed units' mean outputs are added as biases.
AS_IS = {
    "wanda-sp as is": ("wanda-sp", "uniform", False),
    "flap as is": ("flap-wifv", "flap", True),
}


def measure_as_is(run: Run, name: str, statistics: PeerStatistics, ratio: float, sequences: Tensor) -> tuple:
    """Policy and log-perplexity on int64 ``sequences`` [N, T] of the masked model, nothing refitted."""
    ranking_name, allocation, with_biases = AS_IS[name]
    policy = PEERS[allocation].allocate(run.structure, statistics, ratio_budget(run.grid, ratio))
    ranking = [_rank(run, ranking_name, index) for index in range(run.structure.layers)]
    weights = run.weights.permuted(ranking).to(compute_dtype(run.weights.dtype, run.device))
    biases = _biases(run, weights, ranking, policy) if with_biases else {}
    return policy, _log_perplexity(run, weights, policy, sequences, biases)


def _rank(run: Run, name: str, index: int) -> LayerRanking:
    # Scores that need no gradients look at moments only, which is what a run keeps of its statistics.
    moments = LayerStatistics(*(m.to(run.device) for m in run.moments(index)))
    return rank_layer(name, run.weights.layers[index], moments, run.structure)


def _biases(run: Run, weights: DecoderWeights, ranking: list[LayerRanking], policy: Policy) -> dict[int, Tensor]:
    """FLAP's compensation by sub-layer: W·x̄ over the removed channels, [hidden]; ``weights`` are in ranking order."""
    s, biases = run.structure, {}
    for index, (layer, order) in enumerate(zip(weights.layers, ranking, strict=True)):
        attention, ffn = run.moments(index)
        means = attention.mean[expand_units(order.attention, s.group_rows)], ffn.mean[order.ffn]
        widths = policy.attention[index] * s.group_rows, policy.ffn[index]
        outputs = layer.o, layer.down
        for sublayer, output, mean, width in zip((index, s.layers + index), outputs, means, widths, strict=True):
            removed = output[:, width:].float() @ mean[width:].to(output.device)
            biases[sublayer] = removed.to(output.dtype)
    return biases


@torch.no_grad()
def _log_perplexity(
    run: Run, weights: DecoderWeights, policy: Policy, sequences: Tensor, biases: dict[int, Tensor]
) -> float:
    levels = run.grid.encode([policy])[0].tolist()
    total = torch.zeros((), dtype=torch.float64, device=weights.device)
    for tokens in sequences.to(weights.device).split(max(1, _TOKENS // sequences.shape[1])):
        total += masked_losses(weights, run.grid, levels, tokens, biases).double().sum()
    count, length = sequences.shape
    return float(total) / (count * (length - 1))

"""Two methods as their users run them: without the refit, each with its own ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...choose.budget import RatioBudget
from ...families import KINDS, Family
from ...fast.permute import identity, permute_layer
from ...fitting.calibration import LayerStatistics
from ...fitting.masked import masked_losses
from ...fitting.materialize import materialize
from ...fitting.ranking import rank_layer
from ...fitting.session import Session
from ...model.build import LAYERS
from ...model.decoder import Decoder
from ...model.grid import Grid
from ...model.layer import Layer, LayerRanking, expand_units
from ...model.policy import Policy
from ...model.precision import compute_dtype
from ..peers import PEERS, PeerStatistics

# At once: all their logits are in memory.
_TOKENS = 8_192

# Ranking, allocation, and whether the removed units' mean outputs are added as biases.
AS_IS = {
    "wanda-sp as is": ("wanda-sp", "uniform", False),
    "flap as is": ("flap-wifv", "flap", True),
}


def unsuited(name: str, family: Family) -> str | None:
    """Why the method called ``name`` cannot be run on models of ``family``, as the end of a sentence; None if it can.
    All but those of :data:`AS_IS` can."""
    with_biases = name in AS_IS and AS_IS[name][2]
    if with_biases and any(part.after for part in family.parts.values()):
        return "adds means to what sub-layers give, and this family has norms behind them"
    return None


def measure_as_is(session: Session, name: str, statistics: PeerStatistics, ratio: float, sequences: Tensor) -> tuple:
    """Policy and log-perplexity on int64 ``sequences`` [N, T] of the masked model, nothing refitted."""
    grid = session.run.grid
    policy = PEERS[AS_IS[name][1]].allocate(session.run.structure, statistics, RatioBudget(grid, ratio))
    decoder, biases = _as_is(session, name, statistics.moments, policy)
    return policy, _log_perplexity(decoder, grid, policy, sequences, biases)


def as_is_model(session: Session, name: str, moments: Sequence[LayerStatistics], policy: Policy) -> PreTrainedModel:
    """A model that computes what :func:`measure_as_is` measures, in fp32 or the checkpoint's dtype: the dense one with
    the removed units' columns at zero, since no result's class has biases where FLAP adds them. ``moments`` stand in
    the run's ranking order."""
    decoder, biases = _as_is(session, name, moments, policy)
    model = materialize(decoder, identity(decoder), session.run.grid, session.run.grid.dense())
    for index, kind in product(range(decoder.structure.layers), KINDS):
        part = decoder.structure.of(kind)[index]
        if part.units:
            output = model.get_submodule(f"{LAYERS}{index}.{decoder.family.parts[kind].output_name}")
            bias = biases.get(index + KINDS.index(kind) * decoder.structure.layers)
            _cut(output, policy[kind][index] * part.columns, bias)
    return model


@torch.no_grad()
def _cut(output: nn.Linear, kept: int, bias: Tensor | None) -> None:
    """Leave the first ``kept`` columns of an output projection, and add ``bias``; of one without any column nothing
    stays but that, in which its own bias is."""
    output.weight[:, kept:] = 0
    own = output.bias if kept else None
    found = own if bias is None else bias if own is None else own + bias
    output.bias = None if found is None else nn.Parameter(found.to(output.weight.dtype))


def _as_is(
    session: Session, name: str, moments: Sequence[LayerStatistics], policy: Policy
) -> tuple[Decoder, dict[int, Tensor]]:
    """The decoder in the method's own ranking, in the dtype that is computed in, and the biases it adds."""
    ranking_name, _, with_biases = AS_IS[name]
    decoder = session.permuted  # in the run's order like the moments: the ranking refers to it
    ranking = _ranking(decoder, ranking_name, moments)
    decoder = decoder.to(compute_dtype(decoder.dtype, decoder.device))
    decoder = replace(decoder, layers=_Reordered(decoder, ranking))
    return decoder, _biases(decoder, ranking, moments, policy) if with_biases else {}


class _Reordered(Sequence[Layer]):
    """A decoder's layers in a ranking's order, made when asked for: none exists twice for long."""

    def __init__(self, decoder: Decoder, ranking: Sequence[LayerRanking]):
        self._decoder, self._ranking, self._made = decoder, ranking, (-1, {})

    def __len__(self) -> int:
        return len(self._ranking)

    def __getitem__(self, index: int) -> Layer:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._made[0] != index:
            self._made = -1, {}
            layer = permute_layer(self._decoder.names(index), self._decoder.layers[index], self._ranking[index])
            self._made = index, layer
        return self._made[1]


def _ranking(decoder: Decoder, name: str, moments: Sequence[LayerStatistics]) -> list[LayerRanking]:
    """Scores that need no gradients look at moments only, which is what a run keeps of its statistics; ``moments`` in
    the decoder's own order."""
    found = []
    for index, layer in enumerate(moments):
        there = {kind: None if layer.of(kind) is None else layer.of(kind).to(decoder.device) for kind in KINDS}
        found.append(rank_layer(name, decoder, index, LayerStatistics(**there)))
    return found


def _biases(
    decoder: Decoder, ranking: Sequence[LayerRanking], moments: Sequence[LayerStatistics], policy: Policy
) -> dict[int, Tensor]:
    """FLAP's compensation by sub-layer: W·x̄ over the removed channels, [hidden], and the output's own bias where all
    are removed. ``decoder`` stands in the ranking's order, ``moments`` in that to which it refers."""
    biases, structure = {}, decoder.structure
    for index, kind in product(range(structure.layers), KINDS):  # layer by layer: they may stream
        part, sublayer = structure.of(kind)[index], index + KINDS.index(kind) * structure.layers
        if part.units:
            order, kept = expand_units(ranking[index].of(kind), part.columns), policy[kind][index] * part.columns
            mean = moments[index].of(kind).mean[order][kept:].to(decoder.device)
            removed = decoder.output(index, kind)[:, kept:].float() @ mean
            own = decoder.layers[index].get(f"{decoder.family.parts[kind].output_name}.bias")
            biases[sublayer] = (removed if kept or own is None else removed + own).to(decoder.dtype)
    return biases


@torch.no_grad()
def _log_perplexity(
    decoder: Decoder, grid: Grid, policy: Policy, sequences: Tensor, biases: dict[int, Tensor]
) -> float:
    levels = grid.encode([policy])[0].tolist()
    total = torch.zeros((), dtype=torch.float64, device=decoder.device)
    for tokens in sequences.to(decoder.device).split(max(1, _TOKENS // sequences.shape[1])):
        total += masked_losses(decoder, grid, levels, tokens, biases=biases).double().sum()
    count, length = sequences.shape
    return float(total) / (count * (length - 1))

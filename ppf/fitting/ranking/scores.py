"""Rankings: which unit goes first. One score per input channel of the output projection, summed over a unit's channels.

W is an output projection [hidden, n]; x its input, of which calibration knows the second moments. A ranking is
independent of any policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...families import KINDS
from ...model.decoder import Decoder
from ...model.layer import LayerRanking
from ...timings import timed
from ..calibration import LayerStatistics, Moments, Statistics
from .gradient import GRADIENT_RANKINGS, Scores
from .obs import removal_scores


@dataclass(frozen=True)
class Scored:
    """What a score may look at: the output projection, its input's statistics, and the rows that feed each channel."""

    output: Tensor  # [hidden, n]
    statistics: Statistics | Moments
    inputs: tuple[Tensor, ...]  # matrices [n, hidden] whose row j makes channel j
    unit: int = 1  # consecutive channels that stay or go together


def magnitude(s: Scored) -> Tensor:
    """‖W[:,j]‖₂, fp32 [n]."""
    return s.output.float().norm(dim=0)


def wanda_sp(s: Scored) -> Tensor:
    """mean_i |W_ij| · ‖x_j‖₂ (Wanda, arXiv 2306.11695, structured as in FLAP's Wanda-sp), fp32 [n]."""
    return s.output.float().abs().mean(0) * s.statistics.second_moment.sqrt()


def flap_wifv(s: Scored) -> Tensor:
    """Var(x_j) · ‖W[:,j]‖₂² (FLAP, arXiv 2312.11983, weighted input feature variance), fp32 [n]."""
    return s.statistics.variance * s.output.float().square().sum(0)


def maw(s: Scored) -> Tensor:
    """Σ over the feeding matrices of max + |min| of row j (maximum absolute weight), fp32 [n]."""
    return sum(w.float().amax(1) + w.float().amin(1).abs() for w in s.inputs)


def cfsp(s: Scored) -> Tensor:
    """mean_i [(|W_ij|‖x_j‖ / Σ_i |W_ij|‖x_j‖ + Σ over the feeding matrices |F_ji| / Σ_i |F_ji|) · ‖x_j‖], fp32 [n]
    (CFSP, arXiv 2409.13199, as in the authors' code). The quotients of a column add up to one, whatever the weights
    are: what is left is a multiple of ‖x_j‖."""
    return s.statistics.second_moment.sqrt() * (1 + len(s.inputs)) / len(s.output)


def obs(s: Scored) -> Tensor:
    """The round in which channel j's unit leaves, fp32 [n]: see :mod:`ppf.fitting.ranking.obs`. Needs the Gram."""
    return removal_scores(s.output, s.statistics.gram, s.unit)


AUTO = "auto"
"""The ranking that is not one, but the best of several for each sub-layer: see :mod:`ppf.fitting.ranking.auto`."""

RANKINGS: dict[str, Callable[[Scored], Tensor]] = {
    "magnitude": magnitude,
    "wanda-sp": wanda_sp,
    "flap-wifv": flap_wifv,
    "maw": maw,
    "cfsp": cfsp,
    "obs": obs,
}


def ranking_named(name: str) -> Callable[[Scored], Tensor]:
    """The score function called ``name``; raises ``InputError`` with the names there are."""
    if name not in RANKINGS:
        raise InputError(
            "ranking", name, "is not a ranking", f"Use one of {', '.join((AUTO, *RANKINGS, *GRADIENT_RANKINGS))}"
        )
    return RANKINGS[name]


def check_ranking(name: str) -> None:
    """Raise ``InputError``, with the names there are, unless ``name`` is a ranking."""
    if name not in (AUTO, *GRADIENT_RANKINGS):
        ranking_named(name)


@timed("ranking")
def rank_layer(
    name: str, decoder: Decoder, index: int, statistics: LayerStatistics, scores: Scores | None = None
) -> LayerRanking:
    """Units of layer ``index`` by falling importance, on the CPU; ties go to the lower index.

    ``scores`` are the layer's where ``name`` is a ranking by gradients.
    """
    return LayerRanking(**{kind: rank_sublayer(name, decoder, index, kind, statistics, scores) for kind in KINDS})


def rank_sublayer(
    name: str, decoder: Decoder, index: int, kind: str, statistics: LayerStatistics, scores: Scores | None = None
) -> Tensor:
    """The same of one kind of sub-layer, int64 [units]."""
    sublayer = decoder.structure.of(kind)[index]
    if sublayer.step >= sublayer.units:
        # Nothing to rank. Units that only go together must not move either: norms over all of them know their places.
        return torch.arange(sublayer.units)
    if scores is None:
        inputs = _inputs(decoder, index, kind)
        scored = Scored(decoder.output(index, kind), statistics.of(kind), inputs, sublayer.columns)
        found = ranking_named(name)(scored)
    else:
        found = scores[kind]
    return _order(found.view(sublayer.units, -1).sum(1))


def _inputs(decoder: Decoder, index: int, kind: str) -> tuple[Tensor, ...]:
    """Matrices [n, hidden] whose row j makes channel j of the output projection's input."""
    sublayer = decoder.structure.of(kind)[index]
    if kind == "ffn":
        view = decoder.ffn(index, sublayer.units)
        return view.gate, view.up
    # One row of v feeds the same channel of all g query heads of its group.
    values, d = decoder.attention(index, sublayer.units).v, decoder.structure.head_dim
    grouped = values.view(sublayer.units, 1, d, -1).expand(-1, sublayer.columns // d, -1, -1)
    return (grouped.reshape(sublayer.width, -1),)


def _order(scores: Tensor) -> Tensor:
    return torch.argsort(scores.cpu(), descending=True, stable=True)

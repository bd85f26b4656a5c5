"""What an allocation may look at: the dense model, its statistics, and a metered evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ...errors import InputError
from ...families import KINDS
from ...fitting.calibration import LayerStatistics
from ...fitting.evaluation import Evaluator
from ...fitting.run import Run
from ...model.decoder import Decoder
from ...model.grid import Grid
from ...model.layer import expand_units
from ...model.policy import Policy
from ...text import take_tokens, unpadded
from .activations import LayerActivations, observe

# Cosines and norms are means over tokens: this many give them to three digits.
_OBSERVED_TOKENS = 16_384


class Meter:
    """True evaluations: measures policies, counts what that costs, and refuses to go beyond ``limit``.

    ``spent`` is in evaluations of the whole text; a policy measured on a part of it costs that part's share.
    """

    def __init__(self, evaluator: Evaluator, limit: int):
        self.evaluator, self.limit, self.spent = evaluator, limit, 0.0

    @property
    def remaining(self) -> float:
        return self.limit - self.spent

    def cost(self, tokens: int | None = None) -> float:
        """What measuring one policy on about ``tokens`` tokens costs; 1 for the whole text (None)."""
        total, length = self.evaluator.sequences.shape
        return 1.0 if tokens is None else min(max(1, tokens // length), total) / total

    def measure(self, policies: Sequence[Policy], tokens: int | None = None) -> list[float]:
        """Log-perplexities in nats of ``policies``, on the whole search text or on about ``tokens`` tokens of it.

        Raises ``InputError`` if this would cost more than what remains.
        """
        cost = len(policies) * self.cost(tokens)
        if cost > self.remaining + 1e-9:
            raise InputError("evaluations", self.limit, "is too little for this method", "Give it more evaluations")
        self.spent += cost
        return self.evaluator.log_perplexities(policies, tokens)


@dataclass
class PeerStatistics:
    """All that a peer needs. Weights and moments stand in the run's ranking order, which every method shares.

    ``moments`` are those of the inputs of every layer's output projections; ``sequences`` int64 [N, T] is calibration
    text; ``meter`` measures on the search text. Methods draw everything random from ``seed``.
    """

    grid: Grid
    decoder: Decoder
    moments: list[LayerStatistics]
    sequences: Tensor
    meter: Meter
    seed: int = 0

    @classmethod
    def of_run(cls, run: Run, evaluator: Evaluator, evaluations: int, seed: int = 0) -> PeerStatistics:
        """The statistics of a run; ``evaluator`` is of the run's own session, whose weights are shared."""
        moments = [_ranked(run, index) for index in range(run.structure.layers)]
        sequences, scored = run.sequences("calibration"), run.scored("calibration")
        if scored is not None:  # peers look at whole texts
            sequences = unpadded(sequences, scored)
        return cls(run.grid, evaluator.decoder, moments, sequences, Meter(evaluator, evaluations), seed)

    def with_budget(self, evaluations: int, seed: int) -> PeerStatistics:
        """The same with a fresh meter; what has been observed of the dense model is shared."""
        fresh = PeerStatistics(
            self.grid, self.decoder, self.moments, self.sequences, Meter(self.meter.evaluator, evaluations), seed
        )
        fresh.__dict__["activations"] = self.activations
        return fresh

    @cached_property
    def activations(self) -> list[LayerActivations]:
        """The dense model's activations over a part of the calibration text."""
        return self.observed(self.grid.dense())

    def observed(self, policy: Policy) -> list[LayerActivations]:
        """The same of the model that is cut to ``policy``, nothing refitted; not cached."""
        return observe(self.decoder, take_tokens(self.sequences, _OBSERVED_TOKENS), policy)


def _ranked(run: Run, index: int) -> LayerStatistics:
    """One layer's moments with its channels in ranking order."""
    moments, found = run.moments(index), {}
    for kind in KINDS:
        order = expand_units(run.ranking[index].of(kind), run.structure.of(kind)[index].columns)
        found[kind] = None if moments.of(kind) is None else moments.of(kind).ordered(order)
    return LayerStatistics(**found)

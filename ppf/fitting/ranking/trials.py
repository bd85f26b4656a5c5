"""Trials: what the whole model pays when one sub-layer alone is pruned, in one order of its units or another.

A little text goes through the dense model layer by layer. At every layer copies of it part from the dense stream, one
for each set of units that stays; each passes that layer with one sub-layer cut to its set and refitted as the library
does it, and from there on the dense layers behind. At the end its damage is known: the Kullback-Leibler divergence from
the dense model, mean over the text's tokens in nats. Every layer is needed once, so that weights may stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import memory
from ...families import KINDS
from ...fast.losses import logit_block, logits
from ...fast.permute import gathered, unit_jobs
from ...model.decoder import Decoder
from ...model.layer import expand_units
from ...text import batches, predicting, take_tokens
from ..calibration import Statistics
from ..factors import factorise, solve

# Tokens of a trial. The same text for all of them: what is compared are differences.
_TOKENS = 2_048
# Share of a GPU's room for the copies that are under way; where that is not enough, they wait in host memory.
_SHARE = 0.2
# Share of a GPU's memory for the activations inside a layer, as in calibration.
_INNER_SHARE = 0.15


@dataclass(frozen=True)
class Kept:
    """The units int64 [width] of one sub-layer that stay, and its output projection [hidden, width·columns], refitted
    to them."""

    units: Tensor
    output: Tensor


def refitted(
    output: Tensor, statistics: Statistics, order: Tensor, columns: int, widths: Sequence[int]
) -> list[Kept]:  # fmt: skip
    """The first units of ``order`` int64 [units] at every one of ``widths``, with the library's solutions.

    ``output`` [hidden, n] and ``statistics`` are in checkpoint order, ``columns`` inputs a unit.
    """
    inputs = expand_units(order, columns)
    dense = output[:, inputs.to(output.device)]
    boundaries = [0, *sorted({width * columns for width in widths}), len(inputs)]
    found = dict(solve(dense, factorise(dense, statistics, inputs, boundaries), boundaries[1:-1]))
    return [Kept(order[:width], found[width * columns]) for width in widths]


class Trials:
    """Copies of a text on their way through ``decoder``, the dense model in checkpoint order.

    ``sequences`` are int64 [N, T]; about two thousand tokens of them are used, and of these only the ones ``scored``,
    bool [N, T], count if they are given. ``expected`` is how many copies there will be in all.
    """

    def __init__(self, decoder: Decoder, sequences: Tensor, scored: Tensor | None, expected: int):
        self.decoder = decoder
        if scored is None:  # of a long sequence its beginning says as much
            sequences = sequences[:, :_TOKENS]
        counted = torch.ones_like(sequences, dtype=torch.bool) if scored is None else scored
        tokens, counted = (take_tokens(held, _TOKENS).to(decoder.device) for held in (sequences, counted))
        self._counted = predicting(counted)
        self._dense = decoder.frame.begin(tokens)
        self._most = memory.tokens_at_once(decoder.device, _INNER_SHARE, decoder.token_bytes)
        self._copies: dict[tuple[int, str], Tensor] = {}
        room = _SHARE * memory.room(decoder.device)
        self._home = decoder.device if expected * self._dense.nbytes <= room else torch.device("cpu")

    @torch.no_grad()
    def advance(self, index: int, begun: Mapping[str, tuple[str, Sequence[Kept]]]) -> None:
        """Take everything through layer ``index``. ``begun`` are the trials that begin there: under a name of the
        caller's the kind of sub-layer, and what it keeps in each."""
        layer = self.decoder.layers[index]
        for key, copies in self._copies.items():
            self._copies[key] = self._through(index, layer, copies)
        for name, (kind, kept) in begun.items():
            states = [self._cut(index, layer, kind, one).to(self._home) for one in kept]
            self._copies[index, name] = torch.cat(states)
        self._dense = self._through(index, layer, self._dense)

    @torch.no_grad()
    def damages(self) -> dict[tuple[int, str], list[float]]:
        """What every trial costs in nats a token, by the layer and the name that it began with."""
        places = self._counted.flatten().nonzero()[:, 0]
        total = {key: torch.zeros(len(copies) // len(self._dense)) for key, copies in self._copies.items()}
        for part in places.split(logit_block(self.decoder.frame.head)):
            expected = self._scores(self._dense, part)
            for key, copies in self._copies.items():
                for at, copy in enumerate(copies.split(len(self._dense))):
                    lost = expected.exp() * (expected - self._scores(copy, part))
                    total[key][at] += lost.sum().cpu()
        return {key: (sums / len(places)).tolist() for key, sums in total.items()}

    def _through(self, index: int, layer: Mapping[str, Tensor], states: Tensor) -> Tensor:
        """What the dense layer makes of ``states`` [B, T, H]; kept where they are. Copies that began together stay so:
        shapes, and with them last bits, do not depend on how many processes share the trials."""
        widths = {kind: self.decoder.structure.of(kind)[index].units for kind in KINDS}
        parts = batches(states, self.decoder.device, self._most)
        found = [self._run(index, widths, layer, part.to(self.decoder.device)) for part in parts]
        return torch.cat([part.to(states.device) for part in found])

    def _cut(self, index: int, layer: Mapping[str, Tensor], kind: str, kept: Kept) -> Tensor:
        """What the layer makes of the dense stream with one sub-layer cut."""
        decoder = self.decoder
        pairs = list(unit_jobs(decoder.names(index), layer, kind, kept.units, with_output=False))
        moved = dict(zip([name for name, _ in pairs], gathered([job for _, job in pairs]), strict=True))
        tensors = dict(layer) | moved | {f"{decoder.family.parts[kind].output_name}.weight": kept.output}
        widths = {other: decoder.structure.of(other)[index].units for other in KINDS} | {kind: len(kept.units)}
        return self._run(index, widths, tensors, self._dense)

    def _run(self, index: int, widths: Mapping[str, int], tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return self.decoder.reference(index, widths, tensors, x, self.decoder.frame.context(*x.shape[:2])[index])

    def _scores(self, states: Tensor, places: Tensor) -> Tensor:
        """Log-probabilities fp32 [places, vocabulary] after the last layer's ``states`` [N, T, H]."""
        frame = self.decoder.frame
        x = states.flatten(0, 1)[places.to(states.device)].to(self.decoder.device)
        return logits(frame.norm(x), frame.head, frame.scale, frame.cap).float().log_softmax(-1)

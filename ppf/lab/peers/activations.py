"""What peers want to know about the activations of the dense model or of one cut to a policy: one pass over a little
text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...families import KINDS
from ...model.decoder import Decoder
from ...model.policy import Policy
from ...text import batches


@dataclass(frozen=True)
class LayerActivations:
    """One layer over all tokens of a text, fp64 on the CPU.

    ``cosine`` is the mean of cos(x_in, x_out) between the residual stream before and after the layer, ``angle`` the
    mean of arccos(cos)/π; ``inputs`` has for each kind of sub-layer that the layer has the second moments E[x_j²]
    [hidden] of what its first projections read.
    """

    cosine: float
    angle: float
    inputs: Mapping[str, Tensor]


class _Sums:
    """Running sums of one layer."""

    def __init__(self, kinds: tuple[str, ...], hidden: int, device: torch.device):
        self.inputs = {kind: torch.zeros(hidden, dtype=torch.float64, device=device) for kind in kinds}
        self.similarity = torch.zeros(2, dtype=torch.float64, device=device)
        self.tokens = 0

    def read(self, kind: str, x: Tensor) -> None:
        self.inputs[kind] += x.float().square().flatten(0, -2).sum(0).double()

    def passed(self, before: Tensor, after: Tensor) -> None:
        cosine = F.cosine_similarity(before.float(), after.float(), dim=-1).double().clamp(-1, 1)
        self.similarity += torch.stack((cosine.sum(), cosine.arccos().sum() / math.pi))
        self.tokens += cosine.numel()

    def finish(self) -> LayerActivations:
        cosine, angle = (self.similarity / self.tokens).tolist()
        return LayerActivations(cosine, angle, {kind: (x / self.tokens).cpu() for kind, x in self.inputs.items()})


@torch.no_grad()
def observe(decoder: Decoder, sequences: Tensor, policy: Policy) -> list[LayerActivations]:
    """Activations of every layer over int64 ``sequences`` [N, T], of the model whose sub-layers have the first units
    only, as many as ``policy`` says: its own where that is all."""
    hidden = [decoder.frame.begin(batch.to(decoder.device)) for batch in batches(sequences, decoder.device)]
    return [
        _advance(decoder, index, {kind: policy[kind][index] for kind in KINDS}, hidden)
        for index in range(decoder.structure.layers)
    ]


def _advance(decoder: Decoder, index: int, widths: Mapping[str, int], hidden: list[Tensor]) -> LayerActivations:
    """Activations of one layer over all batches of ``hidden`` [B, T, hidden], which then hold the layer's output."""
    # All first projections of a sub-layer read the same: one of them is watched.
    parts = {kind: part for kind, part in decoder.family.parts.items() if widths[kind]}
    watched = {f"{part.module}.{next(iter(part.rows))}": kind for kind, part in parts.items()}
    names, layer = decoder.names(index), decoder.layers[index]
    tensors = {name: tensor for kind in KINDS for name, tensor in names.prefix(layer, kind, widths[kind]).items()}
    sums = _Sums(tuple(parts), decoder.structure.hidden, decoder.device)
    for at, x in enumerate(hidden):
        told = decoder.frame.context(*x.shape[:2])[index]
        hidden[at] = decoder.reference(
            index, widths, tensors, x, told, lambda name, x: sums.read(watched[name], x), tuple(watched)
        )
        sums.passed(x, hidden[at])
    return sums.finish()

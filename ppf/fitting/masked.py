"""The masked model in differentiable operations: transformers' own layers on prefixes, the dense outputs cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..families import KINDS
from ..fast.losses import logits
from ..model.decoder import Decoder
from ..model.grid import Grid
from ..model.layer import Layer


def masked_losses(
    decoder: Decoder,
    grid: Grid,
    levels: Sequence[int],
    tokens: Tensor,
    layers: Sequence[Layer] | None = None,
    biases: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Negative log-likelihoods in nats, fp32 [B, T-1], of tokens [B, T] at ``levels`` [S].

    ``layers`` replaces the decoder's own, with a graph say; ``biases`` by sub-layer, [hidden] each, are added to the
    output projections' results. Raises ``InputError`` for biases of a family with norms behind these.
    """
    frame, biases = decoder.frame, biases or {}
    x, told = frame.begin(tokens), frame.context(*tokens.shape)
    for index, layer in enumerate(layers or decoder.layers):
        x = _layer(decoder, grid, levels, index, layer, x, told[index], biases)
    found = logits(frame.norm(x), frame.head, frame.scale, frame.cap)[:, :-1].float()
    return F.cross_entropy(found.transpose(1, 2), tokens[:, 1:], reduction="none")


def _layer(
    decoder: Decoder, grid: Grid, levels: Sequence[int], index: int, layer: Layer, x: Tensor, told: Mapping,
    biases: Mapping[int, Tensor],
) -> Tensor:  # fmt: skip
    """One layer; with biases, one sub-layer after the other, since an absent one may have a bias, too."""
    names, parts = decoder.names(index), decoder.family.parts
    at = {kind: index + place * grid.structure.layers for place, kind in enumerate(KINDS)}
    widths = {kind: levels[at[kind]] * grid.steps[at[kind]] for kind in KINDS}
    if not any(sublayer in biases for sublayer in at.values()):
        tensors = {n: t for kind in KINDS for n, t in names.prefix(layer, kind, widths[kind]).items()}
        return decoder.reference(index, widths, tensors, x, told)
    for kind in KINDS:
        bias, part = biases.get(at[kind]), parts[kind]
        if part.after:
            problem = "adds a mean to what a sub-layer gives, and this family has a norm behind it"
            raise InputError("methods", "flap as is", problem, "Leave it out for this model")
        if widths[kind]:
            tensors, only = names.prefix(layer, kind, widths[kind]), dict.fromkeys(KINDS, 0) | {kind: widths[kind]}
            x = decoder.reference(index, only, tensors, x, told, lambda *_, b=bias: b, (part.output_name,))
        elif bias is not None:
            x = x + bias * getattr(decoder.config, "residual_multiplier", 1.0)  # Granite scales what sub-layers give
    return x

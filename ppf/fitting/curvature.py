"""How much the loss minds what a sub-layer gives: the curvature along the sub-layer's own output.

Pruning changes what a sub-layer adds to the residual stream. To second order the Kullback-Leibler divergence from the
dense model is then ½ E(gᵀδ)² a token, δ the change and g the gradient of log p(y) with respect to the output, for y
drawn from the model itself: the Fisher information (Martens, arXiv 1412.1193, section 8). Changes at different tokens
are taken to be independent. For δ the whole output, gᵀδ is the derivative with respect to a gate on the sub-layer:
its square is what is summed here, over a few thousand tokens.

A sub-layer whose output is most of the stream, as the first FFN's is, is another matter: the norms behind it take no
notice of a gate on all there is, and of a change in direction all the more. So the share of the stream comes along.

The backward pass goes layer by layer as everything else does: only the layers' inputs are kept, and each layer is run
again when its turn comes, so that weights may stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..families import KINDS
from ..fast.losses import logits
from ..model.decoder import Decoder
from ..text import predicting, take_tokens
from ..timings import timed

_TOKENS = 4_096
_AT_ONCE = 1_024  # tokens of a layer's graph, unless a sequence has more
_BLOCK = 512  # of every sequence, tokens whose logits exist at once


class Curvatures(NamedTuple):
    """Of every sub-layer, fp64 [S] each, 0 where the model has none: ``gate``, ½ E(∂ log p / ∂ gate)² in nats a token;
    ``share``, E‖output‖² / E‖stream‖², of the stream that the output is added to."""

    gate: Tensor
    share: Tensor


@timed("finding curvatures")
def curvatures(decoder: Decoder, sequences: Tensor, seed: int, scored: Tensor | None = None) -> Curvatures:
    """Of a dense model, over a little text.

    ``decoder`` is the dense model in any unit order, ``sequences`` int64 [N, T] calibration text, of which only the
    tokens ``scored``, bool [N, T], count if they are given. The same seed draws the same tokens.
    """
    sequences = take_tokens(sequences, _TOKENS)
    counted = torch.ones_like(sequences, dtype=torch.bool) if scored is None else take_tokens(scored, _TOKENS)
    size = max(1, _AT_ONCE // sequences.shape[1])
    rows, counted = (x.to(decoder.device).split(size) for x in (sequences, predicting(counted)))
    layers, generator = decoder.structure.layers, torch.Generator().manual_seed(seed)
    inputs = _inputs(decoder, rows)
    gradients = [_of_head(decoder, *pair, generator) for pair in zip(inputs.pop(), counted, strict=True)]
    total = torch.zeros(3, len(KINDS), layers, dtype=torch.float64)
    for index in reversed(range(layers)):
        for at, x in enumerate(inputs.pop()):
            gradients[at], found = _of_layer(decoder, index, x, gradients[at])
            total[..., index] += found
    slope, output, stream = total.flatten(1)
    tiny = torch.finfo(torch.float64).tiny
    return Curvatures(slope / (2 * sum(int(part.sum()) for part in counted)), output / stream.clamp_min(tiny))


@torch.no_grad()
def _inputs(decoder: Decoder, rows: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """What every layer reads, [B, T, H] of each of the ``rows``, and last what the final norm does."""
    found = [[decoder.frame.begin(row) for row in rows]]
    for index, layer in enumerate(decoder.layers):
        widths = _widths(decoder, index)
        told = [decoder.frame.context(*x.shape[:2])[index] for x in found[-1]]
        pairs = zip(found[-1], told, strict=True)
        found.append([decoder.reference(index, widths, layer, x, about) for x, about in pairs])
    return found


def _widths(decoder: Decoder, index: int) -> dict[str, int]:
    return {kind: decoder.structure.of(kind)[index].units for kind in KINDS}


def _of_head(decoder: Decoder, hidden: Tensor, counted: Tensor, generator: Generator) -> Tensor:
    """Gradient [B, T, H] of Σ log p(y) over the positions ``counted`` [B, T], y drawn from the model."""
    frame, parts = decoder.frame, []
    place = torch.stack([torch.rand(hidden.shape[1], generator=generator) for _ in hidden]).to(hidden.device)
    for x, u, counts in zip(*(part.split(_BLOCK, 1) for part in (hidden, place, counted)), strict=True):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            score = logits(frame.norm(x), frame.head, frame.scale, frame.cap).float().log_softmax(-1)
            # By the inverse of the cumulative distribution: one number a token, the same on every device.
            drawn = (score.detach().exp().cumsum(-1) < u[..., None]).sum(-1).clamp_max(score.shape[-1] - 1)
            chosen = score.gather(-1, drawn[..., None])[..., 0]
            parts.append(torch.autograd.grad((chosen * counts).sum(), x)[0])
    return torch.cat(parts, 1)


def _of_layer(decoder: Decoder, index: int, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient [B, T, H] of what layer ``index`` reads, from that of what it gives; and of its sub-layers the sums
    over tokens of (∂/∂ gate)², of ‖output‖² and of ‖stream‖², fp64 [3, kinds]."""
    told, widths, given = decoder.frame.context(*x.shape[:2])[index], _widths(decoder, index), {}
    module = decoder.reference.module(index, widths)
    handles = []
    for kind, part in decoder.family.parts.items():
        if widths[kind]:
            last = module.get_submodule(part.after or part.output_name)
            handles.append(last.register_forward_hook(lambda _, __, y, k=kind: given.__setitem__(k, y)))
    try:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = decoder.reference(index, widths, decoder.layers[index], x, told)
            before, *slopes = torch.autograd.grad(y, [x, *given.values()], gradient)
    finally:
        for handle in handles:
            handle.remove()
    found, stream = torch.zeros(3, len(KINDS), dtype=torch.float64), x.detach().double()
    for (kind, output), slope in zip(given.items(), slopes, strict=True):
        output = output.detach().double()
        sums = (output * slope.double()).sum(-1).square().sum(), output.square().sum(), stream.square().sum()
        found[:, KINDS.index(kind)] = torch.stack(sums).cpu()
        stream = stream + output
    return before, found

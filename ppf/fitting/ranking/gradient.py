"""Rankings by gradients: how much the loss would change, to first order, if a unit's weights became zero.

These look at the whole model at once, through its loss on a little calibration text, and give every channel of o and
down the score of all weights that go with it: its column, the rows of q, gate and up that feed it, and its share of the
rows of k and v, which g query heads have in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...fast.plain import masked_losses
from ...model.grid import Grid
from ...model.weights import DecoderWeights, LayerWeights
from ...text import take_tokens

GRADIENT_RANKINGS = "taylor", "loraprune"
_MATRICES = "q", "k", "v", "o", "gate", "up", "down"
# LLM-Pruner takes the gradient over ten short samples.
_TAYLOR_TOKENS = 8_192
# LoRAPrune: rank, steps of fine-tuning, learning rate, weight of the past in the moving average, tokens a step.
_RANK, _STEPS, _RATE, _MEMORY, _STEP_TOKENS = 8, 20, 1e-3, 0.9, 2_048

Scores = tuple[Tensor, Tensor]
"""One layer's channel scores, fp32: of o's inputs [G·g·d] and of down's [C]."""


def gradient_scores(name: str, weights: DecoderWeights, sequences: Tensor, seed: int) -> list[Scores]:
    """Channel scores of every layer for the ranking ``name``; ``weights`` and channels in checkpoint order."""
    if name == "taylor":
        return taylor(weights, sequences)
    return loraprune(weights, sequences, seed)


def taylor(weights: DecoderWeights, sequences: Tensor) -> list[Scores]:
    """LLM-Pruner (arXiv 2305.11627), first order and element-wise: Σ |w·∂L/∂w| over the coupled weights."""
    leaves = _replaced(weights, [[m.detach().requires_grad_() for m in layer] for layer in _matrices(weights)])
    total: list[list[Tensor]] = [[torch.zeros_like(m, dtype=torch.float32) for m in ms] for ms in _matrices(leaves)]
    parts = _batches(take_tokens(sequences, _TAYLOR_TOKENS), weights)
    for tokens in parts:
        found = torch.autograd.grad(_loss(leaves, tokens) / len(parts), [m for ms in _matrices(leaves) for m in ms])
        for held, gradient in zip((m for ms in total for m in ms), found, strict=True):
            held += gradient.float()
    salience = (
        [(w.float() * g).abs() for w, g in zip(*pair, strict=True)]
        for pair in zip(_matrices(weights), total, strict=True)
    )
    return [_channels(weights, layer) for layer in salience]


def loraprune(weights: DecoderWeights, sequences: Tensor, seed: int) -> list[Scores]:
    """LoRAPrune (arXiv 2305.18403): Σ |ĝ·w| with ĝ = B′A + BA′ − B′A′ from a LoRA's weights and gradients (primed),
    in a moving average of memory 0.9 over 20 steps of fine-tuning. The pruning itself happens once, at the end."""
    adapters = _Adapters(weights, seed)
    optimiser = torch.optim.AdamW([t for pair in adapters.pairs() for t in pair], lr=_RATE)
    average: list[Scores] | None = None
    per_step = max(1, _STEP_TOKENS // sequences.shape[1])
    for step in range(_STEPS):
        at = torch.arange(step * per_step, (step + 1) * per_step) % len(sequences)
        optimiser.zero_grad()
        _loss(adapters.merged(), sequences[at].to(weights.device)).backward()
        now = [_channels(weights, layer) for layer in adapters.salience()]
        average = now if average is None else [_mixed(*pair) for pair in zip(average, now, strict=True)]
        optimiser.step()
    return average


class _Adapters:
    """A LoRA of rank 8 on every projection, B zero and A random."""

    def __init__(self, weights: DecoderWeights, seed: int):
        self.weights, generator = weights, torch.Generator().manual_seed(seed)
        self.layers = [[self._pair(m, generator) for m in layer] for layer in _matrices(weights)]

    @staticmethod
    def _pair(matrix: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows, columns = matrix.shape
        a = torch.randn(_RANK, columns, generator=generator) / columns**0.5
        b = torch.zeros(rows, _RANK)
        return b.to(matrix.device).requires_grad_(), a.to(matrix.device).requires_grad_()

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (pair for layer in self.layers for pair in layer)

    def merged(self) -> DecoderWeights:
        """The model with W + B·A in the place of every W."""
        both = zip(_matrices(self.weights), self.layers, strict=True)
        merged = [[w + (b @ a).to(w.dtype) for w, (b, a) in zip(ws, pairs, strict=True)] for ws, pairs in both]
        return _replaced(self.weights, merged)

    @torch.no_grad()
    def salience(self) -> Iterator[list[Tensor]]:
        """|ĝ·w| of every projection, layer by layer."""
        for matrices, pairs in zip(_matrices(self.weights), self.layers, strict=True):
            yield [
                ((b.grad @ a + b @ a.grad - b.grad @ a.grad) * w.float()).abs()
                for w, (b, a) in zip(matrices, pairs, strict=True)
            ]


def _channels(weights: DecoderWeights, salience: Sequence[Tensor]) -> Scores:
    """Channel scores of one layer from element-wise saliences of q, k, v, o, gate, up, down."""
    s = weights.structure
    q, k, v, o, gate, up, down = salience
    shared = (k.sum(1) + v.sum(1)).view(s.kv_groups, 1, s.head_dim) / s.heads_per_group
    attention = o.sum(0) + q.sum(1) + shared.expand(-1, s.heads_per_group, -1).flatten()
    return attention.float(), (down.sum(0) + gate.sum(1) + up.sum(1)).float()


def _mixed(past: Scores, now: Scores) -> Scores:
    attention, ffn = (_MEMORY * a + (1 - _MEMORY) * b for a, b in zip(past, now, strict=True))
    return attention, ffn


def _matrices(weights: DecoderWeights) -> list[list[Tensor]]:
    return [[getattr(layer, name) for name in _MATRICES] for layer in weights.layers]


def _replaced(weights: DecoderWeights, matrices: list[list[Tensor]]) -> DecoderWeights:
    def layer(old: LayerWeights, new: list[Tensor]) -> LayerWeights:
        return replace(old, **dict(zip(_MATRICES, new, strict=True)))

    return replace(weights, layers=tuple(layer(*pair) for pair in zip(weights.layers, matrices, strict=True)))


def _loss(weights: DecoderWeights, tokens: Tensor) -> Tensor:
    """Mean loss of the dense model, with a graph."""
    grid = Grid(weights.structure, 1)
    with torch.enable_grad():
        return masked_losses(weights, grid, list(grid.maximum), tokens).mean()


def _batches(sequences: Tensor, weights: DecoderWeights) -> Sequence[Tensor]:
    return sequences.to(weights.device).split(max(1, _STEP_TOKENS // sequences.shape[1]))

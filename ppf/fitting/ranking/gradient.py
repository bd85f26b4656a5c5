"""Rankings by gradients: how much the loss would change, to first order, if a unit's weights became zero.

These look at the whole model at once, through its loss on a little calibration text, and give every column of an output
projection the score of all weights that go with it: the column, the rows that feed it, and its share of the rows of
keys and values, which g query heads have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...families import KINDS
from ...model.decoder import Decoder
from ...model.grid import Grid
from ...model.layer import Layer
from ...text import take_tokens
from ..masked import masked_losses

GRADIENT_RANKINGS = "taylor", "loraprune"
# LLM-Pruner takes the gradient over ten short samples.
_TAYLOR_TOKENS = 8_192
# LoRAPrune: rank, steps of fine-tuning, learning rate, weight of the past in the moving average, tokens a step.
_RANK, _STEPS, _RATE, _MEMORY, _STEP_TOKENS = 8, 20, 1e-3, 0.9, 2_048

Scores = Mapping[str, Tensor]
"""One layer's scores by kind of sub-layer, fp32: of every input of its output projection."""


def gradient_scores(
    name: str, decoder: Decoder, sequences: Tensor, seed: int, scored: Tensor | None = None
) -> list[Scores]:
    """Scores of every layer for the ranking ``name``; ``decoder`` and channels in checkpoint order. The loss is that of
    int64 ``sequences`` [N, T], or of the tokens ``scored``, bool [N, T]."""
    if name == "taylor":
        return taylor(decoder, sequences, scored)
    return loraprune(decoder, sequences, seed, scored)


def taylor(decoder: Decoder, sequences: Tensor, scored: Tensor | None = None) -> list[Scores]:
    """LLM-Pruner (arXiv 2305.11627), first order and element-wise: Σ |w·∂L/∂w| over the coupled weights."""
    leaves = [_mapped(layer, names, lambda _, w: w.detach().requires_grad_()) for layer, names in _units(decoder)]
    total = [{n: torch.zeros_like(layer[n], dtype=torch.float32) for n in names} for layer, names in _units(decoder)]
    sequences, scored = (take_tokens(held, _TAYLOR_TOKENS) for held in (sequences, _counted(sequences, scored)))
    flat = [leaf[name] for leaf, names in zip(leaves, _names(decoder), strict=True) for name in names]
    whole = scored[:, 1:].sum()
    for tokens, counted in zip(_batches(sequences, decoder), _batches(scored, decoder), strict=True):
        share = counted[:, 1:].sum() / whole
        found = iter(torch.autograd.grad(_loss(decoder, leaves, tokens, counted) * share, flat))
        for sums in total:
            for name in sums:
                sums[name] += next(found).float()
    with torch.no_grad():
        return [
            _channels(decoder, index, {n: (layer[n].float() * g).abs() for n, g in total[index].items()})
            for index, layer in enumerate(decoder.layers)
        ]


def loraprune(decoder: Decoder, sequences: Tensor, seed: int, scored: Tensor | None = None) -> list[Scores]:
    """LoRAPrune (arXiv 2305.18403): Σ |ĝ·w| with ĝ = B′A + BA′ − B′A′ from a LoRA's weights and gradients (primed),
    in a moving average of memory 0.9 over 20 steps of fine-tuning. The pruning itself happens once, at the end."""
    adapters, scored = _Adapters(decoder, seed), _counted(sequences, scored)
    optimiser = torch.optim.AdamW([t for pair in adapters.pairs() for t in pair], lr=_RATE)
    average: list[Scores] | None = None
    per_step = max(1, _STEP_TOKENS // sequences.shape[1])
    for step in range(_STEPS):
        at = torch.arange(step * per_step, (step + 1) * per_step) % len(sequences)
        optimiser.zero_grad()
        tokens, counted = sequences[at].to(decoder.device), scored[at].to(decoder.device)
        _loss(decoder, adapters.merged(), tokens, counted).backward()
        now = [_channels(decoder, index, layer) for index, layer in enumerate(adapters.salience())]
        average = now if average is None else [_mixed(*pair) for pair in zip(average, now, strict=True)]
        optimiser.step()
    return average


class _Adapters:
    """A LoRA of rank 8 on every projection, B zero and A random."""

    def __init__(self, decoder: Decoder, seed: int):
        self.decoder, generator = decoder, torch.Generator().manual_seed(seed)
        self.layers = [
            {name: self._pair(layer[name], generator) for name in names if layer[name].dim() == 2}
            for layer, names in _units(decoder)
        ]

    @staticmethod
    def _pair(matrix: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows, columns = matrix.shape
        a = torch.randn(_RANK, columns, generator=generator) / columns**0.5
        b = torch.zeros(rows, _RANK)
        return b.to(matrix.device).requires_grad_(), a.to(matrix.device).requires_grad_()

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (pair for layer in self.layers for pair in layer.values())

    def merged(self) -> list[Layer]:
        """The layers with W + B·A in the place of every W."""
        return [
            dict(layer) | {n: layer[n] + (b @ a).to(layer[n].dtype) for n, (b, a) in pairs.items()}
            for layer, pairs in zip(self.decoder.layers, self.layers, strict=True)
        ]

    @torch.no_grad()
    def salience(self) -> Iterator[dict[str, Tensor]]:
        """|ĝ·w| of every projection, layer by layer."""
        for layer, pairs in zip(self.decoder.layers, self.layers, strict=True):
            yield {
                n: ((b.grad @ a + b @ a.grad - b.grad @ a.grad) * layer[n].float()).abs() for n, (b, a) in pairs.items()
            }


def _channels(decoder: Decoder, index: int, salience: Mapping[str, Tensor]) -> Scores:
    """Scores of one layer's columns from element-wise saliences of its tensors, by name."""
    names, structure, scores = decoder.names(index), decoder.structure, {}
    for kind in KINDS:
        sublayer = structure.of(kind)[index]
        total = torch.zeros(sublayer.width, device=decoder.device)
        for unit in names.unit_tensors(decoder.layers[index], kind):
            if unit.name not in salience:
                continue
            found = salience[unit.name]
            sums = found.sum(1 - unit.dim) if found.dim() == 2 else found
            sizes = [sublayer.units * block for _, block in unit.segments]
            for (_, block), rows in zip(unit.segments, sums.split(sizes), strict=True):
                # A row of a key or value serves the same channel of all query heads of its group.
                shared = sublayer.columns // block
                total += (rows.view(sublayer.units, 1, block) / shared).expand(-1, shared, -1).flatten()
        scores[kind] = total.float()
    return scores


def _mixed(past: Scores, now: Scores) -> Scores:
    return {kind: _MEMORY * past[kind] + (1 - _MEMORY) * now[kind] for kind in now}


def _names(decoder: Decoder) -> list[list[str]]:
    """The tensors of every layer that units have a part in."""
    return [
        [u.name for kind in KINDS for u in decoder.names(i).unit_tensors(layer, kind)]
        for i, layer in enumerate(decoder.layers)
    ]


def _units(decoder: Decoder) -> Iterator[tuple[Layer, list[str]]]:
    return zip(decoder.layers, _names(decoder), strict=True)


def _mapped(layer: Layer, names: Sequence[str], change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    return dict(layer) | {name: change(name, layer[name]) for name in names}


def _loss(decoder: Decoder, layers: Sequence[Layer], tokens: Tensor, scored: Tensor) -> Tensor:
    """Mean loss of the dense model over the tokens that are ``scored``, with a graph."""
    grid = Grid(decoder.structure, 1)
    with torch.enable_grad():
        return masked_losses(decoder, grid, list(grid.maximum), tokens, layers)[scored[:, 1:]].mean()


def _counted(sequences: Tensor, scored: Tensor | None) -> Tensor:
    """Which tokens count: all, if nothing is said."""
    return torch.ones_like(sequences, dtype=torch.bool) if scored is None else scored


def _batches(sequences: Tensor, decoder: Decoder) -> Sequence[Tensor]:
    return sequences.to(decoder.device).split(max(1, _STEP_TOKENS // sequences.shape[1]))

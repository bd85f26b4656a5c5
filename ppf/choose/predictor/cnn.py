"""``cnn``: the paper's kind of predictor (arXiv 2508.02381), convolutions over the policy's mask.

The mask is an image, layers down and units (in ranking order, a level each) across: 1 where a unit is kept. Two
convolutions over three neighbouring layers, with the units as channels, then two dense layers over all of them.
The paper gives no sizes and no code; these are ours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.grid import Grid
from .ensemble import Ensemble

_REACH = 3  # layers that a convolution sees


class CNN(Ensemble):
    """``members`` networks with ``channels`` channels and a dense layer of ``hidden`` units."""

    kind = "cnn"

    def __init__(self, grid: Grid, members: int = 8, channels: int = 48, hidden: int = 64):
        super().__init__(grid, members)
        self.units = tuple(max(1, max(half)) for half in _halves(grid))
        units = sum(self.units)
        sizes = (_REACH * units, channels), (_REACH * channels, channels), (grid.structure.layers * channels, hidden)
        sizes += ((hidden, 1),)
        self.weights = nn.ParameterList(torch.empty(members, a, b) for a, b in sizes)
        self.biases = nn.ParameterList(torch.zeros(members, 1, b) for _, b in sizes)
        self.register_buffer("center", torch.zeros(grid.structure.layers, units))

    def initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight, bias in zip(self.weights, self.biases, strict=True):
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1]))
                bias.zero_()

    def encode(self, probabilities: Tensor) -> Tensor:
        """(Relaxed) mask [P, L, units]: the probability that each layer keeps each level of attention and FFN."""
        at_least = probabilities.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        layers, (groups, channels) = self.grid.structure.layers, self.units
        return torch.cat((at_least[:, :layers, :groups], at_least[:, layers:, :channels]), dim=-1)

    def standardised(self, code: Tensor) -> Tensor:
        x = (code - self.center).expand(self.members, *code.shape[-3:])
        for weight, bias in zip(self.weights[:2], self.biases[:2], strict=True):
            x = F.silu(_convolve(x, weight, bias))
        first, last = zip(self.weights[2:], self.biases[2:], strict=True)
        hidden = F.silu(torch.baddbmm(first[1], x.flatten(2), first[0]))
        return torch.baddbmm(last[1], hidden, last[0]).squeeze(-1)


def _halves(grid: Grid) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Highest levels of all attention and of all FFN sub-layers."""
    layers = grid.structure.layers
    return grid.maximum[:layers], grid.maximum[layers:]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every member's convolution over layers: x [M, P, L, C] and weight [M, 3C, H] to [M, P, L, H], zeros outside."""
    members, policies, layers, _ = x.shape
    padded = F.pad(x, (0, 0, 1, 1))
    windows = torch.cat([padded[:, :, i : i + layers] for i in range(_REACH)], dim=-1)
    return torch.baddbmm(bias, windows.flatten(1, 2), weight).view(members, policies, layers, -1)

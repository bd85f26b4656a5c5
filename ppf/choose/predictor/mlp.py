"""``mlp``: an ensemble of small networks over a thermometer code of the levels.

Bit (s, l) says "sub-layer s keeps at least level l". Compared with one-hot levels, neighbouring levels share most bits,
so each measurement teaches about its neighbours; the within-ratio rank correlation at 400 evaluations rises from 0.79
to 0.95 (dev/LOG.md). Each network adds a linear part (every sub-layer's own damage) to a multi-layer perceptron (their
interactions).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.grid import Grid
from .ensemble import Ensemble


class MLP(Ensemble):
    """``members`` networks with two layers of ``hidden`` units."""

    kind = "mlp"

    def __init__(self, grid: Grid, members: int = 8, hidden: int = 128):
        super().__init__(grid, members)
        level = torch.arange(1, grid.levels)
        used = (level <= torch.tensor(grid.maximum)[:, None]).flatten().nonzero().squeeze(1)
        self.register_buffer("used", used, persistent=False)  # positions: a mask would wait for the GPU
        inputs = len(used)
        self.additive = nn.Parameter(torch.zeros(members, inputs, 1))
        sizes = (inputs, hidden, hidden, 1)
        self.weights = nn.ParameterList(torch.empty(members, a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.biases = nn.ParameterList(torch.zeros(members, 1, b) for b in sizes[1:])
        self.register_buffer("center", torch.zeros(inputs))

    def initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight, scale in zip(self.weights, (1.0, 1.0, 0.1), strict=True):
                draw = torch.randn(weight.shape, generator=generator) * scale / math.sqrt(weight.shape[1])
                weight.copy_(draw)
            for parameter in (self.additive, *self.biases):
                parameter.zero_()

    def encode(self, probabilities: Tensor) -> Tensor:
        """Thermometer code [P, bits] of (relaxed) level probabilities [P, S, K]: P(level ≥ l) for l = 1…maximum."""
        at_least = probabilities.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        return at_least.flatten(1).index_select(1, self.used)

    def standardised(self, code: Tensor) -> Tensor:
        x = (code - self.center).expand(self.members, *code.shape[-2:])
        hidden = x
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = F.silu(torch.baddbmm(bias, hidden, weight))
        return (torch.baddbmm(self.biases[-1], hidden, self.weights[-1]) + x @ self.additive).squeeze(-1)

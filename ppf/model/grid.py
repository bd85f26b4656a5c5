"""The grid of levels: which widths a policy may ask for, and how policies become tensors of levels.

Sub-layers are numbered attention 0…L-1, then FFN 0…L-1 (S = 2L). A level is a width on a sub-layer's grid: attention
in steps of one kv-group, FFN in steps of ``ffn_multiple`` channels, so width = level · step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InputError
from ..families import KINDS
from .policy import Policy
from .structure import Structure

# Portable policies are those that every reader accepts: attention whole in every layer, FFN widths in multiples of 256
# or none. Whole attention, because DeciLM has one number of query heads for the model. 256, because its readers round
# up to it and GGUF's K-quants need it.
PORTABLE_MULTIPLE = 256


@dataclass(frozen=True)
class Grid:
    """The widths allowed on ``structure``. Layer 0 keeps some attention, from which caches take the length of a text
    (docs/concepts.md); ``portable`` policies keep all attention, as every reader accepts it."""

    structure: Structure
    ffn_multiple: int = 64
    portable: bool = False

    def __post_init__(self) -> None:
        for layer, sublayer in enumerate(self.structure.ffn):
            channels = sublayer.units
            if self.ffn_multiple < 1 or channels % self.ffn_multiple:
                common = math.gcd(*(s.units for s in self.structure.ffn))
                fits = [m for m in range(256, 0, -1) if common % m == 0][:6]
                problem = f"does not divide the {channels} FFN channels of layer {layer}"
                raise InputError("ffn-multiple", self.ffn_multiple, problem, f"Use one of {fits}")

    @property
    def sublayers(self) -> int:
        """S = 2L."""
        return len(self.structure.sublayers)

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Units per level of every sub-layer, length S."""
        attention = tuple(sublayer.step for sublayer in self.structure.attention)
        return attention + (self.ffn_multiple,) * self.structure.layers

    @cached_property
    def maximum(self) -> tuple[int, ...]:
        """Highest level (= dense width) of every sub-layer, length S; 0 where the model itself has none."""
        return tuple(s.units // step for s, step in zip(self.structure.sublayers, self.steps, strict=True))

    @cached_property
    def minimum(self) -> tuple[int, ...]:
        """Lowest level of every sub-layer, length S: 1 for layer 0's attention, all of portable attention, else 0."""
        layers = self.structure.layers
        attention = self.maximum[:layers] if self.portable else (min(1, self.maximum[0]),) + (0,) * (layers - 1)
        return attention + (0,) * layers

    @cached_property
    def step_cost(self) -> tuple[int, ...]:
        """Parameters per level of every sub-layer, length S."""
        return tuple(s.cost * step for s, step in zip(self.structure.sublayers, self.steps, strict=True))

    @cached_property
    def top(self) -> tuple[int, ...]:
        """:attr:`maximum`, but 1 where there is nothing to prune: what levels are divided by."""
        return tuple(max(1, level) for level in self.maximum)

    @property
    def levels(self) -> int:
        """Number of levels of the finest sub-layer grid, level 0 included: the width of one-hot encodings."""
        return max(self.maximum) + 1

    @property
    def maximum_ratio(self) -> float:
        """The largest share of decoder parameters that can be removed."""
        kept = sum(low * cost for low, cost in zip(self.minimum, self.step_cost, strict=True))
        return 1 - kept / self.structure.decoder_parameters

    def kept(self, levels: Tensor) -> Tensor:
        """Kept decoder parameters, int64 [...], of policies given as int64 levels [..., S]."""
        cost = torch.tensor(self.step_cost, dtype=torch.int64, device=levels.device)
        return (levels.to(torch.int64) * cost).sum(-1)

    def ratio(self, policy: Policy) -> float:
        """Share of decoder parameters that ``policy`` removes."""
        return 1 - int(self.kept(self.encode([policy]))[0]) / self.structure.decoder_parameters

    def encode(self, policies: Sequence[Policy]) -> Tensor:
        """Levels, int64 [P, S]. Raises ``InputError`` for wrong lengths or widths off the grid."""
        for policy in policies:
            self.check(policy)
        widths = torch.tensor([_flat(p) for p in policies], dtype=torch.int64).reshape(-1, self.sublayers)
        return widths // torch.tensor(self.steps)

    def decode(self, levels: Tensor) -> list[Policy]:
        """Policies of int levels [P, S]; inverse of :meth:`encode`."""
        layers = self.structure.layers
        widths = (levels.cpu().to(torch.int64) * torch.tensor(self.steps)).tolist()
        return [Policy(w[:layers], w[layers:]) for w in widths]

    def dense(self) -> Policy:
        """The policy that keeps everything."""
        return self.decode(torch.tensor([self.maximum]))[0]

    def check(self, policy: Policy) -> None:
        """Raise ``InputError`` unless ``policy`` lies on this grid."""
        layers = self.structure.layers
        if unknown := sorted(set(policy) - set(KINDS)):
            raise InputError("policy", unknown, "are kinds of sub-layer that this model has not", f"Use {list(KINDS)}")
        for kind in KINDS:
            widths = policy[kind]
            if len(widths) != layers:
                raise InputError(
                    f"policy.{kind}", list(widths), f"has {len(widths)} widths", f"Give one per layer: {layers}"
                )
        for index, width in enumerate(_flat(policy)):
            step, low, high = self.steps[index], self.minimum[index], self.maximum[index]
            if width % step or not low * step <= width <= high * step:
                name = f"policy.{KINDS[index // layers]}[{index % layers}]"
                remedy = f"Use a multiple of {step} from {low * step} to {high * step}"
                raise InputError(name, width, "is off the grid", remedy)


def _flat(policy: Policy) -> tuple[int, ...]:
    return tuple(width for kind in KINDS for width in policy[kind])


def portable_multiple(structure: Structure) -> int:
    """The step of portable FFN widths: 256, or else the largest smaller number that divides the channels, which all
    readers but DeciLM's accept."""
    channels = math.gcd(*(sublayer.units for sublayer in structure.ffn))
    return next(m for m in range(PORTABLE_MULTIPLE, 0, -1) if channels % m == 0)


def unrestricted(grid: Grid) -> Grid:
    """``grid`` itself or, if it holds portable policies only, all policies beside them, FFN widths as fine as usual."""
    return Grid(grid.structure, math.gcd(grid.ffn_multiple, Grid.ffn_multiple)) if grid.portable else grid

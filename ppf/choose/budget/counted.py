"""Budgets that are counted: parameters, bytes, floating-point operations."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ... import checkpoint
from ...errors import InputError
from ...families import family_of
from ...model.geometry import structure_of
from ...model.grid import Grid
from ...model.structure import Structure
from .base import Budget, Fitted, LimitBudget
from .costs import Costs, parameters, token_flops, weight_bytes
from .projection import Projector, check_ratio, projector_of


class RatioBudget(Budget):
    """A share of the decoder's parameters is removed: within half of the grid's smallest step or, where small steps are
    too few to make up for a large one, the nearest the grid can give."""

    name, unit = "ratio", "share of the decoder's parameters"

    def __init__(self, grid: Grid, ratio: float):
        """Raises ``InputError`` for what is not a share, or more than the structure can give."""
        check_ratio(ratio, grid)
        super().__init__(grid, ratio, parameters(grid), (1 - ratio) * grid.structure.decoder_parameters)

    @classmethod
    def of(cls, run: Fitted, requested: float, context: int) -> RatioBudget:
        return cls(run.grid, requested)

    @cached_property
    def projector(self) -> Projector:
        return projector_of(self.grid, torch.device("cpu"))

    @property
    def requested_ratio(self) -> float:
        return self.requested

    @property
    def comes_to(self) -> float:
        return self.requested

    def moved(self, fractions: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.projector.nearest(
            fractions, torch.full((len(fractions),), self.requested, dtype=torch.float64), weight
        )

    def candidates(self, agent: Any) -> Tensor:
        """The one policy that the agent gives: a ratio is its own input."""
        return agent(torch.tensor([float(self.requested)], dtype=torch.float64))

    def in_unit(self, cost: float) -> float:
        return 1 - cost / self.grid.structure.decoder_parameters

    def delivered(self, model: PreTrainedModel) -> float:
        return self.in_unit(_structure(model).decoder_parameters)

    def is_met(self, value: float) -> bool:
        step = max(self.grid.step_cost) / self.grid.structure.decoder_parameters
        return abs(value - self.requested) <= step / 2 + 1e-9


class MemoryBudget(LimitBudget):
    """10⁹ bytes of all weights, embeddings included, in the checkpoint's dtype."""

    name, unit = "memory-gb", "GB of weights"

    def __init__(self, grid: Grid, gigabytes: float, costs: Costs, passengers: int = 0):
        """``passengers`` are the bytes of a multimodal model beside its text tower, which ``costs`` have too."""
        super().__init__(grid, gigabytes, costs, gigabytes * 1e9)
        self.passengers = passengers

    @classmethod
    def of(cls, run: Fitted, requested: float, context: int) -> MemoryBudget:
        return cls(run.grid, requested, weight_costs(run), _passengers(checkpoint.Checkpoint(run.model_path)))

    @property
    def comes_to(self) -> float:
        return 1 - self.kept

    def in_unit(self, cost: float) -> float:
        return cost / 1e9

    def delivered(self, model: PreTrainedModel) -> float:
        return self.in_unit(sum(p.nbytes for p in model.parameters()) + self.passengers)


class FlopsBudget(LimitBudget):
    """Floating-point operations of one token that attends to ``context`` others."""

    name, unit = "flops", "operations a token"

    def __init__(self, grid: Grid, flops: float, context: int, vocabulary: int):
        if context < 0:
            raise InputError("context", context, "is not a number of tokens", "Use 0 or more")
        self.context = context
        super().__init__(grid, flops, token_flops(grid, context, vocabulary), flops)

    @classmethod
    def of(cls, run: Fitted, requested: float, context: int) -> FlopsBudget:
        return cls(run.grid, requested, context, checkpoint.check_checkpoint(run.model_path).vocab_size)

    def delivered(self, model: PreTrainedModel) -> float:
        own = Grid(_structure(model), 1)
        return token_flops(own, self.context, model.config.vocab_size).range(own)[1]

    def circumstances(self, model: PreTrainedModel) -> dict[str, int]:
        return {"context": self.context}


def weight_costs(run: Fitted) -> Costs:
    """Bytes of all weights of the run's model by policy, in the checkpoint's dtype; reads its headers only. Of a
    multimodal model those beside the text tower count too."""
    opened = checkpoint.Checkpoint(run.model_path)
    total = sum(math.prod(tensor.shape) for tensor in opened.stored.values())
    costs = weight_bytes(run.grid, opened.resolve_dtype().itemsize, total - run.grid.structure.decoder_parameters)
    return replace(costs, constant=costs.constant + _passengers(opened))


def _passengers(opened: checkpoint.Checkpoint) -> int:
    return sum(tensor.bytes for tensor in opened.passengers.values())


def _structure(model: PreTrainedModel) -> Structure:
    return structure_of(family_of(model.config.model_type), model.config)

"""LoRA (arXiv 2106.09685) on weights instead of activations, so that cuts of a weight are cuts of its update too.

peft adds updates to what a layer computes: its layers cannot be cut to a width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...families import family_of
from .settings import RecoverySettings

_SCALE = 2.0  # alpha / rank, as for one size


class LowRank:
    """Updates W + 2 B A of all projections of ``model``, A fp32 [rank, inputs] drawn from the seed and B fp32
    [outputs, rank] zero; ``parameters`` by name."""

    def __init__(self, model: PreTrainedModel, settings: RecoverySettings):
        targets = tuple(f".{name}.weight" for name in family_of(model.config.model_type).projections())
        generator = torch.Generator().manual_seed(settings.seed)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, weight in model.named_parameters():
            if name.endswith(targets):
                outputs, inputs = weight.shape
                bound = 1 / math.sqrt(inputs)  # Kaiming's, as peft draws it
                a = (2 * torch.rand(settings.rank, inputs, generator=generator) - 1) * bound
                self.parameters[f"{name}.lora_A"] = nn.Parameter(a.to(weight.device))
                self.parameters[f"{name}.lora_B"] = nn.Parameter(torch.zeros(outputs, settings.rank).to(weight.device))

    def updated(self, prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``weights`` with their updates, in fp32 unless autocast says otherwise; ``prefix`` and a name in it make a
        parameter's name."""
        found = dict(weights)
        for name, weight in weights.items():
            if (a := self.parameters.get(f"{prefix}{name}.lora_A")) is not None:
                found[name] = weight + _SCALE * (self.parameters[f"{prefix}{name}.lora_B"] @ a)
        return found

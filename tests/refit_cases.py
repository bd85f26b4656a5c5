"""Libraries of tiny models, and stock models of any family that compute what a policy leaves of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppf.families import KINDS
from ppf.fast.permute import permuted
from ppf.fitting.calibration import calibrate
from ppf.fitting.factors import factorise_layer, tensors_of
from ppf.fitting.library import Library
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.layer import LayerRanking, expand_units
from ppf.model.policy import Policy


def library_of(decoder: Decoder, ranking: Sequence[LayerRanking], grid: Grid, sequences: Tensor) -> Library:
    """All refits of a model in checkpoint order, calibrated in its own dtype or, on 16 bits, in fp32."""
    ranked = permuted(decoder, ranking)
    layers = []
    for index, statistics in enumerate(calibrate(decoder.to(torch.float32), sequences)):
        outputs = ranked.names(index).outputs(ranked.layers[index])
        layers.append(tensors_of(factorise_layer(outputs, statistics, ranking[index], grid, index)))
    return Library(ranked, grid, layers)


@torch.no_grad()
def zeroed(model: PreTrainedModel, ranking: Sequence[LayerRanking], policy: Policy) -> PreTrainedModel:
    """``model`` with the columns of all pruned units set to zero in place; with all of them, the output's bias too."""
    decoder, parameters = Decoder.of_model(model), dict(model.named_parameters())
    for kind in KINDS:
        for index, (order, width) in enumerate(zip(ranking, policy[kind], strict=True)):
            name = f"model.layers.{index}.{decoder.family.parts[kind].output_name}"
            if not decoder.structure.of(kind)[index].units:
                continue
            lost = expand_units(order.of(kind)[width:], decoder.structure.of(kind)[index].columns)
            parameters[f"{name}.weight"][:, lost] = 0
            if not width and f"{name}.bias" in parameters:
                parameters[f"{name}.bias"].zero_()
    return model

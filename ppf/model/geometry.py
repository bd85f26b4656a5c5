"""From a configuration to a structure: widths from its fields, costs from the shapes of transformers' own layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..families import Family
from ..families.base import Part
from .classes import plain_parts, stock_classes
from .perlayer import decoder_layer
from .structure import Structure, SubLayer


def structure_of(family: Family, config: Any) -> Structure:
    """The structure of ``config``'s model, dense or with widths of its own in every layer."""
    head_dim = head_dim_of(config)
    shapes = _Shapes(family, config)
    sublayers: dict[str, list[SubLayer]] = {kind: [] for kind in family.parts}
    for index in range(config.num_hidden_layers):
        widths = family.widths(config.per_layer_config[index])
        for kind, (units, heads) in widths.items():
            columns = heads * head_dim if kind == "attention" else 1
            part = family.parts[kind]
            cost = shapes.cost(part, kind, columns, head_dim, bool(units), index)
            sublayers[kind].append(SubLayer(units, cost, columns, units if part.whole and units else 1))
    return Structure(config.hidden_size, head_dim, **{kind: tuple(found) for kind, found in sublayers.items()})


def head_dim_of(config: Any) -> int:
    """The size of a head."""
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def meta_layer(family: Family, config: Any, index: int) -> nn.Module:
    """Layer ``index`` of ``config``'s model without any memory for its weights, in eval mode."""
    with torch.device("meta"):
        return decoder_layer(stock_classes(family)["DecoderLayer"], config, plain_parts(family), index).eval()


class _Shapes:
    """What units cost, from the tensors of transformers' own layer; layers of the same kind of unit are made once."""

    def __init__(self, family: Family, config: Any):
        self.family, self.config = family, config
        self._known: dict[tuple[str, int], int] = {}

    def cost(self, part: Part, kind: str, columns: int, head_dim: int, present: bool, index: int) -> int:
        if not present:
            return 0
        key = kind, columns
        if key not in self._known:
            state = meta_layer(self.family, self.config, index).state_dict()
            blocks = {"key": head_dim, "value": head_dim}
            cost = state[f"{part.output_name}.weight"].shape[0] * columns
            for name, roles in part.rows.items():
                rows = sum(blocks.get(role, columns) for role in roles)
                stem = f"{part.module}.{name}"
                cost += rows * (state[f"{stem}.weight"].shape[1] + (f"{stem}.bias" in state))
            self._known[key] = cost
        return self._known[key]

"""Where a checkpoint's weights go: all onto the device, or layer by layer from host memory or from the files."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from .. import memory
from ..model.layer import Layer
from ..model.stream import Host, Placement, Staged, Stream

if TYPE_CHECKING:
    from .source import Checkpoint

# Beside resident weights there must be room for a layer in another order, for activations and for solutions.
_BESIDE_SHARE, _BESIDE_BYTES = 1.25, 3 << 30
_HOST_SHARE = 1.3


def chosen(opened: Checkpoint, device: torch.device, dtype: torch.dtype, placement: Placement) -> str:
    """ "gpu", "host" or "disk": what was asked for, else the first with room for the weights in ``dtype``.

    On a CPU "gpu" is its own memory: there the weights are memory-mapped in any case.
    """
    if placement.weights != "auto":
        return placement.weights
    if device.type != "cuda":
        return "gpu"
    needed = sum(prod(tensor.shape) for tensor in opened.stored.values()) * dtype.itemsize
    if _BESIDE_SHARE * needed + _BESIDE_BYTES <= memory.room(device):
        return "gpu"
    return "host" if _HOST_SHARE * needed <= memory.host_room() else "disk"


def fits(opened: Checkpoint, device: torch.device, dtype: torch.dtype, placement: Placement) -> bool:
    """Whether the weights go onto ``device`` itself. Bounds its memory; raises ``InputError`` for a bound beyond it."""
    memory.bound(device, placement.gpu_memory)
    return chosen(opened, device, dtype, placement) == "gpu"


def layers_of(
    opened: Checkpoint, device: torch.device, dtype: torch.dtype, placement: Placement | None
) -> Sequence[Layer]:
    """The layers of a checkpoint on ``device`` in ``dtype``: resident, or streamed as ``placement`` wants it.

    NaN and Inf are refused at the first time that a layer is read. Raises ``InputError`` for more memory than the GPU
    has.
    """
    placement, count = placement or Placement(), opened.config.num_hidden_layers
    memory.bound(device, placement.gpu_memory)
    place, pinned = chosen(opened, device, dtype, placement), device.type == "cuda"
    if place == "gpu":
        return tuple(opened.layer(index, device, dtype) for index in range(count))
    if place == "host":
        return Stream(Host((opened.layer(index, "cpu", dtype) for index in range(count)), pinned), device)
    return Stream(Staged(count, lambda index: opened.layer(index, "cpu", dtype), pinned), device)

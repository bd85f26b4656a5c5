"""Many tokens and listed weight rows on Hopper: the native tile kernel of csrc/tiles_cuda.cu, behind tensors.

Internal to the masked ops, which have checked their operands and use ``ppf.kernels`` where it does not apply. Outputs
are allocated here; everything runs on the caller's stream. ``wide`` is the number of weight rows of a tile (gate and up
count twice), 0 for the one that fills the multiprocessors best.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import _C
from .few_tokens import SIXTEEN_BIT, _address, _aligned, _stream


@lru_cache
def _native(device: int) -> bool:
    """True on Hopper, whose matrix units the kernel is written for, if this build has its machine code."""
    return hasattr(_C, "tile_product") and torch.cuda.get_device_capability(device) == (9, 0)


def apply(x: Tensor, depth: int, *weights: Tensor) -> bool:
    """Whether the kernel can contract ``depth`` columns of x with these weights."""
    sixteen_bit = x.is_cuda and x.dtype in SIXTEEN_BIT and depth % 8 == 0
    return sixteen_bit and _native(x.get_device()) and all(_aligned(w) for w in weights)


def gate_up(x: Tensor, gate: Tensor, up: Tensor, index: Tensor | None, width: int, wide: int = 0) -> Tensor:
    """silu(x·gateᵀ)·(x·upᵀ) of kept rows: x [t, H] -> [t, width]. ``index``: int32 [width], None for the prefix."""
    return _product(x, gate, up, width, index, None, False, wide)


def outputs(
    x: Tensor, weight: Tensor, index: Tensor | None, width: int, blocks: Tensor | None = None, wide: int = 0
) -> Tensor:
    """x [t, K] times kept rows of ``weight``: [t, width]. ``index``: int32 [width], None for the prefix.

    ``blocks``: int32 [K / 64], the blocks of 64 weight columns that the columns of x stand for; None for the prefix.
    """
    return _product(x, weight, None, width, index, blocks, False, wide)


def units(x: Tensor, weight: Tensor, index: Tensor | None, width: int, wide: int = 0) -> Tensor:
    """x [t, K] times kept rows of the transposed weight [units, width or more]: [t, width], a multiple of 8.

    ``index``: int32 [K] kept rows, None for the prefix.
    """
    return _product(x, weight, None, width, index, None, True, wide)


def _product(
    x: Tensor, weight: Tensor, pair: Tensor | None, width: int, index: Tensor | None, blocks: Tensor | None,
    over_units: bool, wide: int,
) -> Tensor:  # fmt: skip
    if not _aligned(x):
        x = x.clone(memory_format=torch.contiguous_format)
    tokens, depth = x.shape
    y = x.new_empty(tokens, width)
    fields = (
        x.data_ptr(), weight.data_ptr(), _address(pair), y.data_ptr(), _address(index), _address(blocks),
        2 * x.stride(0), 2 * weight.stride(0), 0 if pair is None else 2 * pair.stride(0), tokens, width, depth,
        over_units, x.dtype == torch.float16,
    )  # fmt: skip
    _C.tile_product(fields, x.get_device(), _stream(x), wide)
    return y

"""Many tokens and listed weight rows on Hopper: the native tile kernel of csrc/tiles_cuda.cu, behind tensors.

Internal to the masked ops, which have checked their operands and use ``ppf.kernels`` where it does not apply. Outputs
are allocated here; everything runs on the caller's stream. ``wide`` is the number of weight rows of a tile (gate and up
count twice), 0 for the one that fills the multiprocessors best.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ... import _C


@lru_cache
def _native(device: int) -> bool:
    """True on Hopper, whose matrix units the kernel is written for, if this build's machine code runs on it."""
    built = hasattr(_C, "tile_product") and torch.cuda.get_device_capability(device) == (9, 0)
    return built and _C.cuda_problem(device) is None


def _aligned(tensor: Tensor) -> bool:
    """Rows of 16-byte pieces: contiguous, 16-byte aligned in address and pitch."""
    return tensor.stride(1) == 1 and tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 8 == 0


def apply(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernel can contract x with these weights: 16-bit, on Hopper, in 16-byte pieces."""
    sixteen_bit = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[1] % 8 == 0
    return sixteen_bit and _native(x.get_device()) and all(_aligned(w) for w in weights)


def gate_up(x: Tensor, gate: Tensor, up: Tensor, index: Tensor | None, width: int, wide: int = 0) -> Tensor:
    """silu(x·gateᵀ)·(x·upᵀ) of kept rows: x [t, H] -> [t, width]. ``index``: int32 [width], None for the prefix."""
    return _product(x, gate, up, index, width, wide)


def outputs(x: Tensor, weight: Tensor, index: Tensor | None, width: int, wide: int = 0) -> Tensor:
    """x [t, K] times kept rows of ``weight``: [t, width]. ``index``: int32 [width], None for the prefix."""
    return _product(x, weight, None, index, width, wide)


def _product(x: Tensor, weight: Tensor, pair: Tensor | None, index: Tensor | None, width: int, wide: int) -> Tensor:
    if not _aligned(x):
        x = x.clone(memory_format=torch.contiguous_format)
    tokens, depth = x.shape
    y = x.new_empty(tokens, width)
    second = (0, 0) if pair is None else (pair.data_ptr(), 2 * pair.stride(0))
    fields = (
        x.data_ptr(), weight.data_ptr(), second[0], y.data_ptr(), 0 if index is None else index.data_ptr(),
        2 * x.stride(0), 2 * weight.stride(0), second[1], tokens, width, depth, x.dtype == torch.float16,
    )  # fmt: skip
    _C.tile_product(fields, x.get_device(), torch.cuda.current_stream(x.device).cuda_stream, wide)
    return y

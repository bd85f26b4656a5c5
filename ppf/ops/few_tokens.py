"""1 to 16 tokens on Hopper and later: the native bandwidth-bound kernels of csrc/gemv_cuda.cu, behind tensors.

Internal to the masked ops, which have checked their operands and use ``ppf.kernels.gemv`` where these do not apply.
Outputs are allocated here; everything runs on the caller's stream. ``dependent`` says that the previous launch on the
stream was one of this module's, whose end the kernel awaits by itself, having fetched its first weights meanwhile.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import _C

MAX_TOKENS = 16
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@lru_cache
def _native(device: int) -> bool:
    """True if this device can start dependent kernels and this build has machine code for it."""
    if not hasattr(_C, "gemv_rows") or torch.cuda.get_device_capability(device)[0] < 9:
        return False
    return _C.cuda_problem(device) is None


def _aligned(tensor: Tensor) -> bool:
    """Rows of 16-byte pieces: contiguous, 16-byte aligned in address and pitch."""
    return tensor.stride(1) == 1 and tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 8 == 0


def apply(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels can take these operands: :func:`rows` also needs a contraction of a multiple of 8."""
    sixteen_bit = x.is_cuda and x.dtype in SIXTEEN_BIT and x.shape[0] <= MAX_TOKENS
    return sixteen_bit and _native(x.get_device()) and all(_aligned(w) for w in weights)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def rows(
    x: Tensor, weights: tuple[Tensor, ...], index: Tensor | None, width: int, *, blocks: Tensor | None = None,
    mask: Tensor | None = None, spread: int = 0, dependent: bool = False,
) -> Tensor:  # fmt: skip
    """x [t, K] times kept rows of one weight; of two weights (gate, up): silu(gate)·up. Returns [t, width].

    ``index``: int32 [width] rows, None for the prefix. ``blocks``: int32 [K / 64], the blocks of 64 weight columns that
    the columns of x stand for. ``mask``: int16 [K], -1 where a column of x and of the weight counts, 0 where it does
    not, whatever it holds. ``spread``: return [t, spread] with output n in column index[n], the others undefined.
    """
    if not _aligned(x):
        x = x.clone(memory_format=torch.contiguous_format)
    tokens, depth = x.shape
    y = x.new_empty(tokens, spread or width)
    first, second = weights[0], weights[1] if len(weights) == 2 else None
    fields = (
        x.data_ptr(), first.data_ptr(), _address(second), y.data_ptr(), _address(index), _address(mask),
        _address(blocks), 2 * x.stride(0), 2 * first.stride(0), 0 if second is None else 2 * second.stride(0),
        y.shape[1], tokens, width, depth, spread > 0, x.dtype == torch.float16,
    )  # fmt: skip
    _C.gemv_rows(fields, x.get_device(), _stream(x), dependent)
    return y


def spread(x: Tensor, index: Tensor, total: int) -> Tensor:
    """x [t, K] put back in place: [t, total] with x at the columns ``index`` (int32 [K]), the others undefined."""
    y = x.new_empty(x.shape[0], total)
    x = x if x.stride(1) == 1 else x.contiguous()
    fields = (x.data_ptr(), y.data_ptr(), index.data_ptr(), x.stride(0), total, *x.shape)
    _C.gemv_scatter(fields, x.get_device(), _stream(x))
    return y


def columns(x: Tensor, weight: Tensor, index: Tensor | None, *, dependent: bool = False) -> Tensor:
    """x [t, K] times kept rows of the transposed weight [units, columns]: [t, columns], a multiple of 8.

    ``index``: int32 [K] rows, None for the prefix. The kept rows are shared out over the multiprocessors and the
    partial sums added in a fixed order: the same input, the same bits.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (tokens, depth), width, device = x.shape, weight.shape[1], x.get_device()
    splits = _C.gemv_splits(tokens, depth, width, device)
    y = x.new_empty(tokens, width)
    partial = x.new_empty(splits, tokens, width, dtype=torch.float32) if splits > 1 else None
    fields = (
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), _address(partial), _address(index),
        x.stride(0), 2 * weight.stride(0), tokens, depth, width, splits, x.dtype == torch.float16,
    )  # fmt: skip
    _C.gemv_columns(fields, device, _stream(x), dependent)
    return y

"""Which implementation a masked op takes on a GPU, by token count and kind of selection.

The thresholds are measurements on an H200 and an H100 (benchmarks/results/masked_gemm_*.json, dispatch_h100.json), not
theory.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import many_tokens
from .selection import BLOCKS, INDICES, PREFIX, UNIQUE

# Above this many tokens, copying the kept weights and calling cuBLAS beats the Triton tile kernels.
COMPACT_TOKENS = {BLOCKS: 8192, INDICES: 1536, UNIQUE: 1536}
# The same where the contraction runs over listed rows of a transposed weight.
COMPACT_TOKENS_TRANSPOSED = 256
# Where Hopper's native kernel for lists of rows wins on an H100: gate and up from 256 tokens (at 64 Triton takes 41 us,
# it 54) until the copy has paid for itself at 4,096 (Llama-2-7B, half: 587 against 632; three quarters: 918 against
# 941; Llama-3-8B: 769 against 819, 1,226 against 1,236); one product alone from 256 (31 against Triton's 40) to 1,024
# (92 against the copy's 95; three quarters 146 against 140; at 2,048 192 against 155).
NATIVE_PAIR = range(256, 4097)
NATIVE_OUTPUTS = range(256, 1025)
FEW_TILES = 100
SMALL_TOKENS = 16


@lru_cache(maxsize=1)
def triton_available() -> bool:
    """Triton is an optional dependency; without it CUDA tensors take the reference path."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def kernels_apply(x: Tensor, *weights: Tensor) -> bool:
    """The kernels are built for 16-bit types and unit last strides; the reference path takes everything else."""
    sixteen_bit = x.dtype in (torch.bfloat16, torch.float16)
    return sixteen_bit and triton_available() and all(w.stride(-1) == 1 for w in weights)


def copy_engine(*tensors: Tensor) -> bool:
    """True if the device has Hopper's copy engine and it can address these tensors."""
    from ppf.kernels.tile import describable

    return torch.cuda.get_device_capability(tensors[0].device)[0] >= 9 and describable(*tensors)


def take(tensor: Tensor, dim: int, width: int, rows: Tensor | None) -> Tensor:
    """The kept part of ``tensor`` along ``dim``: a view for a prefix, else a copy."""
    return tensor.narrow(dim, 0, width) if rows is None else tensor.index_select(dim, rows)


def compact(tensor: Tensor, dim: int, width: int, rows: Tensor | None) -> Tensor:
    """:func:`take` by the channel-gather kernels, on a GPU."""
    if rows is None or tensor.dtype not in (torch.bfloat16, torch.float16) or tensor.stride(-1) != 1:
        return take(tensor, dim, width, rows)
    from . import gather  # noqa: F401  (defines the op)

    return torch.ops.ppf.gather_rows(tensor, rows) if dim == 0 else torch.ops.ppf.gather_columns(tensor, rows, 1)


def linear_path(
    x: Tensor, weight: Tensor, out_kind: int, out_width: int, in_kind: int, in_width: int, transposed: bool
) -> str:
    """How ``masked_linear`` goes: rows, columns, native, input blocks, output blocks, tiles, transposed or library."""
    tokens = x.shape[0]
    if not kernels_apply(x, weight) or 0 in (tokens, out_width, in_width):
        return "library"
    if tokens <= SMALL_TOKENS and not transposed:
        return "rows"
    if tokens <= SMALL_TOKENS and out_kind == PREFIX:
        return "columns"
    listed = out_kind in (INDICES, UNIQUE) and in_kind == PREFIX and not transposed
    if listed and tokens in NATIVE_OUTPUTS and many_tokens.apply(x, weight):
        return "native"
    if out_kind == PREFIX and in_kind == PREFIX or tokens > COMPACT_TOKENS[max(out_kind, in_kind)]:
        return "library"
    if in_kind == BLOCKS and out_kind == PREFIX and copy_engine(x, weight):
        return "input blocks"
    if transposed:
        return "transposed" if out_kind == PREFIX and tokens <= COMPACT_TOKENS_TRANSPOSED else "library"
    if out_kind == BLOCKS and in_kind == PREFIX and copy_engine(x, weight):
        # Few tiles leave multiprocessors idle; then the copy is small, too.
        tiles = -(-tokens // 128) * (out_width // 128)
        return "output blocks" if tiles >= FEW_TILES else "library"
    return "library" if in_kind in (INDICES, UNIQUE) else "tiles"


def hidden_path(x: Tensor, gate: Tensor, up: Tensor, kind: int, width: int) -> str:
    """Name of the implementation of gate, up and silu·mul: reference, rows, native, tiles, blocks or library."""
    tokens = x.shape[0]
    if not kernels_apply(x, gate, up) or 0 in (tokens, width, x.shape[1]):
        return "reference"
    if tokens <= SMALL_TOKENS:
        return "rows"
    if kind == PREFIX:
        return "library"
    if kind != BLOCKS and tokens in NATIVE_PAIR and many_tokens.apply(x, gate, up):
        return "native"
    if tokens > COMPACT_TOKENS[kind]:
        return "library"
    return "blocks" if kind == BLOCKS and copy_engine(x, gate, up) else "tiles"

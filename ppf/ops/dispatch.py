"""Which implementation a masked op takes on a GPU, by token count and kind of selection.

The thresholds are measurements on an H200 (benchmarks/results/masked_gemm_*.json), not theory.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import few_tokens, many_tokens
from .selection import BLOCKS, INDICES, PREFIX, UNIQUE, Selection

# Above this many tokens, copying the kept weights and calling cuBLAS beats the tile kernels.
COMPACT_TOKENS = {BLOCKS: 8192, INDICES: 1536, UNIQUE: 1536}
# The same where the contraction runs over listed rows of a transposed weight.
COMPACT_TOKENS_TRANSPOSED = 256
# Forms that take the native kernels of csrc/ where these apply. "hidden": gate and up under a list, 256 tokens up to
# where copying wins; "few": 1 to 16 tokens; "linear": one product under a list. None of them has raced the Triton
# kernels on one card yet: they stay off until benchmarks/bench_dispatch.py says that they win. ("hidden" promises most:
# 7B, half of the channels, 512 tokens took 77 us on an H100, the Triton kernel about 90 us on an H200.)
NATIVE: frozenset[str] = frozenset()
NATIVE_TOKENS = 256
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


def few_tokens_apply(x: Tensor, *weights: Tensor) -> bool:
    """True if these operands take the native kernels for 1 to 16 tokens."""
    return "few" in NATIVE and few_tokens.apply(x, *weights)


def few_tokens_mask(x: Tensor, selection: Selection, transposed: bool) -> Tensor | None:
    """What the native kernels read to skip single input columns of a weight as ``nn.Linear`` holds it."""
    wanted = "few" in NATIVE and x.is_cuda and x.shape[0] <= SMALL_TOKENS and not transposed
    return selection.mask(x.device) if wanted else None


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
    """Name of ``masked_linear``'s way: rows, columns, input blocks, output blocks, tiles, transposed, library."""
    tokens = x.shape[0]
    if not kernels_apply(x, weight) or 0 in (tokens, out_width, in_width):
        return "library"
    if tokens <= SMALL_TOKENS and not transposed:
        return "rows"
    if tokens <= SMALL_TOKENS and out_kind == PREFIX:
        return "columns"
    native = _native_linear(x, weight, out_kind, in_kind, transposed)
    if native:
        return native
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


def _native_linear(x: Tensor, weight: Tensor, out_kind: int, in_kind: int, transposed: bool) -> str | None:
    """Which form of Hopper's tile kernel the product takes, "native" or "native units"; None for the other ways."""
    if "linear" not in NATIVE or out_kind == in_kind == PREFIX or x.shape[0] > COMPACT_TOKENS[BLOCKS]:
        return None
    if not many_tokens.apply(x, x.shape[1], weight):
        return None
    if transposed:
        return "native units" if out_kind == PREFIX and weight.shape[1] % 8 == 0 else None
    return "native" if in_kind in (PREFIX, BLOCKS) else None


def hidden_path(x: Tensor, gate: Tensor, up: Tensor, kind: int, width: int) -> str:
    """Name of the implementation of gate, up and silu·mul: rows, tiles, blocks or library."""
    tokens = x.shape[0]
    if not kernels_apply(x, gate, up) or 0 in (tokens, width, x.shape[1]):
        return "reference"
    if tokens <= SMALL_TOKENS:
        return "rows"
    if kind == PREFIX:
        return "library"
    if tokens > COMPACT_TOKENS[kind]:
        return "library"
    listed = "hidden" in NATIVE and kind != BLOCKS and tokens >= NATIVE_TOKENS
    if listed and many_tokens.apply(x, x.shape[1], gate, up):
        return "native"
    return "blocks" if kind == BLOCKS and copy_engine(x, gate, up) else "tiles"

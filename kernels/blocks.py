"""Selections of 64-blocks, many tokens: Hopper's copy engine fetches them in place.

It cannot gather rows, but takes a tile of 64 consecutive rows or columns anywhere, and that is a block. Kept output
blocks are the tall operand of the products, two at a time against BM tokens: gate and up of one block
(``gate_up_blocks``), or two blocks of one weight (``linear_blocks``). Kept input blocks are steps of the contraction
(``input_blocks``). Operands must be ``tile.describable``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import descriptor, multiprocessors, precision, silu_mul, swizzle, three_fit


@triton.jit
def _two_blocks(
    x_tiles, a_tiles, b_tiles, first_token, row_a, row_b, depth,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM tokens times 64 rows of a and 64 rows of b: two fp32 [64, BM]."""
    acc_a = tl.zeros([64, BM], tl.float32)
    acc_b = tl.zeros([64, BM], tl.float32)
    for start in range(0, depth, BK):
        x = x_tiles.load([first_token, start]).T
        acc_a = tl.dot(a_tiles.load([row_a, start]), x, acc_a, input_precision=PRECISION)
        acc_b = tl.dot(b_tiles.load([row_b, start]), x, acc_b, input_precision=PRECISION)
    return acc_a, acc_b


@triton.jit
def _store(y, acc, tile_m, block, tokens, stride_y, BM: tl.constexpr):
    """The transpose of acc [64, BM] to output columns [64·block, 64·block+64)."""
    m = tile_m * BM + tl.arange(0, BM)
    n = block * 64 + tl.arange(0, 64)
    at = y + m[:, None].to(tl.int64) * stride_y + n[None, :]
    tl.store(at, acc.to(y.dtype.element_ty).T, mask=(m < tokens)[:, None])


@triton.jit
def gate_up_kernel(
    x_tiles, gate_tiles, up_tiles, blocks, h, tokens, count, depth, stride_h,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, block = swizzle(tl.program_id(0), tl.cdiv(tokens, BM), count, GROUP)
    row = tl.load(blocks + block) * 64
    gate, up = _two_blocks(x_tiles, gate_tiles, up_tiles, tile_m * BM, row, row, depth, PRECISION, BM, BK)
    _store(h, silu_mul(gate, up), tile_m, block, tokens, stride_h, BM)


@triton.jit
def linear_kernel(
    x_tiles, w_tiles, blocks, y, tokens, count, depth, stride_y,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, pair = swizzle(tl.program_id(0), tl.cdiv(tokens, BM), tl.cdiv(count, 2), GROUP)
    second = tl.minimum(pair * 2 + 1, count - 1)  # an odd last block is computed twice and stored twice, the same
    row_a = tl.load(blocks + pair * 2) * 64
    row_b = tl.load(blocks + second) * 64
    a, b = _two_blocks(x_tiles, w_tiles, w_tiles, tile_m * BM, row_a, row_b, depth, PRECISION, BM, BK)
    _store(y, a, tile_m, pair * 2, tokens, stride_y, BM)
    _store(y, b, tile_m, second, tokens, stride_y, BM)


@triton.jit
def inputs_kernel(
    x_tiles, w_tiles, blocks, y, tokens, width, depth, stride_y, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x [tokens, depth] times kept column blocks of w [width, ·], or (TRANSPOSED) kept row blocks of w [·, width]."""
    tile_m, tile_n = swizzle(tl.program_id(0), tl.cdiv(tokens, BM), tl.cdiv(width, BN), GROUP)
    acc = tl.zeros([BM, BN], tl.float32)
    # Block numbers are read one step ahead, or every step would wait for them.
    following = tl.load(blocks)
    for start in range(0, depth, 64):
        unit = following * 64
        following = tl.load(blocks + tl.minimum(start + 64, depth - 64) // 64)
        a = x_tiles.load([tile_m * BM, start])
        b = w_tiles.load([unit, tile_n * BN]) if TRANSPOSED else w_tiles.load([tile_n * BN, unit]).T
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    inside = (m < tokens)[:, None] & (n < width)[None, :]
    tl.store(y + m[:, None].to(tl.int64) * stride_y + n[None, :], acc.to(y.dtype.element_ty), mask=inside)


def outputs_config(tiles: int, device: torch.device) -> dict[str, int]:
    """Tile of the kernels of kept output blocks, by their number of [128, 128] tiles."""
    c = {"BM": 128, "BK": 64, "GROUP": 8, "num_warps": 4}
    if tiles <= multiprocessors(device):
        return c | {"num_stages": 5}
    return c | ({"num_stages": 2, "maxnreg": 168} if three_fit(tiles, device) else {"num_stages": 3})


def gate_up_blocks(x: Tensor, gate: Tensor, up: Tensor, blocks: Tensor, config: dict[str, int] | None = None) -> Tensor:
    """silu(x·gateᵀ)·(x·upᵀ) of kept blocks (int32 [count]): x [t, H] -> [t, 64·count]."""
    tokens, depth = x.shape
    count = blocks.numel()
    h = x.new_empty(tokens, count * 64)
    c = dict(config or outputs_config(triton.cdiv(tokens, 128) * count, x.device))
    gate_up_kernel[triton.cdiv(tokens, c["BM"]) * count,](
        descriptor(x, [c["BM"], c["BK"]]), descriptor(gate, [64, c["BK"]]), descriptor(up, [64, c["BK"]]), blocks, h,
        tokens, count, depth, h.stride(0), PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return h


def linear_blocks(x: Tensor, weight: Tensor, blocks: Tensor, config: dict[str, int] | None = None) -> Tensor:
    """x [t, K] times kept row blocks (int32 [count]) of ``weight``: [t, 64·count]."""
    tokens, depth = x.shape
    count = blocks.numel()
    y = x.new_empty(tokens, count * 64)
    pairs = triton.cdiv(count, 2)
    c = dict(config or outputs_config(triton.cdiv(tokens, 128) * pairs, x.device))
    linear_kernel[triton.cdiv(tokens, c["BM"]) * pairs,](
        descriptor(x, [c["BM"], c["BK"]]), descriptor(weight, [64, c["BK"]]), blocks, y, tokens, count, depth,
        y.stride(0), PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return y


def inputs_config(tokens: int, width: int, device: torch.device) -> dict[str, int]:
    """Tile of the kernel of kept input blocks: the one whose last wave of programs is fullest."""
    small, large = (triton.cdiv(tokens, m) * triton.cdiv(width, 128) for m in (128, 256))
    one, two = multiprocessors(device), 2 * multiprocessors(device)
    if small <= one:
        return {"BM": 128, "BN": 128, "GROUP": 8, "num_warps": 8, "num_stages": 5}
    if large / (triton.cdiv(large, one) * one) >= small / (triton.cdiv(small, two) * two) - 0.02:
        return {"BM": 256, "BN": 128, "GROUP": 8, "num_warps": 8, "num_stages": 4}
    return {"BM": 128, "BN": 128, "GROUP": 16, "num_warps": 4, "num_stages": 3}


def input_blocks(
    x: Tensor, weight: Tensor, blocks: Tensor, transposed: bool = False, config: dict[str, int] | None = None
) -> Tensor:
    """x [t, 64·count] times kept column blocks of ``weight``, or row blocks of its transpose: [t, outputs].

    ``blocks``: int32 [count].
    """
    tokens, depth = x.shape
    width = weight.shape[1 if transposed else 0]
    c = dict(config or inputs_config(tokens, width, x.device))
    y = x.new_empty(tokens, width)
    inputs_kernel[triton.cdiv(tokens, c["BM"]) * triton.cdiv(width, c["BN"]),](
        descriptor(x, [c["BM"], 64]), descriptor(weight, [64, c["BN"]] if transposed else [c["BN"], 64]), blocks, y,
        tokens, width, depth, y.stride(0), TRANSPOSED=transposed, PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return y

"""Masked products for 1 to 16 tokens, where the weights' bytes are the whole cost.

Two shapes of traffic. ``rows``: an output needs one weight row (gate, up, q, k, v, and down or o as stored): every
program owns BN rows and walks the contraction; all programs are resident at once, so no split is needed. ``columns``:
the weight is held transposed and a kept unit is one contiguous row of the contraction: the programs split the kept
rows, and a second kernel adds their partial sums in a fixed order (no float atomics: the same input, the same bits).

One token is a plain multiply and sum; 2 to 16 tokens are padded to 16 and go through the matrix units, with the
weight tile as the tall operand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import multiprocessors, precision, row_major, silu_mul

PREFIX, BLOCKS, INDICES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MAX_TOKENS = 16


@triton.jit
def _weight_columns(in_entries, k, depth, IN_KIND: tl.constexpr, EVEN: tl.constexpr):
    """Weight columns of the contraction positions ``k`` [BK]."""
    if IN_KIND == 1:
        block = tl.load(in_entries + k // 64, mask=k < depth, other=0)
        return tl.max_contiguous(tl.multiple_of(block * 64 + k % 64, 64), 64)
    if IN_KIND == 2:
        return tl.load(in_entries + k, mask=k < depth, other=0)
    return k


@triton.jit
def _contract_rows(
    x, w0, w1, rows, in_entries, tokens, depth, stride_x, stride_w0, stride_w1,
    PAIR: tl.constexpr, IN_KIND: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products of weight rows ``rows`` [BN] with the tokens: two fp32 [BN, T] (the second only if PAIR)."""
    row0 = w0 + rows[:, None].to(tl.int64) * stride_w0
    row1 = w1 + rows[:, None].to(tl.int64) * stride_w1
    token = tl.arange(0, T)
    acc0 = tl.zeros([BN, BK], tl.float32) if T == 1 else tl.zeros([BN, T], tl.float32)
    acc1 = acc0
    for start in tl.range(0, depth, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        column = _weight_columns(in_entries, k, depth, IN_KIND, EVEN)
        inside = k < depth
        if EVEN:
            tile0 = tl.load(row0 + column[None, :])
        else:
            tile0 = tl.load(row0 + column[None, :], mask=inside[None, :], other=0.0)
        if PAIR:
            if EVEN:
                tile1 = tl.load(row1 + column[None, :])
            else:
                tile1 = tl.load(row1 + column[None, :], mask=inside[None, :], other=0.0)
        if T == 1:
            one = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)[None, :]
            acc0 += tile0.to(tl.float32) * one
            if PAIR:
                acc1 += tile1.to(tl.float32) * one
        else:
            many = tl.load(
                x + token[None, :] * stride_x + k[:, None], mask=(token < tokens)[None, :] & inside[:, None], other=0.0
            )
            acc0 = tl.dot(tile0, many, acc0, input_precision=PRECISION)
            if PAIR:
                acc1 = tl.dot(tile1, many, acc1, input_precision=PRECISION)
    if T == 1:
        acc0 = tl.sum(acc0, 1)[:, None]
        acc1 = tl.sum(acc1, 1)[:, None]
    return acc0, acc1


@triton.jit
def _segment(
    x, w0, w1, index, in_entries, y, tile, width, tokens, depth, stride_x, stride_w0, stride_w1, stride_y,
    INDEXED: tl.constexpr, PAIR: tl.constexpr, IN_KIND: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs [tile·BN, tile·BN+BN) of one weight (or, PAIR, of silu(gate)·up), stored to y [tokens, width]."""
    n = tile * BN + tl.arange(0, BN)
    rows = tl.load(index + n, mask=n < width, other=0) if INDEXED else tl.minimum(n, width - 1)
    acc0, acc1 = _contract_rows(
        x, w0, w1, rows, in_entries, tokens, depth, stride_x, stride_w0, stride_w1,
        PAIR, IN_KIND, EVEN, PRECISION, T, BN, BK, STAGES,
    )  # fmt: skip
    if PAIR:
        acc0 = silu_mul(acc0, acc1)
    token = tl.arange(0, T)
    inside = (n < width)[:, None] & (token < tokens)[None, :]
    tl.store(y + token[None, :] * stride_y + n[:, None], acc0.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rows_kernel(
    x, w0, w1, index, in_entries, y, width, tokens, depth, stride_x, stride_w0, stride_w1, stride_y,
    INDEXED: tl.constexpr, PAIR: tl.constexpr, IN_KIND: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    _segment(
        x, w0, w1, index, in_entries, y, tl.program_id(0), width, tokens, depth, stride_x, stride_w0, stride_w1,
        stride_y, INDEXED, PAIR, IN_KIND, EVEN, PRECISION, T, BN, BK, STAGES,
    )  # fmt: skip


@triton.jit
def qkv_kernel(
    x, q, k, v, q_index, kv_index, y_q, y_k, y_v, q_width, kv_width, tokens, depth, stride_x, stride_q, stride_k,
    stride_v, INDEXED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q, k and v in one launch: outputs [tokens, q_width] and twice [tokens, kv_width]."""
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(q_width, BN)
    kv_tiles = tl.cdiv(kv_width, BN)
    if tile < q_tiles:
        _segment(
            x, q, q, q_index, q_index, y_q, tile, q_width, tokens, depth, stride_x, stride_q, stride_q, q_width,
            INDEXED, False, 0, EVEN, PRECISION, T, BN, BK, STAGES,
        )  # fmt: skip
    elif tile < q_tiles + kv_tiles:
        _segment(
            x, k, k, kv_index, kv_index, y_k, tile - q_tiles, kv_width, tokens, depth, stride_x, stride_k,
            stride_k, kv_width, INDEXED, False, 0, EVEN, PRECISION, T, BN, BK, STAGES,
        )  # fmt: skip
    else:
        _segment(
            x, v, v, kv_index, kv_index, y_v, tile - q_tiles - kv_tiles, kv_width, tokens, depth,
            stride_x, stride_v, stride_v, kv_width, INDEXED, False, 0, EVEN, PRECISION, T, BN, BK, STAGES,
        )  # fmt: skip


@triton.jit
def columns_kernel(
    x, w, index, partial, tokens, depth, columns, chunk, stride_x, stride_w,
    INDEXED: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums [splits, tokens, columns] of x [tokens, depth] @ w[index], split s taking ``chunk`` kept rows."""
    split = tl.program_id(1)
    column = tl.program_id(0) * BH + tl.arange(0, BH)
    token = tl.arange(0, T)
    first = split * chunk
    last = tl.minimum(first + chunk, depth)
    acc = tl.zeros([BC, BH], tl.float32) if T == 1 else tl.zeros([T, BH], tl.float32)
    for start in tl.range(first, last, BC, num_stages=STAGES):
        unit = start + tl.arange(0, BC)
        inside = unit < last
        row = unit
        if INDEXED:
            row = tl.load(index + unit, mask=inside, other=0)
        tile = tl.load(
            w + row[:, None].to(tl.int64) * stride_w + column[None, :],
            mask=inside[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        if T == 1:
            one = tl.load(x + unit, mask=inside, other=0.0).to(tl.float32)[:, None]
            acc += tile.to(tl.float32) * one
        else:
            many = tl.load(
                x + token[:, None] * stride_x + unit[None, :],
                mask=(token < tokens)[:, None] & inside[None, :],
                other=0.0,
            )
            acc = tl.dot(many, tile, acc, input_precision=PRECISION)
    if T == 1:
        acc = tl.sum(acc, 0)[None, :]
    at = (split * tokens + token)[:, None] * columns + column[None, :]
    tl.store(partial + at, acc, mask=(token < tokens)[:, None] & (column < columns)[None, :])


@triton.jit
def reduce_kernel(partial, y, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = sum over s of partial[s, i], in the order of s."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(partial + s * size + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


def _rows_config(tokens: int, width: int, pair: bool) -> dict[str, int]:
    """Tile of one program: enough programs that every multiprocessor holds some, enough bytes in flight in each."""
    if tokens == 1:
        return {"T": 1, "BN": 8, "BK": 512, "STAGES": 1, "num_warps": 4}
    return {"T": 16, "BN": 32 if pair or width >= 4096 else 16, "BK": 128, "STAGES": 4, "num_warps": 4}


def rows(
    x: Tensor, weights: tuple[Tensor, ...], index: Tensor | None, width: int,
    in_kind: int = 0, in_entries: Tensor | None = None, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [t, K] times kept rows of one weight; of two weights (gate, up): silu(gate)·up. Returns [t, width].

    ``index``: int32 [width] rows, None for the prefix. ``in_kind``/``in_entries``: which weight columns the K columns
    of x stand for. 1 <= t <= 16, width >= 1, K >= 1.
    """
    x = row_major(x)
    tokens, depth = x.shape
    y = x.new_empty(tokens, width)
    c = dict(config or _rows_config(tokens, width, len(weights) == 2))
    w0, w1 = weights[0], weights[-1]
    rows_kernel[triton.cdiv(width, c["BN"]),](
        x, w0, w1, index if index is not None else x, in_entries if in_entries is not None else x, y,
        width, tokens, depth, x.stride(0), w0.stride(0), w1.stride(0), width,
        INDEXED=index is not None, PAIR=len(weights) == 2, IN_KIND=in_kind, EVEN=depth % c["BK"] == 0,
        PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return y


def qkv(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, q_index: Tensor | None, kv_index: Tensor | None,
    q_width: int, kv_width: int, config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [t, K] times kept rows of q, k and v in one launch: [t, q_width] and twice [t, kv_width]. 1 <= t <= 16."""
    x = row_major(x)
    tokens, depth = x.shape
    y = x.new_empty(tokens, q_width), x.new_empty(tokens, kv_width), x.new_empty(tokens, kv_width)
    c = dict(config or _rows_config(tokens, q_width + 2 * kv_width, False))
    tiles = triton.cdiv(q_width, c["BN"]) + 2 * triton.cdiv(kv_width, c["BN"])
    indexed = q_index is not None
    qkv_kernel[tiles,](
        x, q, k, v, q_index if indexed else x, kv_index if indexed else x, *y, q_width, kv_width, tokens, depth,
        x.stride(0), q.stride(0), k.stride(0), v.stride(0),
        INDEXED=indexed, EVEN=depth % c["BK"] == 0, PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return y


def _columns_config(tokens: int) -> dict[str, int]:
    if tokens == 1:
        return {"T": 1, "BC": 16, "BH": 256, "STAGES": 1, "num_warps": 4, "WAVES": 4}
    return {"T": 16, "BC": 64, "BH": 128, "STAGES": 4, "num_warps": 4, "WAVES": 3}


def columns(x: Tensor, weight: Tensor, index: Tensor | None, config: dict[str, int] | None = None) -> Tensor:
    """x [t, K] times kept rows of the transposed weight [units, columns]: [t, columns]. 1 <= t <= 16, K >= 1.

    ``index``: int32 [K] rows, None for the prefix.
    """
    x = row_major(x)
    tokens, depth = x.shape
    width = weight.shape[1]
    c = dict(config or _columns_config(tokens))
    tiles = triton.cdiv(width, c["BH"])
    splits = max(1, min(c.pop("WAVES") * multiprocessors(x.device) // tiles, triton.cdiv(depth, c["BC"])))
    chunk = triton.cdiv(triton.cdiv(depth, splits), c["BC"]) * c["BC"]
    splits = triton.cdiv(depth, chunk)
    partial = x.new_empty(splits, tokens, width, dtype=torch.float32)
    columns_kernel[tiles, splits](
        x, weight, index if index is not None else x, partial, tokens, depth, width, chunk, x.stride(0),
        weight.stride(0), INDEXED=index is not None, PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    y = x.new_empty(tokens, width)
    reduce_kernel[triton.cdiv(y.numel(), 256),](partial, y, y.numel(), SPLITS=splits, BLOCK=256, num_warps=2)
    return y

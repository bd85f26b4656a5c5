"""Masked products for 1 to 16 tokens, where the weights' bytes are the whole cost.

Two shapes of traffic. ``rows``: an output needs one weight row (gate, up, q, k, v, and down or o as stored): every
program owns BN rows and walks the contraction; all programs are resident at once, so no split is needed. ``columns``:
the weight is held transposed and a kept unit is one contiguous row of the contraction: the programs split the kept
rows, and a second kernel adds their partial sums in a fixed order (no float atomics: the same input, the same bits).

In ``rows`` one token is a plain multiply and sum; 2 to 16 tokens are padded to 16 and go through the matrix units,
with the weight tile as the tall operand; ``columns`` pads always. Tried on an H200 and no faster: starting the second
kernel early (programmatic dependent launch) with a prefetch of its weights; letting the last program of a column tile
add the partial sums instead of a second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import multiprocessors, precision, row_major, silu_mul

# IN_KIND and the kinds of ppf.fast.ops.selection: 0 prefix, 1 blocks of 64, 2 indices. MASKED is one of ours: x holds a
# column for every column of the weight, and the entries say which of them count.
MASKED = 3
MAX_TOKENS = 16


@triton.jit
def _entries(in_entries, k, depth, IN_KIND: tl.constexpr):
    """List entries (blocks or columns) of the contraction positions ``k`` [BK]; past the end, the last position's."""
    k = tl.minimum(k, depth - 1)
    if IN_KIND == 1:
        k = k // 64
    return tl.load(in_entries + k)


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
    lane = tl.arange(0, BK)
    acc0 = tl.zeros([BN, BK], tl.float32) if T == 1 else tl.zeros([BN, T], tl.float32)
    acc1 = acc0
    # Columns that are looked up are looked up one step ahead, or every step would wait for them.
    following = _entries(in_entries, lane, depth, IN_KIND) if IN_KIND == 1 or IN_KIND == 2 else lane
    for start in tl.range(0, depth, BK, num_stages=STAGES):
        k = start + lane
        inside = k < depth
        column = k
        if IN_KIND == 1 or IN_KIND == 2:
            column = following
            if IN_KIND == 1:
                column = tl.max_contiguous(tl.multiple_of(following * 64 + k % 64, 64), 64)
            following = _entries(in_entries, k + BK, depth, IN_KIND)
        if EVEN:
            tile0 = tl.load(row0 + column[None, :])
        else:
            tile0 = tl.load(row0 + column[None, :], mask=inside[None, :], other=0.0)
        if PAIR:
            if EVEN:
                tile1 = tl.load(row1 + column[None, :])
            else:
                tile1 = tl.load(row1 + column[None, :], mask=inside[None, :], other=0.0)
        if IN_KIND == 3:
            # Not a product with zero: an infinity or NaN in a pruned column must not reach the sum.
            counts = tl.load(in_entries + k, mask=inside, other=0)[None, :] != 0
            tile0 = tl.where(counts, tile0, 0.0)
            if PAIR:
                tile1 = tl.where(counts, tile1, 0.0)
        if T == 1:
            one = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)[None, :]
            acc0 += tile0.to(tl.float32) * one
            if PAIR:
                acc1 += tile1.to(tl.float32) * one
        else:
            wanted = (token < tokens)[None, :] & inside[:, None]
            many = tl.load(x + token[None, :] * stride_x + k[:, None], mask=wanted, other=0.0)
            acc0 = tl.dot(tile0, many, acc0, input_precision=PRECISION)
            if PAIR:
                acc1 = tl.dot(tile1, many, acc1, input_precision=PRECISION)
    if T == 1:
        acc0 = tl.sum(acc0, 1)[:, None]
        acc1 = tl.sum(acc1, 1)[:, None]
    return acc0, acc1


@triton.jit
def rows_kernel(
    x, w0, w1, index, in_entries, y, width, tokens, depth, stride_x, stride_w0, stride_w1, stride_y,
    INDEXED: tl.constexpr, PAIR: tl.constexpr, IN_KIND: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs [BN·program, BN·program+BN) of one weight (or, PAIR, of silu(gate)·up): y [tokens, width]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(n, width - 1)
    if INDEXED:
        rows = tl.load(index + rows)
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
def qkv_kernel(
    x, q, k_offset, v_offset, q_index, kv_index, y_q, y_k, y_v, q_width, kv_width, tokens, depth, stride_x, stride_w,
    INDEXED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q, k and v in one launch: outputs [tokens, q_width] and twice [tokens, kv_width].

    k and v are given as offsets from q, in elements and multiples of ALIGN: with one code path for the three weights
    the kernel needs a third of the shared memory, and the compiler still knows that 16-byte loads are aligned.
    """
    q_tiles = tl.cdiv(q_width, BN)
    kv_tiles = tl.cdiv(kv_width, BN)
    is_q = tl.program_id(0) < q_tiles
    is_v = tl.program_id(0) >= q_tiles + kv_tiles
    tile = tl.program_id(0) - tl.where(is_q, 0, q_tiles + tl.where(is_v, kv_tiles, 0))
    width = tl.where(is_q, q_width, kv_width)
    w = q + tl.multiple_of(tl.where(is_q, 0, tl.where(is_v, v_offset, k_offset)).to(tl.int64), ALIGN)
    n = tile * BN + tl.arange(0, BN)
    rows = tl.minimum(n, width - 1)
    if INDEXED:
        # Both lists are read, where the longer one's position is past the end of the shorter: its last entry.
        of_q = tl.load(q_index + tl.minimum(rows, q_width - 1))
        rows = tl.where(is_q, of_q, tl.load(kv_index + tl.minimum(rows, kv_width - 1)))
    acc, _ = _contract_rows(
        x, w, w, rows, q_index, tokens, depth, stride_x, stride_w, stride_w,
        False, 0, EVEN, PRECISION, T, BN, BK, STAGES,
    )  # fmt: skip
    token = tl.arange(0, T)
    inside = (n < width)[:, None] & (token < tokens)[None, :]
    out = acc.to(y_q.dtype.element_ty)
    at = token[None, :] * width + n[:, None]
    part = tl.where(is_q, 0, tl.where(is_v, 2, 1)) + n[:, None] * 0 + token[None, :] * 0
    tl.store(y_q + at, out, mask=inside & (part == 0))
    tl.store(y_k + at, out, mask=inside & (part == 1))
    tl.store(y_v + at, out, mask=inside & (part == 2))


@triton.jit
def columns_kernel(
    x, w, index, partial, tokens, depth, columns, chunk, stride_x, stride_w,
    INDEXED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums [splits, tokens, columns] of x [tokens, depth] @ w[index], split s taking ``chunk`` kept rows."""
    split = tl.program_id(1)
    column = tl.program_id(0) * BH + tl.arange(0, BH)
    token = tl.arange(0, T)
    lane = tl.arange(0, BC)
    first = split * chunk
    last = tl.minimum(first + chunk, depth)
    acc = tl.zeros([T, BH], tl.float32)
    # The row numbers of the next step are read one step ahead, or every step would wait for them.
    following = tl.load(index + tl.minimum(first + lane, last - 1)) if INDEXED else lane
    for start in tl.range(first, last, BC, num_stages=STAGES):
        unit = start + lane
        inside = unit < last
        if INDEXED:
            row = following
            following = tl.load(index + tl.minimum(unit + BC, last - 1))
        else:
            row = tl.minimum(unit, last - 1)
        at = w + row[:, None].to(tl.int64) * stride_w + column[None, :]
        tile = tl.load(at) if EVEN else tl.load(at, mask=(column < columns)[None, :], other=0.0)
        wanted = (token < tokens)[:, None] & inside[None, :]
        many = tl.load(x + token[:, None] * stride_x + unit[None, :], mask=wanted, other=0.0)
        acc = tl.dot(many, tile, acc, input_precision=PRECISION)
    at = (split * tokens + token)[:, None] * columns + column[None, :]
    tl.store(partial + at, acc, mask=(token < tokens)[:, None] & (column < columns)[None, :])


@triton.jit
def expand_kernel(x, index, y, counts, depth, total, stride_x, stride_y, BLOCK: tl.constexpr):
    """One token: y [total] = 0, then y[index[i]] = x[i]; the first program also marks the indices in ``counts``.

    The indices must differ.
    """
    token = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    for start in range(0, total, BLOCK):
        at = start + lane
        tl.store(y + token * stride_y + at, tl.zeros([BLOCK], y.dtype.element_ty), mask=at < total)
        tl.store(counts + at, tl.zeros([BLOCK], tl.int8), mask=at < tl.where(token == 0, total, 0))
    tl.debug_barrier()
    for start in range(0, depth, BLOCK):
        at = start + lane
        inside = at < depth
        column = tl.load(index + at, mask=inside, other=0)
        tl.store(y + token * stride_y + column, tl.load(x + token * stride_x + at, mask=inside), mask=inside)
        tl.store(counts + column, tl.full([BLOCK], 1, tl.int8), mask=at < tl.where(token == 0, depth, 0))


@triton.jit
def reduce_kernel(partial, y, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = sum over s of partial[s, i], in the order of s."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(partial + s * size + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


def _rows_config(tokens: int, width: int, depth: int, pair: bool, listed: bool) -> dict[str, int]:
    """Tile of one program: all programs resident at once, 40 to 100 KB of weights in flight in each."""
    if tokens == 1:
        if pair:
            return {"T": 1, "BN": 16, "BK": 256, "STAGES": 3, "num_warps": 4}
        if listed:
            return {"T": 1, "BN": 8, "BK": 512, "STAGES": 3, "num_warps": 4}
        if width >= 4096 and depth % 256 == 0:
            return {"T": 1, "BN": 16, "BK": 256, "STAGES": 4, "num_warps": 4}
        return {"T": 1, "BN": 8, "BK": 256, "STAGES": 6, "num_warps": 2}
    if pair:
        return {"T": 16, "BN": 64, "BK": 128, "STAGES": 4, "num_warps": 4}
    if width >= 4096 and not listed:
        return {"T": 16, "BN": 64, "BK": 128, "STAGES": 6, "num_warps": 4}
    return {"T": 16, "BN": 16, "BK": 256, "STAGES": 4, "num_warps": 2}


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
    c = dict(config or _rows_config(tokens, width, depth, len(weights) == 2, in_kind != 0))
    w0, w1 = weights[0], weights[-1]
    rows_kernel[triton.cdiv(width, c["BN"]),](
        x, w0, w1, index if index is not None else x, in_entries if in_entries is not None else x, y,
        width, tokens, depth, x.stride(0), w0.stride(0), w1.stride(0), width,
        INDEXED=index is not None, PAIR=len(weights) == 2, IN_KIND=in_kind, EVEN=depth % c["BK"] == 0,
        PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return y


def expand(x: Tensor, index: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """x [t, K] put back in place: [t, total] with x at the columns ``index`` (int32 [K], all different), else zero; and
    int8 [total], 1 at those columns: the entries of kind MASKED."""
    x = row_major(x)
    y, counts = x.new_empty(x.shape[0], total), torch.empty(total, dtype=torch.int8, device=x.device)
    expand_kernel[x.shape[0],](x, index, y, counts, x.shape[1], total, x.stride(0), total, BLOCK=2048, num_warps=8)
    return y, counts


def qkv(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, q_index: Tensor | None, kv_index: Tensor | None,
    q_width: int, kv_width: int, config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [t, K] times kept rows of q, k and v in one launch: [t, q_width] and twice [t, kv_width].

    The three weights share one row pitch. 1 <= t <= 16.
    """
    x = row_major(x)
    tokens, depth = x.shape
    y = x.new_empty(tokens, q_width), x.new_empty(tokens, kv_width), x.new_empty(tokens, kv_width)
    c = dict(config or _rows_config(tokens, q_width, depth, False, True))
    tiles = triton.cdiv(q_width, c["BN"]) + 2 * triton.cdiv(kv_width, c["BN"])
    indexed = q_index is not None
    offsets = [(w.data_ptr() - q.data_ptr()) // q.element_size() for w in (k, v)]
    qkv_kernel[tiles,](
        x, q, *offsets, q_index if indexed else x, kv_index if indexed else x, *y, q_width, kv_width, tokens, depth,
        x.stride(0), q.stride(0), INDEXED=indexed, EVEN=depth % c["BK"] == 0, PRECISION=precision(x.dtype),
        ALIGN=8 if all(offset % 8 == 0 for offset in offsets) else 1, **c,
    )  # fmt: skip
    return y


COLUMNS = {"T": 16, "BC": 128, "BH": 64, "STAGES": 4, "num_warps": 4, "WAVES": 3}


def columns(x: Tensor, weight: Tensor, index: Tensor | None, config: dict[str, int] | None = None) -> Tensor:
    """x [t, K] times kept rows of the transposed weight [units, columns]: [t, columns]. 1 <= t <= 16, K >= 1.

    ``index``: int32 [K] rows, None for the prefix.
    """
    x = row_major(x)
    tokens, depth = x.shape
    width = weight.shape[1]
    c = dict(config or COLUMNS)
    tiles = triton.cdiv(width, c["BH"])
    splits = max(1, min(c.pop("WAVES") * multiprocessors(x.device) // tiles, triton.cdiv(depth, c["BC"])))
    chunk = triton.cdiv(triton.cdiv(depth, splits), c["BC"]) * c["BC"]
    splits = triton.cdiv(depth, chunk)
    partial = x.new_empty(splits, tokens, width, dtype=torch.float32)
    columns_kernel[tiles, splits](
        x, weight, index if index is not None else x, partial, tokens, depth, width, chunk, x.stride(0),
        weight.stride(0), INDEXED=index is not None, EVEN=width % c["BH"] == 0, PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    y = x.new_empty(tokens, width)
    reduce_kernel[triton.cdiv(y.numel(), 256),](partial, y, y.numel(), SPLITS=splits, BLOCK=256, num_warps=2)
    return y

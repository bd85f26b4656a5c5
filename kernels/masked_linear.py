"""One masked product of many tokens: kept weight rows, kept weight columns, or a transposed weight's kept rows.

For selections cuBLAS cannot read in place, fetched by pointers: the kept rows may be any list, the kept columns any
list of 64-blocks; with TRANSPOSED the weight is [units, outputs] and any list of units (rows, contiguous) is the
contraction. 64-blocks on one side have a faster way, ``ppf.kernels.blocks``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tile import copy_engine, describable, descriptor, precision, row_major, swizzle


@triton.jit
def linear_kernel(
    x, w, index, in_blocks, y, tokens, width, depth, stride_x, stride_w, stride_y,
    INDEXED: tl.constexpr, IN_BLOCKS: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, X_TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x is a pointer, or with X_TILES a tensor descriptor; y is [tokens, width]."""
    tile_m, tile_n = swizzle(tl.program_id(0), tl.cdiv(tokens, BM), tl.cdiv(width, BN), GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    if not X_TILES:
        x_tile = x + tl.minimum(m, tokens - 1)[:, None].to(tl.int64) * stride_x + k[None, :]
    rows = tl.minimum(n, width - 1)
    if INDEXED and not TRANSPOSED:
        rows = tl.load(index + rows)
    w_rows = w + rows[None, :].to(tl.int64) * stride_w
    # Row numbers are read one step ahead, or every step would wait for them.
    following = tl.load(index + tl.minimum(k, depth - 1)) if INDEXED and TRANSPOSED else k
    # Tiles that reach past the last output read it again: contiguous in whole tiles, and then without a mask.
    outputs = n if ALIGNED else tl.minimum(n, width - 1)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, depth, BK):
        position = start + k
        inside = position < depth
        if TRANSPOSED:
            unit = tl.minimum(position, depth - 1)
            if INDEXED:
                unit = following
                following = tl.load(index + tl.minimum(position + BK, depth - 1))
            b = tl.load(w + unit[:, None].to(tl.int64) * stride_w + outputs[None, :])
        else:
            column = position
            if IN_BLOCKS:
                block = tl.load(in_blocks + position // 64, mask=inside, other=0)
                column = tl.max_contiguous(tl.multiple_of(block * 64 + position % 64, 64), 64)
            if EVEN:
                b = tl.load(w_rows + column[:, None])
            else:
                b = tl.load(w_rows + column[:, None], mask=inside[:, None], other=0.0)
        if X_TILES:
            a = x.load([tile_m * BM, start])
        else:
            a = tl.load(x_tile) if EVEN else tl.load(x_tile, mask=inside[None, :], other=0.0)
            x_tile += BK
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    inside = (m < tokens)[:, None] & (n < width)[None, :]
    tl.store(y + m[:, None].to(tl.int64) * stride_y + n[None, :], acc.to(y.dtype.element_ty), mask=inside)


def linear_config(tokens: int) -> dict[str, int]:
    """Tile of the pointer kernel."""
    if tokens <= 64:
        return {"BM": 64, "BN": 64, "BK": 64, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    return {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


def linear(
    x: Tensor, weight: Tensor, index: Tensor | None, width: int, in_blocks: Tensor | None = None,
    transposed: bool = False, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [t, K] times kept rows and column blocks of ``weight``: [t, width].

    ``index``: int32 kept rows: outputs [width], or with ``transposed`` contraction positions [K]; None for the prefix.
    ``in_blocks``: int32 [K / 64] kept column blocks, or None for the prefix.
    """
    x = row_major(x)
    tokens, depth = x.shape
    y = x.new_empty(tokens, width)
    c = dict(config or linear_config(tokens))
    tiles = copy_engine(x.device) and describable(x)
    linear_kernel[triton.cdiv(tokens, c["BM"]) * triton.cdiv(width, c["BN"]),](
        descriptor(x, [c["BM"], c["BK"]]) if tiles else x, weight, index if index is not None else x,
        in_blocks if in_blocks is not None else x, y,
        tokens, width, depth, x.stride(0), weight.stride(0), width,
        INDEXED=index is not None, IN_BLOCKS=in_blocks is not None, TRANSPOSED=transposed,
        EVEN=depth % c["BK"] == 0, ALIGNED=width % c["BN"] == 0, PRECISION=precision(x.dtype), X_TILES=tiles, **c,
    )  # fmt: skip
    return y

"""Gate, up and silu·mul of many tokens in one kernel, under a selection; and the bare silu·mul that follows cuBLAS.

A program makes a [BM tokens, BN channels] tile of silu(x·gateᵀ)·(x·upᵀ): gate and up share every read of x and their
tiles never reach memory. Weight rows are fetched by pointers, so they may be any list; 64-blocks have a faster way,
``ppf.kernels.blocks``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import copy_engine, describable, descriptor, precision, row_major, silu_mul, swizzle, three_fit


@triton.jit
def gather_kernel(
    x, gate, up, index, h, tokens, width, depth, stride_x, stride_gate, stride_up, stride_h,
    INDEXED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, X_TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x is a pointer, or with X_TILES a tensor descriptor; h is [tokens, width]."""
    tile_m, tile_n = swizzle(tl.program_id(0), tl.cdiv(tokens, BM), tl.cdiv(width, BN), GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    rows = tl.minimum(n, width - 1)
    if INDEXED:
        rows = tl.load(index + rows)
    # Rows past the end repeat the last one: a load without a mask is cheaper, and they are not stored.
    if not X_TILES:
        x_tile = x + tl.minimum(m, tokens - 1)[:, None].to(tl.int64) * stride_x + k[None, :]
    gate_tile = gate + rows[None, :].to(tl.int64) * stride_gate + k[:, None]
    up_tile = up + rows[None, :].to(tl.int64) * stride_up + k[:, None]
    acc_gate = tl.zeros([BM, BN], tl.float32)
    acc_up = tl.zeros([BM, BN], tl.float32)
    for start in range(0, depth, BK):
        inside = start + k < depth
        if X_TILES:
            a = x.load([tile_m * BM, start])
        else:
            a = tl.load(x_tile) if EVEN else tl.load(x_tile, mask=inside[None, :], other=0.0)
            x_tile += BK
        if EVEN:
            b = tl.load(gate_tile)
            c = tl.load(up_tile)
        else:
            b = tl.load(gate_tile, mask=inside[:, None], other=0.0)
            c = tl.load(up_tile, mask=inside[:, None], other=0.0)
        acc_gate = tl.dot(a, b, acc_gate, input_precision=PRECISION)
        acc_up = tl.dot(a, c, acc_up, input_precision=PRECISION)
        gate_tile += BK
        up_tile += BK
    out = silu_mul(acc_gate, acc_up).to(h.dtype.element_ty)
    inside = (m < tokens)[:, None] & (n < width)[None, :]
    tl.store(h + m[:, None].to(tl.int64) * stride_h + n[None, :], out, mask=inside)


@triton.jit
def silu_mul_kernel(gate, up, h, width, stride_gate, stride_up, stride_h, BLOCK: tl.constexpr):
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    inside = n < width
    a = tl.load(gate + row * stride_gate + n, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + row * stride_up + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row * stride_h + n, silu_mul(a, b).to(h.dtype.element_ty), mask=inside)


def gather_config(tokens: int, width: int, device: torch.device) -> dict[str, int]:
    """Tile of the pointer kernel."""
    if tokens <= 64:
        return {"BM": 64, "BN": 64, "BK": 64, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    c = {"BM": 128, "BN": 64, "BK": 64, "GROUP": 8}
    if three_fit(triton.cdiv(tokens, 128) * triton.cdiv(width, 64), device):
        return c | {"num_warps": 4, "num_stages": 2, "maxnreg": 168}
    return c | {"num_warps": 8, "num_stages": 3}


def gate_up(
    x: Tensor, gate: Tensor, up: Tensor, index: Tensor | None, width: int, config: dict[str, int] | None = None
) -> Tensor:
    """silu(x·gateᵀ)·(x·upᵀ) of kept rows: x [t, H] -> [t, width]. ``index``: int32 [width], None for the prefix."""
    x = row_major(x)
    tokens, depth = x.shape
    h = x.new_empty(tokens, width)
    c = dict(config or gather_config(tokens, width, x.device))
    tiles = copy_engine(x.device) and describable(x)
    gather_kernel[triton.cdiv(tokens, c["BM"]) * triton.cdiv(width, c["BN"]),](
        descriptor(x, [c["BM"], c["BK"]]) if tiles else x, gate, up, index if index is not None else x, h,
        tokens, width, depth, x.stride(0), gate.stride(0), up.stride(0), h.stride(0),
        INDEXED=index is not None, EVEN=depth % c["BK"] == 0, PRECISION=precision(x.dtype), X_TILES=tiles, **c,
    )  # fmt: skip
    return h


def multiply_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up, [t, width] each, in one pass (unit last stride)."""
    h = gate.new_empty(gate.shape)
    if h.numel():
        block = min(1024, triton.next_power_of_2(h.shape[1]))
        silu_mul_kernel[h.shape[0], triton.cdiv(h.shape[1], block)](
            gate, up, h, h.shape[1], gate.stride(0), up.stride(0), h.stride(0), BLOCK=block, num_warps=4
        )
    return h

"""Norm, q, k, v, rotary embedding and the write into the cache: the first launch of a layer's decode step.

A program owns BN pairs of rows (i, i + head_dim/2) of one weight, the pairs that the rotary embedding mixes, so that
keys and values go straight into the cache and only the queries are handed on. Where heads are normalised before they
are rotated, no program has a whole head (programs of whole heads would be too few to fill a GPU): queries and the key
are then left as they are, and attention, which reads whole heads anyway, does both.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .decode import Config, begin, contract, launch, padded
from .tile import precision


@triton.jit
def qkv_kernel(
    x, gain, q, k_offset, v_offset, q_bias, k_bias, v_bias, cos, sin, start, position, y, k_cache, v_cache,
    q_pairs, kv_pairs, tokens, depth, stride_x, stride_w, stride_y, stride_cb, stride_ch, stride_cs, epsilon,
    HALF: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    ROTATE: tl.constexpr, PDL: tl.constexpr, LINES: tl.constexpr,
    T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Queries y [tokens, heads·2·HALF], and keys, rotated if ROTATE; keys and values at ``position`` of the caches.

    k and v are given as offsets from q, in elements and multiples of ALIGN: with one code path for the three weights
    the kernel needs a third of the shared memory, and the compiler still knows that 16-byte loads are aligned.
    """
    q_tiles = tl.cdiv(q_pairs, BN)
    kv_tiles = tl.cdiv(kv_pairs, BN)
    is_q = tl.program_id(0) < q_tiles
    is_v = tl.program_id(0) >= q_tiles + kv_tiles
    tile = tl.program_id(0) - tl.where(is_q, 0, q_tiles + tl.where(is_v, kv_tiles, 0))
    pairs = tl.where(is_q, q_pairs, kv_pairs)
    w = q + tl.multiple_of(tl.where(is_q, 0, tl.where(is_v, v_offset, k_offset)).to(tl.int64), ALIGN)
    pair = tile * BN + tl.arange(0, BN)
    held = tl.minimum(pair, pairs - 1)
    head = held // HALF
    i = held % HALF
    row0 = w + (head * (2 * HALF) + i)[:, None].to(tl.int64) * stride_w
    row1 = row0 + HALF * stride_w
    if q_bias is not None:  # loaded before the products, which hide the time that takes
        bias = tl.where(is_q, q_bias, tl.where(is_v, v_bias, k_bias)) + head * (2 * HALF) + i
        bias0, bias1 = tl.load(bias).to(tl.float32), tl.load(bias + HALF).to(tl.float32)
    begin(row0, row1, True, PDL, LINES)
    acc0, acc1 = contract(
        x, gain, row0, row1, tokens, depth, stride_x, epsilon, NORM, True, EVEN, PRECISION, T, BN, BK, STAGES
    )
    if q_bias is not None:
        acc0 += bias0[:, None]
        acc1 += bias1[:, None]
    token = tl.arange(0, T)
    inside = (pair < pairs)[:, None] & (token < tokens)[None, :]
    now = tl.load(position)
    first = tl.load(start + token, mask=token < tokens, other=0)
    if ROTATE:
        angle = (now - tl.minimum(first, now))[None, :] * HALF + i[:, None]
        # A value is a pair that is rotated by nothing.
        c = tl.where(is_v, 1.0, tl.load(cos + angle))
        s = tl.where(is_v, 0.0, tl.load(sin + angle))
        out0 = (acc0 * c - acc1 * s).to(y.dtype.element_ty)
        out1 = (acc1 * c + acc0 * s).to(y.dtype.element_ty)
    else:
        out0, out1 = acc0.to(y.dtype.element_ty), acc1.to(y.dtype.element_ty)
    at = token[None, :] * stride_y + (head * (2 * HALF) + i)[:, None]
    _store_pairs(y + at, out0, out1, tl.where(is_q, inside, False), HALF)
    at = token[None, :].to(tl.int64) * stride_cb + head[:, None].to(tl.int64) * stride_ch + now * stride_cs + i[:, None]
    _store_pairs(k_cache + at, out0, out1, tl.where(is_q, False, tl.where(is_v, False, inside)), HALF)
    _store_pairs(v_cache + at, out0, out1, tl.where(is_v, inside, False), HALF)


@triton.jit
def _store_pairs(at, out0, out1, mask, HALF: tl.constexpr):
    tl.store(at, out0, mask=mask)
    tl.store(at + HALF, out1, mask=mask)


def qkv_config(tokens: int, pairs: int) -> Config:
    """Tile of one program for ``pairs`` pairs of rows in all; BN counts pairs. Measured on an H100 (dev/LOG.md)."""
    t = padded(tokens)
    if t == 1:
        if pairs >= 6144:
            return {"T": 1, "BN": 8, "BK": 256, "STAGES": 4, "num_warps": 2, "LINES": 8}
        return {"T": 1, "BN": 8, "BK": 512, "STAGES": 3, "num_warps": 4, "LINES": 8}
    if t == 16 and pairs >= 6144:
        return {"T": t, "BN": 16, "BK": 256, "STAGES": 4, "num_warps": 4, "LINES": 8}
    if t == 16:
        return {"T": t, "BN": 32, "BK": 128, "STAGES": 4, "num_warps": 2, "LINES": 8}
    return {"T": t, "BN": 64, "BK": 128, "STAGES": 4, "num_warps": 4, "LINES": 8}


def qkv(
    x: Tensor, gain: Tensor | None, q: Tensor, k: Tensor, v: Tensor, biases: tuple[Tensor | None, ...], cos: Tensor,
    sin: Tensor, start: Tensor, position: Tensor, y: Tensor, k_cache: Tensor, v_cache: Tensor, epsilon: float,
    rotate: bool = True, pdl: bool = False, config: Config | None = None,
) -> None:  # fmt: skip
    """See :func:`ppf.fast.ops.decode.qkv`. The weights share one row pitch; without gain, x is normalised already.

    ``biases`` are those of q, k and v: contiguous vectors, or None for all three.
    """
    tokens, depth = x.shape
    half = cos.shape[1]
    q_pairs, kv_pairs = q.shape[0] // 2, k.shape[0] // 2
    c = dict(config or qkv_config(tokens, q_pairs + 2 * kv_pairs))
    tiles = triton.cdiv(q_pairs, c["BN"]) + 2 * triton.cdiv(kv_pairs, c["BN"])
    offsets = [(w.data_ptr() - q.data_ptr()) // q.element_size() for w in (k, v)]
    qkv_kernel[tiles,](
        x, x if gain is None else gain, q, *offsets, *biases, cos, sin, start, position, y, k_cache, v_cache,
        q_pairs, kv_pairs, tokens, depth, x.stride(0), q.stride(0), y.stride(0), *k_cache.stride()[:3], epsilon,
        HALF=half, NORM=gain is not None, EVEN=depth % c["BK"] == 0, PRECISION=precision(x.dtype),
        ALIGN=8 if all(offset % 8 == 0 for offset in offsets) else 1, ROTATE=rotate, PDL=pdl,
        **launch(c, pdl, depth, x),
    )  # fmt: skip

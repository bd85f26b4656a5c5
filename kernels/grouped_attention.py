"""Causal attention of many states of a wave in one launch, each with its own number of kv-groups."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .grouped import STEP, group_of, starts, tables
from .tile import descriptor, precision


@triton.jit
def _attend(q, kv_tiles, row, column, m, start, length, best, total, acc, scale, D: tl.constexpr,
            DIAGONAL: tl.constexpr, WINDOW: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
            BN: tl.constexpr):  # fmt: skip
    """One step of streaming softmax over keys [start, start + BN). With a ``WINDOW`` a query sees so many keys."""
    n = start + tl.arange(0, BN)
    k = kv_tiles.load([row + start, column])
    v = kv_tiles.load([row + start, column + D])
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    if DIAGONAL:
        scores = tl.where(m[:, None] >= n[None, :], scores, float("-inf"))
        if RAGGED:
            # What follows a sequence may be anything, and zero times that need not be zero.
            v = tl.where((n < length)[:, None], v, 0.0).to(q.dtype)
    if WINDOW:
        scores = tl.where(m[:, None] - n[None, :] < WINDOW, scores, float("-inf"))
    new = tl.maximum(best, tl.max(scores, 1))
    # With a window a query may have seen no key yet, and infinity less infinity is no number. A large finite score in
    # its place would not do either: a fused multiply and add leaves the rounding of its product, which is large too.
    base = tl.where(new == float("-inf"), 0.0, new) if WINDOW else new
    p = tl.exp2(scores * scale - (base * scale)[:, None])
    shrink = tl.exp2((best - base) * scale)
    acc = tl.dot(p.to(q.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new, total * shrink + tl.sum(p, 1), acc


@triton.jit
def attention_kernel(
    q_tiles, kv_tiles, tables, y, tokens, length, pitch, scale,
    HEADS: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, RAGGED: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries of one head, one sequence and one state; BM is a multiple of BN. ``WINDOW`` 0 is none."""
    state = group_of(tl.program_id(0), tables, GROUPS)
    local = tl.program_id(0) - tl.load(tables + state)
    groups = tl.load(tables + GROUPS + state)
    tiles = tl.cdiv(length, BM)
    # The last queries see the most keys, and go first.
    low_m = (tiles - 1 - local % tiles) * BM
    head = local // tiles % HEADS
    group = local // tiles // HEADS % groups
    row = state * tokens + local // tiles // HEADS // groups * length
    column = group * (HEADS + 2) * D
    m = low_m + tl.arange(0, BM)
    q = q_tiles.load([row + low_m, column + head * D])
    column += HEADS * D
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    whole = 0  # the first step all of whose keys all queries see
    if WINDOW:
        low = tl.maximum(low_m - WINDOW + 1, 0) // BN * BN
        whole = tl.minimum(tl.cdiv(tl.maximum(low_m + BM - WINDOW, 0), BN) * BN, low_m)
        for start in range(low, whole, BN):
            best, total, acc = _attend(
                q, kv_tiles, row, column, m, start, length, best, total, acc, scale, D, False, WINDOW, RAGGED,
                PRECISION, BN,
            )  # fmt: skip
    for start in range(whole, low_m, BN):
        best, total, acc = _attend(
            q, kv_tiles, row, column, m, start, length, best, total, acc, scale, D, False, 0, RAGGED, PRECISION, BN
        )
    for start in range(low_m, tl.minimum(low_m + BM, length), BN):
        best, total, acc = _attend(
            q, kv_tiles, row, column, m, start, length, best, total, acc, scale, D, True, WINDOW, RAGGED, PRECISION, BN
        )
    at = y + (row.to(tl.int64) + m)[:, None] * pitch + (group * HEADS + head) * D + tl.arange(0, D)[None, :]
    tl.store(at, (acc / total[:, None]).to(y.dtype.element_ty), mask=(m < length)[:, None])


ATTENTION = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3}
# Heads of 256 leave no room for a third step.
WIDE = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2}


def attention(
    qkv: Tensor, groups: Sequence[int], length: int, heads: int, head_dim: int, scale: float, window: int,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """q, k and v [E, N, G·(g+2)·d] of sequences of ``length`` -> [E, N, G·g·d], zero from each state's columns to the
    next multiple of ``STEP``, undefined from there."""
    states, tokens, pitch = qkv.shape
    c = config or (ATTENTION if head_dim <= 128 else WIDE)
    unit = heads * head_dim
    # Columns that end within a step of the product which follows leave the rest of it to this.
    empty = qkv.new_empty if unit % STEP == 0 else qkv.new_zeros
    y = empty(states, tokens, max(groups) * unit)
    tiles = triton.cdiv(length, c["BM"]) * (tokens // length) * heads
    first, total = starts([tiles * count for count in groups])
    table, flat = tables([first, groups], qkv.device), qkv.view(-1, pitch)
    attention_kernel[total,](
        descriptor(flat, [c["BM"], head_dim]), descriptor(flat, [c["BN"], head_dim]), table, y, tokens, length,
        y.shape[2], scale * 1.4426950408889634, HEADS=heads, D=head_dim, WINDOW=window, RAGGED=length % c["BN"] != 0,
        GROUPS=table.shape[1], PRECISION=precision(qkv.dtype), **c,
    )  # fmt: skip
    return y

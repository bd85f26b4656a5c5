"""Rotary embedding of a prompt's queries and keys, and the write of keys and values into the cache, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(source, target0, target1, c, s, mask, HALF: tl.constexpr):
    """Rotate the pairs (source, source + HALF) into target0 and target1."""
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(target0, (a * c - b * s).to(target0.dtype.element_ty), mask=mask)
    tl.store(target1, (b * c + a * s).to(target1.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    q, k, v, cos, sin, start, k_cache, v_cache, q_pairs, kv_pairs, length, stride_q, stride_k, stride_cb, stride_ch,
    stride_cs, HALF: tl.constexpr, BQ: tl.constexpr, BKV: tl.constexpr,
):  # fmt: skip
    """One token: q rotated in place, k rotated and v as it is to position ``program_id(0)`` of the caches."""
    position, sequence = tl.program_id(0), tl.program_id(1)
    token = (sequence * length + position).to(tl.int64)
    angle = tl.maximum(position - tl.load(start + sequence), 0) * HALF
    pair = tl.arange(0, BQ)
    source = q + token * stride_q + pair // HALF * (2 * HALF) + pair % HALF
    c = tl.load(cos + angle + pair % HALF)
    s = tl.load(sin + angle + pair % HALF)
    _rotate(source, source, source + HALF, c, s, pair < q_pairs, HALF)
    pair = tl.arange(0, BKV)
    inside = pair < kv_pairs
    c = tl.load(cos + angle + pair % HALF)
    s = tl.load(sin + angle + pair % HALF)
    at = token * stride_k + pair // HALF * (2 * HALF) + pair % HALF
    head = (pair // HALF).to(tl.int64)
    to = sequence.to(tl.int64) * stride_cb + head * stride_ch + position * stride_cs + pair % HALF
    _rotate(k + at, k_cache + to, k_cache + to + HALF, c, s, inside, HALF)
    tl.store(v_cache + to, tl.load(v + at, mask=inside), mask=inside)
    tl.store(v_cache + to + HALF, tl.load(v + at + HALF, mask=inside), mask=inside)


def rotary(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, start: Tensor, k_cache: Tensor, v_cache: Tensor
) -> None:
    """See :func:`ppf.fast.ops.decode.rotary`; q, k, v with unit last stride, k and v with one pitch."""
    batch = k_cache.shape[0]
    length = q.shape[0] // batch
    q_pairs, kv_pairs = q.shape[1] // 2, k.shape[1] // 2
    rotary_kernel[length, batch](
        q, k, v, cos, sin, start, k_cache, v_cache, q_pairs, kv_pairs, length, q.stride(0), k.stride(0),
        *k_cache.stride()[:3], HALF=cos.shape[1], BQ=triton.next_power_of_2(q_pairs),
        BKV=triton.next_power_of_2(kv_pairs), num_warps=4 if q_pairs <= 1024 else 8,
    )  # fmt: skip

"""Head norm and rotary embedding of a prompt's queries and keys, and the write of keys and values into the cache: one
launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(source, target0, target1, gain, epsilon, i, c, s, mask, HALF: tl.constexpr):
    """Rotate the pairs (source, source + HALF) into target0 and target1; with ``gain``, rows are heads, normalised."""
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if gain is not None:
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + epsilon)[:, None]
        a *= scale * tl.load(gain + i).to(tl.float32)
        b *= scale * tl.load(gain + HALF + i).to(tl.float32)
    tl.store(target0, (a * c - b * s).to(target0.dtype.element_ty), mask=mask)
    tl.store(target1, (b * c + a * s).to(target1.dtype.element_ty), mask=mask)


@triton.jit
def _places(pairs, HALF: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Head and place in it of the pairs of a token, and which exist: [BLOCK] one after the other, or, for LANES > 0, a
    row a head [BLOCK, LANES]."""
    if LANES > 0:
        lane = tl.arange(0, LANES)[None, :]
        head = tl.arange(0, BLOCK)[:, None]
        i = tl.minimum(lane, HALF - 1)
        inside = (head * HALF < pairs) & (lane < HALF)
    else:
        pair = tl.arange(0, BLOCK)
        head = pair // HALF
        i = pair % HALF
        inside = pair < pairs
    return head, i, inside


@triton.jit
def rotary_kernel(
    q, k, v, q_norm, k_norm, cos, sin, start, k_cache, v_cache, q_pairs, kv_pairs, length, stride_q, stride_k,
    stride_cb, stride_ch, stride_cs, epsilon,
    HALF: tl.constexpr, BQ: tl.constexpr, BKV: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One token: q rotated in place, k rotated and v as it is to position ``program_id(0)`` of the caches. Head norms
    may be None; with one, heads are rows of LANES > 0."""
    position, sequence = tl.program_id(0), tl.program_id(1)
    token = (sequence * length + position).to(tl.int64)
    angle = tl.maximum(position - tl.load(start + sequence), 0) * HALF
    head, i, inside = _places(q_pairs, HALF, BQ, LANES)
    source = q + token * stride_q + head * (2 * HALF) + i
    c = tl.load(cos + angle + i)
    s = tl.load(sin + angle + i)
    _rotate(source, source, source + HALF, q_norm, epsilon, i, c, s, inside, HALF)
    head, i, inside = _places(kv_pairs, HALF, BKV, LANES)
    c = tl.load(cos + angle + i)
    s = tl.load(sin + angle + i)
    at = token * stride_k + head * (2 * HALF) + i
    to = sequence.to(tl.int64) * stride_cb + head.to(tl.int64) * stride_ch + position * stride_cs + i
    _rotate(k + at, k_cache + to, k_cache + to + HALF, k_norm, epsilon, i, c, s, inside, HALF)
    tl.store(v_cache + to, tl.load(v + at, mask=inside), mask=inside)
    tl.store(v_cache + to + HALF, tl.load(v + at + HALF, mask=inside), mask=inside)


def rotary(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor,
    start: Tensor, k_cache: Tensor, v_cache: Tensor, epsilon: float,
) -> None:  # fmt: skip
    """See :func:`ppf.fast.ops.decode.rotary`; q, k, v with unit last stride, k and v with one pitch."""
    batch = k_cache.shape[0]
    length = q.shape[0] // batch
    half, pairs = cos.shape[1], (q.shape[1] // 2, k.shape[1] // 2)
    rows = q_norm is not None or k_norm is not None
    blocks = [triton.next_power_of_2(n // half if rows else n) for n in pairs]
    rotary_kernel[length, batch](
        q, k, v, q_norm, k_norm, cos, sin, start, k_cache, v_cache, *pairs, length, q.stride(0), k.stride(0),
        *k_cache.stride()[:3], epsilon, HALF=half, BQ=blocks[0], BKV=blocks[1],
        LANES=triton.next_power_of_2(half) if rows else 0, num_warps=4 if pairs[0] <= 1024 else 8,
    )  # fmt: skip

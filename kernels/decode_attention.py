"""Attention of one new token per sequence over a static cache, split over the sequence (flash decoding).

A program takes one kv-group of one sequence and one share of the positions; the last program of a group to finish adds
the shares up, in their order, so that no second launch is needed and the same input gives the same bits.

Where heads are normalised (RMSNorm over a head) before they are rotated, both happen here: every program has its
queries whole, and the program of the first share takes the new key, which it writes back, apart from the older ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode import Config
from .tile import multiprocessors, precision

Heads = tuple[Tensor | None, Tensor | None, Tensor, Tensor]
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _share(
    query, keys, values, stride_cs, low, high, channel, real, scale, acc, top, total,
    PRECISION: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Unnormalised attention of ``query`` [ROWS, DP] over positions [low, high), added to that of others: fp32
    [ROWS, DP], maxima, sums."""
    for first in tl.range(low, high, BS, num_stages=STAGES):
        at = first + tl.arange(0, BS)
        inside = at < high
        key = tl.load(
            keys + at[None, :] * stride_cs + channel[:, None], mask=inside[None, :] & real[:, None], other=0.0
        )
        value = tl.load(
            values + at[:, None] * stride_cs + channel[None, :], mask=inside[:, None] & real[None, :], other=0.0
        )
        score = tl.dot(query, key, input_precision=PRECISION) * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def _head(rows, gain, cos, sin, channel, inside, epsilon, D: tl.constexpr):
    """Heads at ``rows`` [R, 1] (pointers), normalised unless ``gain`` is None, then rotated: fp32 [R, DP]."""
    HALF: tl.constexpr = D // 2
    partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
    x = tl.load(rows + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(rows + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    real = channel < D
    if gain is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + epsilon)[:, None]
        x *= scale * tl.load(gain + channel, mask=real, other=0.0).to(tl.float32)[None, :]
        other *= scale * tl.load(gain + partner, mask=real, other=0.0).to(tl.float32)[None, :]
    c = tl.load(cos + channel % HALF, mask=real, other=0.0)
    s = tl.load(sin + channel % HALF, mask=real, other=0.0)
    return x * c[None, :] + other * tl.where(channel < HALF, -s, s)[None, :]


@triton.jit
def attention_kernel(
    q, k_cache, v_cache, start, position, y, partial, statistics, arrived, q_norm, k_norm, cos, sin,
    stride_q, stride_y, stride_cb, stride_ch, stride_cs, scale, epsilon,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, BS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y [tokens, heads·D] of q [tokens, heads·D]; positions [start[token], position] of the caches are seen, of them
    the last WINDOW if that is not 0. HEADS: q and the key at ``position`` are still to be normalised and rotated."""
    split, group, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, channel = tl.arange(0, ROWS), tl.arange(0, DP)
    real = channel < D
    inside = (row < GROUP)[:, None] & real[None, :]
    at = (group * GROUP + row)[:, None] * D + channel[None, :]
    last = tl.load(position) + 1
    begin = tl.minimum(tl.load(start + token), last - 1)
    offset = token.to(tl.int64) * stride_cb + group.to(tl.int64) * stride_ch
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    if HEADS:
        last -= 1
        angle = (last - begin) * (D // 2)
        rows = q + token * stride_q + (group * GROUP + row)[:, None] * D
        query = _head(rows, q_norm, cos + angle, sin + angle, channel, inside, epsilon, D).to(q.dtype.element_ty)
        own = tl.where(split == 0, real, False)[None, :]
        newest = offset + last * stride_cs
        key = _head(k_cache + newest, k_norm, cos + angle, sin + angle, channel, own, epsilon, D)
        key = key.to(k_cache.dtype.element_ty)
        score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * (scale * LOG2E)
        top = tl.where(split == 0, score, top)
        total += tl.where(split == 0, 1.0, 0.0)
        acc += tl.load(v_cache + newest + channel[None, :], mask=own, other=0.0).to(tl.float32)
    else:
        query = tl.load(q + token * stride_q + at, mask=inside, other=0.0)
    if WINDOW > 0:
        begin = tl.maximum(begin, tl.load(position) + 1 - WINDOW)
    chunk = tl.cdiv(tl.cdiv(last - begin, SPLITS), BS) * BS
    low = begin + split * chunk
    acc, top, total = _share(
        query, k_cache + offset, v_cache + offset, stride_cs, low, tl.minimum(low + chunk, last), channel, real,
        scale * LOG2E, acc, top, total, PRECISION, BS, STAGES,
    )  # fmt: skip
    if HEADS:
        tl.debug_barrier()  # others may still be reading what this overwrites
        tl.store(k_cache + newest + channel[None, :], key, mask=own)
    if SPLITS > 1:
        place = token * tl.num_programs(1) + group
        share = (place * SPLITS + split) * ROWS + row
        tl.store(partial + share[:, None] * DP + channel[None, :], acc)
        tl.store(statistics + share * 2, top)
        tl.store(statistics + share * 2 + 1, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + place, 1) == SPLITS - 1:
            acc, top, total = _merge(partial, statistics, place, row, channel, SPLITS, ROWS, DP)
            tl.store(y + token * stride_y + at, (acc / total[:, None]).to(y.dtype.element_ty), mask=inside)
            tl.store(arrived + place, 0)
    else:
        tl.store(y + token * stride_y + at, (acc / total[:, None]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _merge(partial, statistics, place, row, channel, SPLITS: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr):
    """All shares of a group as one, in the order of the positions."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for split in tl.static_range(SPLITS):
        share = (place * SPLITS + split) * ROWS + row
        # .cg: other multiprocessors wrote these.
        theirs = tl.load(statistics + share * 2, cache_modifier=".cg")
        count = tl.load(statistics + share * 2 + 1, cache_modifier=".cg")
        part = tl.load(partial + share[:, None] * DP + channel[None, :], cache_modifier=".cg")
        higher = tl.maximum(top, theirs)
        mine, other = tl.exp2(top - higher), tl.exp2(theirs - higher)
        total = total * mine + count * other
        acc = acc * mine[:, None] + part * other[:, None]
        top = higher
    return acc, top, total


def splits(tokens: int, groups: int, positions: int, device: torch.device) -> int:
    """Shares that fill the multiprocessors twice, each of at least 256 of ``positions``; a power of two up to 32."""
    wanted = 2 * multiprocessors(device) // (tokens * groups)
    wanted = max(1, min(32, wanted, positions // 256))
    return 1 << (wanted.bit_length() - 1)


def workspace(tokens: int, groups: int, group: int, head_dim: int, shares: int, device: torch.device) -> list[Tensor]:
    """Partial sums, their maxima and totals (fp32), and the zeroed arrival counters (int32) of an attention call."""
    rows, dp = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(head_dim))
    places = tokens * groups
    return [
        torch.empty(places * shares * rows * dp, dtype=torch.float32, device=device),
        torch.empty(places * shares * rows * 2, dtype=torch.float32, device=device),
        torch.zeros(places, dtype=torch.int32, device=device),
    ]


def attention_config(shares: int, row_bytes: int) -> Config:
    """Tile of one program for keys of ``row_bytes``: few large steps where the sequence is short, a deeper pipeline
    where it is long, and half of either where a key is longer than 128 numbers of 16 bits."""
    if row_bytes > 256:
        return {"BS": 32, "STAGES": 2, "num_warps": 4}
    if shares <= 2:
        return {"BS": 128, "STAGES": 2, "num_warps": 4}
    return {"BS": 64, "STAGES": 3, "num_warps": 4}


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, position: Tensor, y: Tensor, space: list[Tensor],
    scale: float, shares: int, window: int = 0, heads: Heads | None = None, epsilon: float = 0.0, pdl: bool = False,
    config: Config | None = None,
) -> None:  # fmt: skip
    """See :func:`ppf.fast.ops.decode.attention`. ``space`` as :func:`workspace` makes it, for the same ``shares``.
    ``heads``: q_norm, k_norm, cos and sin, if queries and the newest key are as the products left them."""
    tokens, groups, _, head_dim = k_cache.shape
    group = q.shape[1] // (groups * head_dim)
    c = dict(config or attention_config(shares, head_dim * q.element_size()))
    attention_kernel[shares, groups, tokens](
        q, k_cache, v_cache, start, position, y, *space, *(heads or (None,) * 4), q.stride(0), y.stride(0),
        *k_cache.stride()[:3], scale, epsilon, GROUP=group, D=head_dim, DP=max(16, triton.next_power_of_2(head_dim)),
        ROWS=max(16, triton.next_power_of_2(group)), SPLITS=shares, WINDOW=window, HEADS=heads is not None,
        PRECISION=precision(q.dtype), PDL=pdl, **c, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip

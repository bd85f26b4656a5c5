"""The end of a decode step in one launch: the likeliest token of every sequence, whether it has ended, the position."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def select_kernel(logits, eos, pad, finished, token, position, width, ENDS: tl.constexpr, BLOCK: tl.constexpr):
    """One sequence: ``pad`` if it has ended, else argmax (the first of equals); ended if that is one of ``eos``."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, width, BLOCK, num_stages=3):
        at = first + lane
        value = tl.load(logits + row.to(tl.int64) * width + at, mask=at < width, other=float("-inf"))
        higher = value > best
        best = tl.where(higher, value, best)
        where = tl.where(higher, at, where)
    top = tl.max(best, 0)
    chosen = tl.min(tl.where(best == top, where, width - 1), 0).to(tl.int64)
    ended = tl.load(finished + row) != 0
    chosen = tl.where(ended, tl.load(pad), chosen)
    ends = tl.load(eos + tl.arange(0, ENDS)) == chosen
    tl.store(token + row, chosen)
    tl.store(finished + row, (ended | (tl.sum(ends.to(tl.int32), 0) > 0)).to(tl.int8))
    if row == 0:
        tl.store(position, tl.load(position) + 1)


def select(logits: Tensor, eos: Tensor, pad: Tensor, finished: Tensor, token: Tensor, position: Tensor) -> None:
    """See :func:`ppf.fast.ops.decode.select`; contiguous logits, a power of two of eos ids."""
    select_kernel[len(logits),](
        logits, eos, pad, finished, token, position, logits.shape[1], ENDS=len(eos), BLOCK=4096, num_warps=16
    )

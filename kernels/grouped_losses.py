"""The head and the token losses of many states in one launch: logits never leave the multiprocessor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import descriptor, precision


@triton.jit
def losses_kernel(
    x_tiles, head_tiles, x, head, targets, y, tokens, length, vocabulary, scale, cap,
    CAPPED: tl.constexpr, RAGGED: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """-log softmax(logits)[target] of BM tokens; 0 for the last token of each sequence."""
    first = tl.program_id(1).to(tl.int64) * tokens
    start_m = tl.program_id(0) * BM
    m = start_m + tl.arange(0, BM)
    counted = (m < tokens) & (m % length != length - 1)
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in range(0, vocabulary, BN):
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, DEPTH, BK):
            a = x_tiles.load([(first + start_m).to(tl.int32), k])
            b = head_tiles.load([start, k])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        logits = acc * scale
        if CAPPED:
            logits = _capped(logits, cap)
        logits *= 1.4426950408889634
        if RAGGED:
            logits = tl.where((start + tl.arange(0, BN) < vocabulary)[None, :], logits, float("-inf"))
        new = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp2(best - new) + tl.sum(tl.exp2(logits - new[:, None]), 1)
        best = new
    target = tl.load(targets + m, mask=counted, other=0)
    logit = tl.zeros([BM], tl.float32)
    for start in range(0, DEPTH, BK):
        k = start + tl.arange(0, BK)
        inside = counted[:, None] & (k < DEPTH)[None, :]
        rows = tl.load(x + (first + m)[:, None] * DEPTH + k[None, :], mask=inside, other=0.0).to(tl.float32)
        chosen = tl.load(head + target[:, None] * DEPTH + k[None, :], mask=inside, other=0.0).to(tl.float32)
        logit += tl.sum(rows * chosen, 1)
    logit *= scale
    if CAPPED:
        logit = _capped(logit, cap)
    loss = (best + tl.log2(total)) * 0.6931471805599453 - logit
    tl.store(y + first + m, tl.where(counted, loss, 0.0), mask=m < tokens)


@triton.jit
def _capped(logits, cap):
    """cap · tanh(logits / cap)."""
    return cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / cap)))


LOSSES = {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3}


def losses(
    x: Tensor, head: Tensor, targets: Tensor, length: int, scale: float, cap: float | None,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """Normalised x [D, N, H] and the next token of every token int64 [N] -> losses fp32 [D, N]."""
    states, tokens, depth = x.shape
    c = config or LOSSES
    y = torch.empty(states, tokens, dtype=torch.float32, device=x.device)
    losses_kernel[triton.cdiv(tokens, c["BM"]), states](
        descriptor(x.view(-1, depth), [c["BM"], c["BK"]]), descriptor(head, [c["BN"], c["BK"]]), x, head, targets, y,
        tokens, length, len(head), 1 / scale, cap or 1.0, CAPPED=cap is not None, RAGGED=len(head) % c["BN"] != 0,
        DEPTH=depth, PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return y

"""Elementwise steps of a Llama for large models, each one read and one write: rotation, silu·mul, token losses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import silu_mul as silu_mul_values


@triton.jit
def rotate_kernel(x, cos, sin, y, heads, length, stride_b, stride_t, D: tl.constexpr, HALF: tl.constexpr):
    """One token: all heads, each [d] turned by its position's angles."""
    token = tl.program_id(0)
    position = token % length
    rows = x + (token // length).to(tl.int64) * stride_b + position.to(tl.int64) * stride_t
    lane = tl.arange(0, HALF)
    inside = lane < D // 2
    c0 = tl.load(cos + position * D + lane, mask=inside).to(tl.float32)
    s0 = tl.load(sin + position * D + lane, mask=inside).to(tl.float32)
    c1 = tl.load(cos + position * D + D // 2 + lane, mask=inside).to(tl.float32)
    s1 = tl.load(sin + position * D + D // 2 + lane, mask=inside).to(tl.float32)
    out = y + token.to(tl.int64) * heads * D
    for head in range(heads):
        at = head * D + lane
        first = tl.load(rows + at, mask=inside).to(tl.float32)
        second = tl.load(rows + at + D // 2, mask=inside).to(tl.float32)
        tl.store(out + at, (first * c0 - second * s0).to(y.dtype.element_ty), mask=inside)
        tl.store(out + at + D // 2, (second * c1 + first * s1).to(y.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(gate, up, y, width, tiles, stride_gate, stride_up, BLOCK: tl.constexpr):
    """One of the ``tiles`` blocks of a row; y is contiguous."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * stride_gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + row * stride_up + at, mask=inside).to(tl.float32)
    tl.store(y + row * width + at, silu_mul_values(g, u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def losses_kernel(logits, targets, y, vocabulary, BLOCK: tl.constexpr):
    """-log softmax(logits row)[target] of one row, streaming over the vocabulary."""
    row = tl.program_id(0)
    first = logits + row.to(tl.int64) * vocabulary
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(first + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        new = tl.maximum(best, value)
        # A lane that has seen nothing yet holds -inf, and -inf less -inf is not a number.
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(best - safe) + tl.exp(value - safe)
        best = new
    highest = tl.max(best, 0)
    sum_all = tl.sum(total * tl.exp(best - highest), 0)
    target = tl.load(targets + row)
    tl.store(y + row, highest + tl.log(sum_all) - tl.load(first + target).to(tl.float32))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, heads, d], unit stride over the last two dimensions -> the same, rotated, contiguous."""
    batch, length, heads, d = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotate_kernel[batch * length,](
        x, cos, sin, y, heads, length, x.stride(0), x.stride(1), D=d, HALF=triton.next_power_of_2(d // 2), num_warps=4
    )
    return y


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of one shape and at least one element: contiguous, or matrices with unit last stride."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.is_contiguous() and up.is_contiguous():  # one long row
        rows, width, strides, block, warps = 1, y.numel(), (0, 0), 4096, 8
    else:
        rows, width, strides = *y.shape, (gate.stride(0), up.stride(0))
        block, warps = min(1024, triton.next_power_of_2(width)), 4
    tiles = triton.cdiv(width, block)
    silu_mul_kernel[rows * tiles,](gate, up, y, width, tiles, *strides, BLOCK=block, num_warps=warps)
    return y


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Contiguous logits [rows, vocabulary], int64 targets [rows] -> fp32 [rows]."""
    y = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    losses_kernel[len(logits),](logits, targets, y, logits.shape[1], BLOCK=4096, num_warps=8)
    return y

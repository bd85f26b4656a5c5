"""Products of a decode step: a few tokens (1 to 64), where reading the weights once is the whole cost.

A step of a layer is five launches: norm + q, k, v + rotary embedding (``decode_qkv.py``), attention
(``decode_attention.py``), o + residual, norm + gate, up and silu, down + residual; the last three are ``linear`` here.

For one token the norm costs no launch: x·gain is contracted as it is read, its squares are summed on the way, and the
sum's inverse root scales the result. For more tokens it is a small kernel before the product (inside, the matrix units
would wait for it: 83 instead of 38 us at 16 tokens). Every program is resident at once and owns whole weight rows, so
nothing is split and the same input gives the same bits. With PDL (programmatic dependent launch) a kernel starts while
the one before drains, asks the L2 cache for its first weights, and only then waits for its input.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .tile import precision, silu_mul

MAX_TOKENS = 64
Config = dict[str, int]


@triton.jit
def fetch(rows, LINES: tl.constexpr):
    """Ask the L2 cache for the first LINES cache lines (128 bytes) of the weight rows ``rows`` [BN, 1] (pointers)."""
    line = tl.arange(0, LINES)
    address = rows.to(tl.int64) + (line * 128)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def begin(row0, row1, PAIR: tl.constexpr, PDL: tl.constexpr, LINES: tl.constexpr):
    """Let the next kernel start, ask for our own weights, wait for the kernel before."""
    if PDL:
        gdc_launch_dependents()
        if LINES > 0:
            fetch(row0, LINES)
            if PAIR:
                fetch(row1, LINES)
        gdc_wait()


@triton.jit
def contract(
    x, gain, row0, row1, tokens, depth, stride_x, epsilon,
    NORM: tl.constexpr, PAIR: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products of the weight rows at ``row0``, ``row1`` [BN, 1] (pointers) with the tokens: two fp32 [BN, T].

    NORM (one token only) contracts x·gain / rms(x) instead of x. The second product is computed only if PAIR.
    """
    token = tl.arange(0, T)
    lane = tl.arange(0, BK)
    acc0 = tl.zeros([BN, BK], tl.float32) if T == 1 else tl.zeros([BN, T], tl.float32)
    acc1 = acc0
    squares = tl.zeros([BK], tl.float32)
    for start in tl.range(0, depth, BK, num_stages=STAGES):
        k = start + lane
        inside = k < depth
        tile0 = tl.load(row0 + k[None, :]) if EVEN else tl.load(row0 + k[None, :], mask=inside[None, :], other=0.0)
        if PAIR:
            tile1 = tl.load(row1 + k[None, :]) if EVEN else tl.load(row1 + k[None, :], mask=inside[None, :], other=0.0)
        if T == 1:
            one = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                squares += one * one
                one *= tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
            acc0 += tile0.to(tl.float32) * one[None, :]
            if PAIR:
                acc1 += tile1.to(tl.float32) * one[None, :]
        else:
            wanted = (token < tokens)[None, :] & inside[:, None]
            many = tl.load(x + token[None, :] * stride_x + k[:, None], mask=wanted, other=0.0)
            acc0 = tl.dot(tile0, many, acc0, input_precision=PRECISION)
            if PAIR:
                acc1 = tl.dot(tile1, many, acc1, input_precision=PRECISION)
    if T == 1:
        acc0 = tl.sum(acc0, 1)[:, None]
        if PAIR:
            acc1 = tl.sum(acc1, 1)[:, None]
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / depth + epsilon)
        acc0 *= scale
        if PAIR:
            acc1 *= scale
    return acc0, acc1


@triton.jit
def linear_kernel(
    x, gain, w0, w1, bias0, bias1, y, width, tokens, depth, stride_x, stride_w0, stride_w1, stride_y, epsilon,
    NORM: tl.constexpr, PAIR: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, LINES: tl.constexpr,
    T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs [BN·program, BN·program + BN) of y [tokens, width]; ADD adds to what y holds, PAIR is silu(gate)·up.

    Biases [width] may be None. They are loaded before the products, which hide the time that takes.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(n, width - 1)[:, None].to(tl.int64)
    row0 = w0 + rows * stride_w0
    row1 = w1 + rows * stride_w1
    added0 = _bias(bias0, n, width)
    added1 = _bias(bias1, n, width)
    begin(row0, row1, PAIR, PDL, LINES)
    acc0, acc1 = contract(
        x, gain, row0, row1, tokens, depth, stride_x, epsilon, NORM, PAIR, EVEN, PRECISION, T, BN, BK, STAGES
    )
    if bias0 is not None:
        acc0 += added0[:, None]
    if PAIR:
        if bias1 is not None:
            acc1 += added1[:, None]
        acc0 = silu_mul(acc0, acc1)
    token = tl.arange(0, T)
    inside = (n < width)[:, None] & (token < tokens)[None, :]
    at = y + token[None, :] * stride_y + n[:, None]
    if ADD:
        acc0 += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, acc0.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _bias(bias, n, width):
    """Entries ``n`` of a bias in fp32; 0.0 for None, which nobody reads."""
    value = 0.0
    if bias is not None:
        value = tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)
    return value


@triton.jit
def norm_kernel(x, gain, y, depth, stride_x, stride_y, epsilon, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """One token: y = x·gain / rms(x)."""
    if PDL:
        gdc_launch_dependents()
    k = tl.arange(0, BLOCK)
    inside = k < depth
    scale = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    value = tl.load(x + tl.program_id(0) * stride_x + k, mask=inside, other=0.0).to(tl.float32)
    scale *= tl.rsqrt(tl.sum(value * value, 0) / depth + epsilon)
    tl.store(y + tl.program_id(0) * stride_y + k, (value * scale).to(y.dtype.element_ty), mask=inside)


def norm(x: Tensor, gain: Tensor, epsilon: float, pdl: bool = False) -> Tensor:
    """x·gain / rms(x) of x [t, K], gain [K]."""
    y = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    norm_kernel[len(x),](
        x, gain, y, x.shape[1], x.stride(0), y.stride(0), epsilon, PDL=pdl, BLOCK=block, num_warps=8,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return y


def padded(tokens: int) -> int:
    """Width of the token tile: 1, or a power of two from 16 to 64, as the matrix units want it."""
    return 1 if tokens == 1 else max(16, triton.next_power_of_2(tokens))


def linear_config(tokens: int, width: int, depth: int, pair: bool) -> Config:
    """Tile of one program; measured on an H100 (dev/LOG.md)."""
    t = padded(tokens)
    if t == 1:
        if not pair and width <= 4096 and 4096 < depth <= 8192:
            return {"T": 1, "BN": 16, "BK": 512, "STAGES": 3, "num_warps": 8, "LINES": 8}
        return {"T": 1, "BN": 4, "BK": 1024, "STAGES": 3, "num_warps": 4, "LINES": 8}
    return {"T": t, "BN": 64, "BK": 128, "STAGES": 4 if pair else 6, "num_warps": 4, "LINES": 8}


def linear(
    x: Tensor, weights: tuple[Tensor, ...], y: Tensor, gain: Tensor | None = None, epsilon: float = 0.0,
    add: bool = False, biases: tuple[Tensor | None, ...] = (None,), pdl: bool = False, config: Config | None = None,
) -> None:  # fmt: skip
    """y [t, width] = (or, ``add``, +=) x [t, K] · weightᵀ + bias; of two weights (gate, up): silu(gate)·up.

    ``gain`` [K], for one token only: x is normalised to x·gain/rms(x) first. ``biases`` [width] are the weights', or
    None. 1 <= t <= 64; last strides are 1.
    """
    tokens, depth = x.shape
    width = weights[0].shape[0]
    c = dict(config or linear_config(tokens, width, depth, len(weights) == 2))
    w0, w1 = weights[0], weights[-1]
    linear_kernel[triton.cdiv(width, c["BN"]),](
        x, x if gain is None else gain, w0, w1, biases[0], biases[-1], y, width, tokens, depth, x.stride(0),
        w0.stride(0), w1.stride(0), y.stride(0), epsilon, NORM=gain is not None, PAIR=len(weights) == 2, ADD=add,
        EVEN=depth % c["BK"] == 0, PRECISION=precision(x.dtype), PDL=pdl, **launch(c, pdl, depth, x),
    )  # fmt: skip


def launch(config: Config, pdl: bool, depth: int, x: Tensor) -> dict[str, int | bool]:
    """Launch arguments of a tile: no more lines ahead than a weight row has, half the stages where memory is short."""
    lines = min(config.get("LINES", 0), depth * x.element_size() // 128)
    lines = 1 << (lines.bit_length() - 1) if pdl and lines else 0
    fits = x.element_size() == 2 and large_shared_memory(x.device)
    stages = config["STAGES"] if fits else max(2, config["STAGES"] // 2)
    chosen = {**config, "LINES": lines, "STAGES": stages}
    return {**chosen, "launch_pdl": True} if pdl else chosen


@lru_cache
def large_shared_memory(device: torch.device) -> bool:
    """The 227 KB that data-centre GPUs have from Hopper on; the tiles were chosen for them. The interpreter has all."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def pdl_available(device: torch.device, tokens: int) -> bool:
    """Hopper and later can start a kernel while the one before it drains; it pays for one token (dev/LOG.md)."""
    return tokens == 1 and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9

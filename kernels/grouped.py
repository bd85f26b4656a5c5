"""Grouped masked GEMMs: the products of many states of a wave in one launch, each state stopping at its own width.

A state's tokens meet a prefix of the rows of one weight (q, k and v; gate and up), or the first columns of its own
output projection (o, down). One list of tiles goes over all states; the tiles of a block of tokens are neighbours, so
that programs which run together share the tokens through L2, where the weights are anyway. Small tables on the device
say where each state's tiles start. Every tile sums in one order, whatever else the launch has: a state's bits do not
depend on its company.

Rows of q and k are interleaved within a head (0, d/2, 1, d/2+1, …), those of gate and up within the FFN: what the
epilogue combines lies in neighbouring columns of one product, which one thread holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import descriptor, multiprocessors, precision

STEP = 64
"""Columns of an output product's step: what feeds it is zero from a state's width to the next multiple of this."""

# More states than this need another compilation.
_STATES = 128
_NEVER = 2**31 - 1


@triton.jit
def group_of(tile, starts, GROUPS: tl.constexpr):
    """The group a tile belongs to: ``starts`` holds GROUPS ascending first tiles, of which the empty ones lose."""
    lane = tl.arange(0, GROUPS)
    return tl.sum((tl.load(starts + lane) <= tile).to(tl.int32)) - 1


@triton.jit
def _normed_heads(acc, weight, start, epsilon, GROUP_ROWS: tl.constexpr, ROTATED: tl.constexpr, D: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Columns [start, start + BN) of q, k and v fp32 [BM, BN], whole heads: every head of q and k over its root mean
    square. ``weight`` fp32 [GROUP_ROWS] has ones for v."""
    heads = tl.reshape(acc, [BM, BN // D, D])
    within = (start + D * tl.arange(0, BN // D)) % GROUP_ROWS
    scale = 1.0 / tl.sqrt(tl.sum(heads * heads, 2) / D + epsilon)
    scale = tl.where((within < ROTATED)[None, :], scale, 1.0)
    w = tl.load(weight + (start + tl.arange(0, BN)) % GROUP_ROWS)
    return tl.reshape(heads * scale[:, :, None], [BM, BN]) * w[None, :]


@triton.jit
def _store_rotated(acc, rows, inside, angles, cos, sin, start, kept, GROUP_ROWS: tl.constexpr, ROTATED: tl.constexpr,
                   D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Columns [start, start + BN) of q, k and v fp32 [BM, BN], those of q and k turned by their positions' angles."""
    pair = start // 2 + tl.arange(0, BN // 2)
    turned = (pair % (GROUP_ROWS // 2) < ROTATED // 2)[None, :]
    c = tl.load(cos + angles + (pair % (D // 2))[None, :], mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + angles + (pair % (D // 2))[None, :], mask=turned, other=0.0).to(tl.float32)
    # Rounded first, as where product and rotation are two steps: half as much to move between threads.
    first, second = tl.split(tl.reshape(acc.to(rows.dtype.element_ty), [BM, BN // 2, 2]))
    first, second = first.to(tl.float32), second.to(tl.float32)
    out = tl.reshape(tl.join(first * c - second * s, second * c + first * s), [BM, BN])
    n = start + tl.arange(0, BN)
    tl.store(rows + n[None, :], out.to(rows.dtype.element_ty), mask=inside & (n < kept)[None, :])


@triton.jit(do_not_specialize=["tiles"])
def heads_kernel(
    x_tiles, w_tiles, bias, head_norm, cos, sin, tables, y, tiles, tokens, length, pitch, epsilon,
    DEPTH: tl.constexpr, GROUP_ROWS: tl.constexpr, ROTATED: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FLATTEN: tl.constexpr = False,
):  # fmt: skip
    """q, k and v of every state's kept kv-groups: biases, norms of the heads of q and k, and those rotated."""
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        state = group_of(tile, tables, GROUPS)
        local = tile - tl.load(tables + state)
        kept = tl.multiple_of(tl.load(tables + GROUPS + state), 16)  # whole heads: masks by 16 bytes, not by 2
        tiles_n = tl.cdiv(kept, BN)
        start_m = local // tiles_n * BM
        start_n = local % tiles_n * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, DEPTH, BK):
            a = x_tiles.load([state * tokens + start_m, k])
            b = w_tiles.load([start_n, k])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        m = start_m + tl.arange(0, BM)
        if bias is not None:
            n = start_n + tl.arange(0, BN)
            acc += tl.load(bias + n, mask=n < kept, other=0.0).to(tl.float32)[None, :]
        if head_norm is not None:
            acc = _normed_heads(acc, head_norm, start_n, epsilon, GROUP_ROWS, ROTATED, D, BM, BN)
        rows = y + (state.to(tl.int64) * tokens + m)[:, None] * pitch
        angles = (m % length)[:, None] * (D // 2)
        inside = (m < tokens)[:, None]
        _store_rotated(acc, rows, inside, angles, cos, sin, start_n, kept, GROUP_ROWS, ROTATED, D, BM, BN)


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    """In fp32. The tanh form of gelu, x · (1 + tanh u) / 2, is x · sigmoid(2u)."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        return gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))


@triton.jit
def _store_hidden(acc, bias, rows, inside, start, width, padded, ACTIVATION: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr):  # fmt: skip
    """Rows [start, start + BN) of gate and up in turn, fp32 [BM, BN]: half as many columns of activation(gate) · up."""
    if bias is not None:
        row = start + tl.arange(0, BN)
        acc += tl.load(bias + row, mask=row < 2 * width, other=0.0).to(tl.float32)[None, :]
    gate, up = tl.split(tl.reshape(acc, [BM, BN // 2, 2]))
    n = start // 2 + tl.arange(0, BN // 2)
    out = tl.where((n < width)[None, :], _activated(gate, ACTIVATION) * up, 0.0)
    tl.store(rows + n[None, :], out.to(rows.dtype.element_ty), mask=inside & (n < padded)[None, :])


@triton.jit(do_not_specialize=["tiles"])
def hidden_kernel(
    x_tiles, w_tiles, bias, tables, y, tiles, tokens, pitch,
    DEPTH: tl.constexpr, ACTIVATION: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FLATTEN: tl.constexpr = False,
):  # fmt: skip
    """activation(gate) · up of every state's channels, zero from there to the next multiple of ``STEP``."""
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        state = group_of(tile, tables, GROUPS)
        local = tile - tl.load(tables + state)
        width = tl.load(tables + GROUPS + state)
        padded = tl.cdiv(width, STEP) * STEP
        tiles_n = tl.cdiv(2 * padded, BN)
        start_m = local // tiles_n * BM
        start_n = local % tiles_n * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, DEPTH, BK):
            a = x_tiles.load([state * tokens + start_m, k])
            b = w_tiles.load([start_n, k])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        m = start_m + tl.arange(0, BM)
        rows, inside = y + (state.to(tl.int64) * tokens + m)[:, None] * pitch, (m < tokens)[:, None]
        _store_hidden(acc, bias, rows, inside, start_n, width, padded, ACTIVATION, BM, BN)


@triton.jit
def _store_outputs(acc, bias, x, source, y, target, m, n, tokens, width, scale, OUTPUTS: tl.constexpr):
    """``acc`` fp32 at rows m and columns n of y's state ``target``."""
    inside = (m < tokens)[:, None] & (n < OUTPUTS)[None, :]
    if bias is not None:
        # A sub-layer that is absent gives nothing, its output's bias neither.
        added = tl.load(bias + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)
        acc += tl.where(width > 0, added, 0.0)[None, :]
    if x is not None:
        residual = tl.load(x + (source * tokens + m)[:, None] * OUTPUTS + n[None, :], mask=inside, other=0.0)
        acc = residual.to(tl.float32) + acc * scale
    tl.store(y + (target * tokens + m)[:, None] * OUTPUTS + n[None, :], acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tiles"])
def outputs_kernel(
    inner_tiles, w_tiles, bias, x, tables, y, tiles, tokens, scale,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """All outputs of every job over its first columns; with ``x`` the sum of that and ``scale`` times them."""
    TILES_N: tl.constexpr = (OUTPUTS + BN - 1) // BN
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tiles_job = tl.cdiv(tokens, BM) * TILES_N
        job = tables + tile // tiles_job
        inner = tl.load(job)
        width = tl.load(job + GROUPS)
        row = tl.load(job + 2 * GROUPS) * OUTPUTS
        source = tl.load(job + 3 * GROUPS).to(tl.int64)
        target = tl.load(job + 4 * GROUPS).to(tl.int64)
        local = tile % tiles_job
        start_m = local // TILES_N * BM
        start_n = local % TILES_N * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, width, BK):
            a = inner_tiles.load([inner * tokens + start_m, k])
            b = w_tiles.load([row + start_n, k])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        m = start_m + tl.arange(0, BM)
        n = start_n + tl.arange(0, BN)
        _store_outputs(acc, bias, x, source, y, target, m, n, tokens, width, scale, OUTPUTS)


def tables(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int32 [rows, GROUPS] on the device, padded with a number that no tile reaches; one copy that does not wait."""
    size = max(_STATES, triton.next_power_of_2(len(rows[0])))
    table = torch.tensor([[*row, *(_NEVER,) * (size - len(row))] for row in rows], dtype=torch.int32)
    # Pinned memory goes back to its allocator, which keeps it until the copy is done.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def starts(counts: Sequence[int]) -> tuple[list[int], int]:
    """The first tile of every group, given its number of tiles; and the number of all tiles."""
    found, total = [], 0
    for count in counts:
        found.append(total)
        total += count
    return found, total


def programs(tiles: int, per_multiprocessor: int, device: torch.device) -> tuple[int]:
    """How many to launch: so many on every multiprocessor, each walking over tiles, or (0) one a tile."""
    return (min(tiles, per_multiprocessor * multiprocessors(device)) if per_multiprocessor else tiles,)


# Measured on an H100 at hidden sizes 576 and 896, 16 states of 32,768 tokens: dev/LOG.md. Two programs on a
# multiprocessor: one computes while the other begins or ends; or one with larger tiles, which L2 feeds more easily.
HEADS = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3, "programs": 2, "FLATTEN": True}
# A head that is normalised lies within one tile.
WIDE_HEADS = HEADS | {"BN": 256, "num_warps": 8, "programs": 0, "FLATTEN": False}
HIDDEN = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3, "programs": 2, "FLATTEN": True}
OUTPUTS = {"BM": 128, "BN": 128, "BK": STEP, "num_warps": 4, "num_stages": 3, "programs": 2}
# Where there are so many channels, a tile of which a part is cut off is a small share.
_WIDE_CHANNELS = 2048
WIDE_HIDDEN = {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 4, "programs": 1}


def heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, head_norm: Tensor | None, cos: Tensor, sin: Tensor,
    rows: Sequence[int], length: int, group_rows: int, epsilon: float, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [E, N, H] -> q, k and v [E, N, max(rows)]; undefined past each state's rows."""
    states, tokens, depth = x.shape
    d = 2 * cos.shape[-1]
    c = dict(config or (WIDE_HEADS if head_norm is not None and d > HEADS["BN"] else HEADS))
    y = x.new_empty(states, tokens, max(rows))
    first, tiles = starts([triton.cdiv(tokens, c["BM"]) * triton.cdiv(row, c["BN"]) for row in rows])
    table = tables([first, rows], x.device)
    heads_kernel[programs(tiles, c.pop("programs"), x.device)](
        descriptor(x.view(-1, depth), [c["BM"], c["BK"]]), descriptor(weight, [c["BN"], c["BK"]]), bias, head_norm,
        cos, sin, table, y, tiles, tokens, length, y.shape[2], epsilon, DEPTH=depth, GROUP_ROWS=group_rows,
        ROTATED=group_rows - d, D=d, GROUPS=table.shape[1], PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return y


def hidden(
    x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int], activation: str,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [E, N, H] -> [E, N, W], W = max(widths) rounded up to ``STEP``; undefined past each state's last step."""
    states, tokens, depth = x.shape
    c = dict(config or (HIDDEN if len(weight) < 2 * _WIDE_CHANNELS else WIDE_HIDDEN))
    padded = [triton.cdiv(width, STEP) * STEP for width in widths]
    y = x.new_empty(states, tokens, max(padded))
    first, tiles = starts([triton.cdiv(tokens, c["BM"]) * triton.cdiv(2 * width, c["BN"]) for width in padded])
    table = tables([first, widths], x.device)
    hidden_kernel[programs(tiles, c.pop("programs"), x.device)](
        descriptor(x.view(-1, depth), [c["BM"], c["BK"]]), descriptor(weight, [c["BN"], c["BK"]]), bias, table, y,
        tiles, tokens, y.shape[2], DEPTH=depth, ACTIVATION=activation, STEP=STEP, GROUPS=table.shape[1],
        PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return y


def outputs(
    y: Tensor, x: Tensor | None, inner: Tensor, weights: Tensor, bias: Tensor | None, jobs: Sequence[Sequence[int]],
    scale: float, config: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Write y [D, N, H]; ``jobs`` are lists over jobs: state of ``inner`` [E, N, C], width, weight of ``weights``
    [L, H, C'], state of ``x`` [S, N, H], state of y. The widest go first."""
    tokens, rows = inner.shape[1], weights.shape[1]
    c = dict(config or OUTPUTS)
    order = sorted(range(len(jobs[0])), key=lambda job: -jobs[1][job])
    table = tables([[values[job] for job in order] for values in jobs], y.device)
    tiles = len(order) * triton.cdiv(tokens, c["BM"]) * triton.cdiv(rows, c["BN"])
    outputs_kernel[programs(tiles, c.pop("programs"), y.device)](
        descriptor(inner.view(-1, inner.shape[2]), [c["BM"], c["BK"]]),
        descriptor(weights.view(-1, weights.shape[2]), [c["BN"], c["BK"]]), bias, x, table, y, tiles, tokens, scale,
        OUTPUTS=rows, GROUPS=table.shape[1], PRECISION=precision(y.dtype), **c,
    )  # fmt: skip

"""P policies in one launch: every group multiplies its own tokens with its own prefix of the weights.

A persistent kernel walks one list of tiles over all groups; the tiles of a group are ordered so that the programs that
run together share weight rows and tokens through L2. Widths may be anything (multiples of 64 skip the tail step); a
table on the device says where each group's tiles start. Weights come as one matrix for all groups, stacked
[P, outputs, K], or as P pointers (refitted down and o).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import descriptor, multiprocessors, precision, silu_mul


@triton.jit
def _group(tile, starts, GROUPS: tl.constexpr):
    """The group a tile belongs to: ``starts`` holds GROUPS ascending first tiles."""
    lane = tl.arange(0, GROUPS)
    return tl.sum((tl.load(starts + lane) <= tile).to(tl.int32)) - 1


@triton.jit
def gate_up_kernel(
    x_tiles, gate_tiles, up_tiles, starts, widths, h, tiles, tokens, depth, stride_h_group, stride_h,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """silu·mul of every group's prefix, zero from there to the next multiple of 64 (the down kernel's step)."""
    tiles_m = tl.cdiv(tokens, BM)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        group = _group(tile, starts, GROUPS)
        local = tile - tl.load(starts + group)
        width = tl.load(widths + group)
        tile_m = local % tiles_m
        tile_n = local // tiles_m
        acc_gate = tl.zeros([BM, BN], tl.float32)
        acc_up = tl.zeros([BM, BN], tl.float32)
        for start in range(0, depth, BK):
            a = x_tiles.load([group * tokens + tile_m * BM, start])
            b = gate_tiles.load([tile_n * BN, start])
            c = up_tiles.load([tile_n * BN, start])
            acc_gate = tl.dot(a, b.T, acc_gate, input_precision=PRECISION)
            acc_up = tl.dot(a, c.T, acc_up, input_precision=PRECISION)
        m = tile_m * BM + tl.arange(0, BM)
        n = tile_n * BN + tl.arange(0, BN)
        out = tl.where((n < width)[None, :], silu_mul(acc_gate, acc_up), 0.0).to(h.dtype.element_ty)
        at = h + group.to(tl.int64) * stride_h_group + m[:, None].to(tl.int64) * stride_h + n[None, :]
        tl.store(at, out, mask=(m < tokens)[:, None] & (n < (width + 63) // 64 * 64)[None, :])


@triton.jit
def outputs_kernel(
    x_tiles, w_tiles, starts, widths, y, tiles, tokens, depth, stride_y_group, stride_y,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STACKED: tl.constexpr, rows_per_group,
):  # fmt: skip
    """Outputs [0, widths[group]) of every group."""
    tiles_m = tl.cdiv(tokens, BM)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        group = _group(tile, starts, GROUPS)
        local = tile - tl.load(starts + group)
        width = tl.load(widths + group)
        tile_m = local % tiles_m
        tile_n = local // tiles_m
        acc = tl.zeros([BM, BN], tl.float32)
        row = tile_n * BN
        if STACKED:
            row += group * rows_per_group
        for start in range(0, depth, BK):
            a = x_tiles.load([group * tokens + tile_m * BM, start])
            b = w_tiles.load([row, start])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        m = tile_m * BM + tl.arange(0, BM)
        n = tile_n * BN + tl.arange(0, BN)
        at = y + group.to(tl.int64) * stride_y_group + m[:, None].to(tl.int64) * stride_y + n[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), mask=(m < tokens)[:, None] & (n < width)[None, :])


@triton.jit
def inputs_kernel(
    x_tiles, w_tiles, w, offsets, order, widths, y, tiles, tokens, outputs, stride_w, stride_y_group, stride_y,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STACKED: tl.constexpr, POINTERS: tl.constexpr,
):  # fmt: skip
    """All outputs of every group, contracting over its first widths[group] columns; the widest groups go first."""
    tiles_m = tl.cdiv(tokens, BM)
    tiles_n = tl.cdiv(outputs, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        group = tl.load(order + tile // (tiles_m * tiles_n))
        local = tile % (tiles_m * tiles_n)
        width = tl.load(widths + group)
        tile_m = local % tiles_m
        tile_n = local // tiles_m
        m = tile_m * BM + tl.arange(0, BM)
        n = tile_n * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        row = tile_n * BN
        if STACKED:
            row += group * outputs
        if POINTERS:
            first = w + tl.multiple_of(tl.load(offsets + group), 8)
            w_rows = first + tl.minimum(n, outputs - 1)[:, None].to(tl.int64) * stride_w + k[None, :]
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, width // BK * BK, BK):
            a = x_tiles.load([group * tokens + tile_m * BM, start])
            b = tl.load(w_rows + start) if POINTERS else w_tiles.load([row, start])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if width % BK != 0:
            # What lies past the prefix is pruned and may be anything: mask both sides of the last, partial step.
            start = width // BK * BK
            inside = (start + k < width)[None, :]
            a = tl.where(inside, x_tiles.load([group * tokens + tile_m * BM, start]), 0.0)
            if POINTERS:
                b = tl.load(w_rows + start, mask=inside, other=0.0)
            else:
                b = tl.where(inside, w_tiles.load([row, start]), 0.0)
            acc = tl.dot(a.to(y.dtype.element_ty), b.to(y.dtype.element_ty).T, acc, input_precision=PRECISION)
        at = y + group.to(tl.int64) * stride_y_group + m[:, None].to(tl.int64) * stride_y + n[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), mask=(m < tokens)[:, None] & (n < outputs)[None, :])


@lru_cache(maxsize=1024)
def _int_table(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on the device; cached, because a copy from pageable memory waits for the stream."""
    return torch.tensor(values, dtype=dtype, device=device)


def _starts(widths: tuple[int, ...], tokens: int, c: dict[str, int]) -> tuple[tuple[int, ...], int]:
    """First tile of every group, padded to a power of two with a number no tile reaches; and the number of tiles."""
    starts, total = [], 0
    for width in widths:
        starts.append(total)
        total += triton.cdiv(tokens, c["BM"]) * triton.cdiv(width, c["BN"])
    # An empty group starts where its successor does; the successor must win, and does: it comes later.
    padding = triton.next_power_of_2(len(widths)) - len(widths)
    return tuple(starts + [2**31 - 1] * padding), total


def grid(tiles: int, device: torch.device) -> tuple[int]:
    """Persistent: as many programs as multiprocessors, or tiles if there are fewer."""
    return (min(tiles, multiprocessors(device)),)


def pair_config() -> dict[str, int]:
    """Tile of the gate-and-up kernel."""
    return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


def single_config(shared: bool = True) -> dict[str, int]:
    """Tile of the one-weight kernels; pointers of per-policy weights leave no room for a fourth step."""
    return {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 4 if shared else 3}


def gate_up(
    x: Tensor, gate: Tensor, up: Tensor, widths: tuple[int, ...], config: dict[str, int] | None = None
) -> Tensor:
    """x [P, T, H] -> h [P, T, W], W = the largest width rounded up to 64; group p fills its first widths[p]."""
    groups, tokens, depth = x.shape
    c = dict(config or pair_config())
    h = x.new_empty(groups, tokens, (max(widths) + 63) // 64 * 64)
    starts, tiles = _starts(widths, tokens, c)
    programs = grid(tiles, x.device)
    gate_up_kernel[programs](
        descriptor(x.view(-1, depth), [c["BM"], c["BK"]]), descriptor(gate, [c["BN"], c["BK"]]),
        descriptor(up, [c["BN"], c["BK"]]), _int_table(starts, torch.int32, x.device),
        _int_table(widths, torch.int32, x.device), h, tiles, tokens, depth, h.stride(0), h.stride(1),
        GROUPS=len(starts), PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return h


def outputs(x: Tensor, weight: Tensor, widths: tuple[int, ...], config: dict[str, int] | None = None) -> Tensor:
    """x [P, T, K] times the first widths[p] rows of ``weight`` ([N, K] or [P, N, K]): [P, T, max width], rest zero."""
    groups, tokens, depth = x.shape
    c = dict(config or single_config())
    y = x.new_zeros(groups, tokens, max(widths))
    starts, tiles = _starts(widths, tokens, c)
    programs = grid(tiles, x.device)
    outputs_kernel[programs](
        descriptor(x.view(-1, depth), [c["BM"], c["BK"]]), descriptor(weight.view(-1, depth), [c["BN"], c["BK"]]),
        _int_table(starts, torch.int32, x.device), _int_table(widths, torch.int32, x.device), y, tiles, tokens, depth,
        y.stride(0), y.stride(1), GROUPS=len(starts), PRECISION=precision(x.dtype), STACKED=weight.dim() == 3,
        rows_per_group=weight.shape[-2], **c,
    )  # fmt: skip
    return y


def inputs(x: Tensor, weights: list[Tensor], widths: tuple[int, ...], config: dict[str, int] | None = None) -> Tensor:
    """x [P, T, K], its first widths[p] columns, times those of the weights: [P, T, N].

    ``weights``: one [N, K'] for all groups, one stacked [P, N, K'], or P matrices [N, K'] of one layout.
    """
    groups, tokens, depth = x.shape
    c = dict(config or single_config(len(weights) == 1))
    first = weights[0]
    rows, stride = first.shape[-2], first.stride(-2)
    y = x.new_empty(groups, tokens, rows)
    tiles = groups * triton.cdiv(tokens, c["BM"]) * triton.cdiv(rows, c["BN"])
    programs = grid(tiles, x.device)
    order = tuple(sorted(range(groups), key=lambda p: -widths[p]))
    # Element offsets from the first weight, not addresses: the compiler then knows the alignment of every pointer.
    offsets = tuple((w.data_ptr() - first.data_ptr()) // first.element_size() for w in weights)
    inputs_kernel[programs](
        descriptor(x.view(-1, depth), [c["BM"], c["BK"]]),
        descriptor(first.view(-1, first.shape[-1]) if first.dim() == 3 else first, [c["BN"], c["BK"]]), first,
        _int_table(offsets, torch.int64, x.device),
        _int_table(order, torch.int32, x.device), _int_table(widths, torch.int32, x.device), y, tiles, tokens, rows,
        stride, y.stride(0), y.stride(1), PRECISION=precision(x.dtype), STACKED=first.dim() == 3,
        POINTERS=len(weights) > 1, **c,
    )  # fmt: skip
    return y

"""What goes row by row around the grouped products: norms, residual sums of normed outputs, weights put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped import tables


@triton.jit
def _rows_at(base, state, row, tokens, column, H: tl.constexpr):
    """Addresses of some rows of one state, [rows, columns]."""
    return base + (state.to(tl.int64) * tokens + row)[:, None] * H + column[None, :]


@triton.jit
def _rms_norm(x, weight, column, epsilon, H: tl.constexpr):
    """fp32 [rows, columns], zero past H, over its root mean square, times the weight of any dtype."""
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / H + epsilon)
    w = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    return x * scale[:, None] * w[None, :]


@triton.jit
def norm_kernel(
    x, weight, table, y, tokens, epsilon, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """RMSNorm of some rows of one of the states that ``table`` lists."""
    tiles = tl.cdiv(tokens, ROWS)
    at = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < tokens)[:, None] & (column < H)[None, :]
    values = tl.load(_rows_at(x, tl.load(table + at), row, tokens, column, H), mask=inside, other=0.0)
    out = _rms_norm(values.to(tl.float32), weight, column, epsilon, H)
    tl.store(_rows_at(y, at, row, tokens, column, H), out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def residual_kernel(
    x, given, weight, table, y, tokens, epsilon, scale,
    GROUPS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some rows of a source state, plus ``scale`` times the norm of what a sub-layer gave, if it did."""
    tiles = tl.cdiv(tokens, ROWS)
    at = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < tokens)[:, None] & (column < H)[None, :]
    out = tl.load(_rows_at(x, tl.load(table + at), row, tokens, column, H), mask=inside, other=0.0).to(tl.float32)
    which = tl.load(table + GROUPS + at)
    if which >= 0:
        values = tl.load(_rows_at(given, which, row, tokens, column, H), mask=inside, other=0.0)
        out += scale * _rms_norm(values.to(tl.float32), weight, column, epsilon, H)
    tl.store(_rows_at(y, at, row, tokens, column, H), out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def stack_kernel(
    first, table, y, rows, pitch, count, UNIT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of one matrix, zero past its columns; ``table`` has every matrix's place, row pitch and columns."""
    at = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.multiple_of(tl.load(table + at), UNIT)
    stride = tl.multiple_of(tl.load(table + count + at), UNIT)
    width = tl.multiple_of(tl.load(table + 2 * count + at), UNIT)
    source = first + offset + row[:, None] * stride + column[None, :]
    values = tl.load(source, mask=(row < rows)[:, None] & (column < width)[None, :], other=0.0)
    target = y + (at.to(tl.int64) * rows + row)[:, None] * pitch + column[None, :]
    tl.store(target, values, mask=(row < rows)[:, None] & (column < pitch)[None, :])


ROWS = {"ROWS": 2, "num_warps": 4}
_COPY = {"ROWS": 8, "BLOCK": 512, "num_warps": 4}


def norm(
    x: Tensor, weight: Tensor, states: Sequence[int], epsilon: float, config: dict[str, int] | None = None
) -> Tensor:
    """RMSNorm of the given states of x [S, N, H] -> [E, N, H]."""
    tokens, hidden = x.shape[1:]
    c = config or ROWS
    y = x.new_empty(len(states), tokens, hidden)
    norm_kernel[len(states) * triton.cdiv(tokens, c["ROWS"]),](
        x, weight, tables([states], x.device), y, tokens, epsilon, H=hidden, BLOCK=triton.next_power_of_2(hidden), **c
    )
    return y


def residual(
    x: Tensor, given: Tensor, weight: Tensor, sources: Sequence[int], which: Sequence[int], epsilon: float,
    scale: float, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x[sources] plus ``scale`` times the norm of given[which], where that is not -1: [D, N, H]."""
    tokens, hidden = x.shape[1:]
    c = config or ROWS
    y = x.new_empty(len(sources), tokens, hidden)
    table = tables([sources, which], x.device)
    residual_kernel[len(sources) * triton.cdiv(tokens, c["ROWS"]),](
        x, given, weight, table, y, tokens, epsilon, scale, GROUPS=table.shape[1], H=hidden,
        BLOCK=triton.next_power_of_2(hidden), **c,
    )  # fmt: skip
    return y


def stack(weights: Sequence[Tensor], columns: int) -> Tensor:
    """Matrices [H, up to columns] with unit last stride -> [L, H, columns], zero past each one's columns."""
    first, rows, c = weights[0], len(weights[0]), _COPY
    y = first.new_empty(len(weights), rows, columns)
    # Offsets from the first matrix, not addresses: the compiler then knows the alignment of every pointer.
    places = [(w.data_ptr() - first.data_ptr()) // first.element_size() for w in weights]
    numbers = [places, [w.stride(0) for w in weights], [w.shape[1] for w in weights]]
    unit = 8 if first.data_ptr() % 16 == 0 and all(n % 8 == 0 for row in numbers for n in row) else 1
    table = torch.tensor(numbers, dtype=torch.int64)
    if first.device.type == "cuda":
        table = table.pin_memory().to(first.device, non_blocking=True)
    blocks = triton.cdiv(columns, c["BLOCK"]), triton.cdiv(rows, c["ROWS"]), len(weights)
    stack_kernel[blocks](first, table, y, rows, columns, len(weights), UNIT=unit, **c)
    return y

"""``masked_linear``: a linear layer of kept outputs and kept inputs, without materialising its weight.

Schema, reference, and the choice of implementation. What runs where (CUDA, 16-bit types; see ``dispatch``):
prefixes are views that cuBLAS reads in place at full speed; 1 to 16 tokens go to the bandwidth-bound kernels of
``ppf.kernels.gemv``; many tokens to the tile kernels, or to a compacted weight where the copy is cheap next to the
product. Everything else (CPU, fp32) is the reference.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from . import dispatch, many_tokens
from .library import LIBRARY
from .selection import BLOCKS, UNIQUE, Selection

LIBRARY.define(
    "masked_linear(Tensor x, Tensor weight, int out_kind, int out_width, Tensor? out_rows, Tensor? out_blocks, "
    "int in_kind, int in_width, Tensor? in_rows, Tensor? in_blocks, bool transposed) -> Tensor"
)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    out_selection: Selection | None = None,
    in_selection: Selection | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """``x @ weight[out][:, in].T``.

    x: [..., kept inputs] (already compact); weight: [outputs, inputs] as ``nn.Linear`` holds it, or with ``transposed``
    [inputs, outputs], which makes kept inputs contiguous rows; both of one dtype on one device. Selections of None keep
    everything. Returns [..., kept outputs]. Differentiable in x and weight (pruned entries get zero gradient). Raises
    ``InputError`` for shapes, dtypes or devices that do not fit.
    """
    check_operands(x, weight=weight)
    outputs, inputs = weight.shape[::-1] if transposed else weight.shape
    out_selection = out_selection or Selection.full(outputs)
    in_selection = in_selection or Selection.full(inputs)
    out_selection.check("out_selection", outputs)
    in_selection.check("in_selection", inputs)
    check_columns(x, in_selection.width)
    tokens = as_tokens(x)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = _MaskedLinear.apply(tokens, weight, out_selection, in_selection, transposed)
    else:
        y = call(tokens, weight, out_selection, in_selection, transposed)
    return y.view(*x.shape[:-1], out_selection.width)


def call(x: Tensor, weight: Tensor, out: Selection, into: Selection, transposed: bool) -> Tensor:
    """The registered op on 2-D tokens."""
    device = x.device
    return torch.ops.ppf.masked_linear(
        x, weight, out.kind, out.width, out.rows(device), out.block_list(device),
        into.input_kind, into.width, into.rows(device), into.block_list(device), transposed,
    )  # fmt: skip


def kept_weight(
    weight: Tensor, out_width: int, out_rows: Tensor | None, in_width: int, in_rows: Tensor | None, transposed: bool
) -> Tensor:
    """The kept part of a weight as [kept outputs, kept inputs]: a view for prefixes, else a copy."""
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    kept = dispatch.take(weight, out_dim, out_width, out_rows)
    kept = dispatch.take(kept, in_dim, in_width, in_rows)
    return kept.t() if transposed else kept


def masked_linear_reference(
    x: Tensor, weight: Tensor, out_kind: int, out_width: int, out_rows: Tensor | None,
    out_blocks: Tensor | None, in_kind: int, in_width: int, in_rows: Tensor | None, in_blocks: Tensor | None,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """The same on any device, by slicing and selecting: x [t, in_width] -> [t, out_width]."""
    return F.linear(x, kept_weight(weight, out_width, out_rows, in_width, in_rows, transposed))


def masked_linear_cuda(
    x: Tensor, weight: Tensor, out_kind: int, out_width: int, out_rows: Tensor | None,
    out_blocks: Tensor | None, in_kind: int, in_width: int, in_rows: Tensor | None, in_blocks: Tensor | None,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """The choice on a GPU, see ``dispatch``."""
    path = dispatch.linear_path(x, weight, out_kind, out_width, in_kind, in_width, transposed)
    if path in ("rows", "columns"):
        return _small(x, weight, path, out_width, out_rows, in_kind, in_rows, in_blocks)
    if path == "native":
        return many_tokens.outputs(x, weight, out_rows, out_width)
    if path in ("input blocks", "output blocks"):
        from ppf.kernels import blocks

        if path == "output blocks":
            return blocks.linear_blocks(x, weight.narrow(1, 0, in_width), out_blocks)
        return blocks.input_blocks(x, weight.narrow(1 if transposed else 0, 0, out_width), in_blocks, transposed)
    if path in ("tiles", "transposed"):
        from ppf.kernels import masked_linear as tiles

        if path == "transposed":
            return tiles.linear(x, weight, in_rows, out_width, transposed=True)
        return tiles.linear(x, weight, out_rows, out_width, in_blocks)
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    kept = dispatch.compact(dispatch.compact(weight, out_dim, out_width, out_rows), in_dim, in_width, in_rows)
    return F.linear(x, kept.t() if transposed else kept)


def _small(
    x: Tensor, weight: Tensor, path: str, out_width: int, out_rows: Tensor | None, in_kind: int,
    in_rows: Tensor | None, in_blocks: Tensor | None,
) -> Tensor:  # fmt: skip
    from ppf.kernels import gemv

    if path == "columns":
        return gemv.columns(x, weight.narrow(1, 0, out_width), in_rows)
    if in_kind == UNIQUE:
        # Scattered columns touch nearly every 32-byte sector of a row: read whole rows against x put back in place.
        x, counts = gemv.expand(x, in_rows, weight.shape[1])
        return gemv.rows(x, (weight,), out_rows, out_width, gemv.MASKED, counts)
    entries = in_blocks if in_kind == BLOCKS else in_rows
    return gemv.rows(x, (weight,), out_rows, out_width, in_kind, entries)


def _masked_linear_fake(
    x: Tensor, weight: Tensor, out_kind: int, out_width: int, out_rows: Tensor | None,
    out_blocks: Tensor | None, in_kind: int, in_width: int, in_rows: Tensor | None, in_blocks: Tensor | None,
    transposed: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out_width)


LIBRARY.impl("masked_linear", masked_linear_reference, "CPU")
LIBRARY.impl("masked_linear", masked_linear_cuda, "CUDA")
torch.library.register_fake("ppf::masked_linear", _masked_linear_fake, lib=LIBRARY)


class _MaskedLinear(torch.autograd.Function):
    """Gradients through the op: the weight's is zero at pruned entries and sums over units listed twice."""

    @staticmethod
    def forward(ctx, x, weight, out, into, transposed):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.plan = (out, into, transposed)
        return call(x, weight, out, into, transposed)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        out, into, transposed = ctx.plan
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            # dx = dy · kept weight: the same op with outputs and inputs, and hence the layout, exchanged.
            dx = call(dy, weight, into, out, not transposed)
        if ctx.needs_input_grad[1]:
            kept = x.t() @ dy if transposed else dy.t() @ x
            first, second = (into, out) if transposed else (out, into)
            dweight = _scatter(_scatter(kept, second, 1), first, 0)
        return dx, dweight, None, None, None


def _scatter(kept: Tensor, selection: Selection, dim: int) -> Tensor:
    """Zeros of the full dimension with the kept part added in."""
    shape = list(kept.shape)
    shape[dim] = selection.total
    full = kept.new_zeros(shape)
    rows = selection.rows(kept.device)
    if rows is None:
        full.narrow(dim, 0, selection.width).copy_(kept)
        return full
    return full.index_add_(dim, rows, kept)


def as_tokens(x: Tensor) -> Tensor:
    """x [..., n] as [t, n]; also where n is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_operands(x: Tensor, **weights: Tensor) -> None:
    """Raise ``InputError`` unless every weight is 2-D with the dtype and device of x, and x has a last dimension."""
    if x.dim() < 1 or not x.is_floating_point():
        raise InputError("x", f"{x.dtype} {list(x.shape)}", "is not [..., inputs] of a float type", "Give activations")
    for name, weight in weights.items():
        if weight.dim() != 2:
            raise InputError(name, list(weight.shape), "is not a matrix", "Give it as nn.Linear holds it")
        if weight.dtype != x.dtype:
            raise InputError(name, weight.dtype, f"differs from x ({x.dtype})", "Cast one of them")
        if weight.device != x.device:
            raise InputError(name, weight.device, f"is not where x is ({x.device})", "Move one of them")


def check_columns(x: Tensor, width: int) -> None:
    """Raise ``InputError`` unless x holds ``width`` columns, the kept inputs only."""
    if x.shape[-1] != width:
        remedy = "x holds the kept inputs only, in the order of the selection"
        raise InputError("x", list(x.shape), f"has {x.shape[-1]} columns where {width} inputs are kept", remedy)

"""Attention projections of kept kv-groups: q, k and v from one read of x, and o on the kept heads' outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from . import dispatch
from .library import LIBRARY
from .masked_linear import as_tokens, check_columns, check_operands, masked_linear, masked_linear_cuda
from .selection import BLOCKS, INDICES, PREFIX, Selection

LIBRARY.define(
    "masked_qkv(Tensor x, Tensor q, Tensor k, Tensor v, int q_width, Tensor? q_rows, Tensor? q_blocks, int kv_width, "
    "Tensor? kv_rows, Tensor? kv_blocks) -> (Tensor, Tensor, Tensor)"
)


def masked_attention_projections(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the kept kv-groups.

    x: [..., H]; q: [G·g·head_dim, H]; k, v: [G·head_dim, H]; ``selection`` over G kv-groups (None keeps all). Returns
    [..., kept·g·head_dim], and twice [..., kept·head_dim], heads in the order of the selection. Differentiable
    in x and the weights. Raises ``InputError`` for operands that do not fit.
    """
    check_operands(x, q=q, k=k, v=v)
    check_columns(x, q.shape[1])
    q_selection, kv_selection = _row_selections(q, k, v, selection, head_dim)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, q, k, v)):
        pairs = ((q, q_selection), (k, kv_selection), (v, kv_selection))
        first, second, third = (masked_linear(x, weight, rows) for weight, rows in pairs)
        return first, second, third
    tokens, device = as_tokens(x), x.device
    parts = torch.ops.ppf.masked_qkv(
        tokens, q, k, v, q_selection.width, q_selection.rows(device), q_selection.block_list(device),
        kv_selection.width, kv_selection.rows(device), kv_selection.block_list(device),
    )  # fmt: skip
    first, second, third = (part.view(*x.shape[:-1], part.shape[-1]) for part in parts)
    return first, second, third


def masked_attention_output(
    attention: Tensor, o: Tensor, selection: Selection | None, head_dim: int, kv_groups: int, *,
    o_transposed: bool = False,
) -> Tensor:  # fmt: skip
    """``o`` on the outputs of the kept heads.

    attention: [..., kept·g·head_dim]; o: [H, G·g·head_dim], or its transpose with ``o_transposed``; ``selection`` over
    G = ``kv_groups``. Returns [..., H]. Differentiable. Raises ``InputError`` for operands that do not fit.
    """
    check_operands(attention, o=o)
    inputs = o.shape[0 if o_transposed else 1]
    selection = selection or Selection.full(kv_groups)
    selection.check("selection", kv_groups)
    if inputs % (kv_groups * head_dim):
        raise InputError("o", list(o.shape), f"is not {kv_groups} kv-groups of heads of {head_dim}", "Check head_dim")
    return masked_linear(attention, o, in_selection=selection.groups(inputs // kv_groups), transposed=o_transposed)


def _row_selections(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, head_dim: int
) -> tuple[Selection, Selection]:
    kv_groups = k.shape[0] // head_dim if head_dim > 0 else 0
    if kv_groups == 0 or k.shape[0] % head_dim:
        raise InputError(
            "head_dim", head_dim, f"does not divide the {k.shape[0]} rows of k", "Give the model's head_dim"
        )
    for name, weight, rows in (("q", q, kv_groups * head_dim), ("v", v, kv_groups * head_dim)):
        exact = name == "v"
        if weight.shape[1] != k.shape[1] or weight.shape[0] % rows or (exact and weight.shape[0] != rows):
            remedy = f"Give {'exactly' if exact else 'a multiple of'} {rows} rows of {k.shape[1]}"
            raise InputError(name, list(weight.shape), f"does not fit k {list(k.shape)}", remedy)
    selection = selection or Selection.full(kv_groups)
    selection.check("selection", kv_groups)
    return selection.groups(q.shape[0] // kv_groups), selection.groups(head_dim)


def masked_qkv_reference(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, q_width: int, q_rows: Tensor | None,
    q_blocks: Tensor | None, kv_width: int, kv_rows: Tensor | None, kv_blocks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same on any device, by slicing and selecting: x [t, H] -> [t, q_width], [t, kv_width], [t, kv_width]."""
    return (
        F.linear(x, dispatch.take(q, 0, q_width, q_rows)),
        F.linear(x, dispatch.take(k, 0, kv_width, kv_rows)),
        F.linear(x, dispatch.take(v, 0, kv_width, kv_rows)),
    )


def _masked_qkv_cuda(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, q_width: int, q_rows: Tensor | None,
    q_blocks: Tensor | None, kv_width: int, kv_rows: Tensor | None, kv_blocks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if 0 in (x.shape[0], q_width) or not dispatch.kernels_apply(x, q, k, v):
        return masked_qkv_reference(x, q, k, v, q_width, q_rows, q_blocks, kv_width, kv_rows, kv_blocks)
    if x.shape[0] <= dispatch.SMALL_TOKENS and len({w.stride(0) for w in (q, k, v)}) == 1:
        from ppf.kernels import gemv

        return gemv.qkv(x, q, k, v, q_rows, kv_rows, q_width, kv_width)
    lists = ((q, q_width, q_rows, q_blocks), (k, kv_width, kv_rows, kv_blocks), (v, kv_width, kv_rows, kv_blocks))
    first, second, third = (_one(x, *of_weight) for of_weight in lists)
    return first, second, third


def _one(x: Tensor, weight: Tensor, width: int, rows: Tensor | None, blocks: Tensor | None) -> Tensor:
    kind = PREFIX if rows is None else INDICES if blocks is None else BLOCKS
    hidden = weight.shape[1]
    return masked_linear_cuda(x, weight, kind, width, rows, blocks, PREFIX, hidden, None, None, False)


def _masked_qkv_fake(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, q_width: int, q_rows: Tensor | None,
    q_blocks: Tensor | None, kv_width: int, kv_rows: Tensor | None, kv_blocks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape[0], q_width), x.new_empty(x.shape[0], kv_width), x.new_empty(x.shape[0], kv_width)


LIBRARY.impl("masked_qkv", masked_qkv_reference, "CPU")
LIBRARY.impl("masked_qkv", _masked_qkv_cuda, "CUDA")
torch.library.register_fake("ppf::masked_qkv", _masked_qkv_fake, lib=LIBRARY)

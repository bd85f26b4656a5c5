"""Grouped masked GEMMs and what goes between them: many states of a wave, each at its own width, one launch a step.

A state is the activations [N, H] of N tokens (sequences of one length); a wave's states are one tensor [S, N, H].
Widths and indices are host integers, checked before any launch. Weights have the activations' dtype; those of norms may
be fp32 instead. None stands for what a family has not. The kernels leave columns past a state's width undefined (the
hidden and attended ones are zero to the next multiple of 64), the references leave zeros there. Inference only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from .library import LIBRARY

LIBRARY.define("grouped_norm(Tensor x, Tensor weight, int[] states, float epsilon) -> Tensor")
LIBRARY.define(
    "grouped_heads(Tensor x, Tensor weight, Tensor? bias, Tensor? head_norm, Tensor cos, Tensor sin, int[] rows, "
    "int length, int group_rows, float epsilon) -> Tensor"
)
LIBRARY.define(
    "grouped_attention(Tensor qkv, int[] groups, int length, int heads, int head_dim, float scale, int window) "
    "-> Tensor"
)
LIBRARY.define("grouped_hidden(Tensor x, Tensor weight, Tensor? bias, int[] widths, str activation) -> Tensor")
LIBRARY.define("grouped_stack(Tensor[] weights, int columns) -> Tensor")
LIBRARY.define(
    "grouped_outputs(Tensor(a!) y, Tensor? x, Tensor inner, Tensor weights, Tensor? bias, int[] inners, int[] widths, "
    "int[] which, int[] sources, int[] targets, float scale) -> ()"
)
LIBRARY.define(
    "grouped_residual(Tensor x, Tensor given, Tensor weight, int[] sources, int[] which, float epsilon, float scale) "
    "-> Tensor"
)
LIBRARY.define("grouped_losses(Tensor x, Tensor head, Tensor targets, int length, float scale, float? cap) -> Tensor")

ACTIVATIONS = "silu", "gelu", "gelu_pytorch_tanh"
"""The FFN activations that ``grouped_hidden`` computes."""

STEP = 64
"""Columns of a step of the output products: hidden and attended columns are zero to the next multiple of it."""


def norm_reference(x: Tensor, weight: Tensor, states: Sequence[int], epsilon: float) -> Tensor:
    """RMSNorm of the given states of x [S, N, H]: [E, N, H]; an fp32 ``weight`` [H] is applied before rounding."""
    _check_indices("states", states, len(x))
    return _normed(x[list(states)], weight, epsilon)


def heads_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, head_norm: Tensor | None, cos: Tensor, sin: Tensor,
    rows: Sequence[int], length: int, group_rows: int, epsilon: float,
) -> Tensor:  # fmt: skip
    """x [E, N, H] -> q, k and v [E, N, max(rows)], of every state its first ``rows``, queries and keys rotated.

    ``weight`` [G·(g+2)·d, H] and ``bias`` have, of each kv-group in turn, the rows of g query heads, the key and the
    value; q and k rows are interleaved. ``cos`` and ``sin`` [length, d/2] in x's dtype; ``head_norm`` fp32 [(g+2)·d =
    ``group_rows``]: of every head's norm its weight, interleaved, ones for v.
    """
    _check_heads(x, weight, rows, length, group_rows)
    y, d = x.new_zeros(*x.shape[:2], max(rows)), 2 * cos.shape[1]
    for state, kept in enumerate(rows):
        out = F.linear(x[state], weight[:kept], None if bias is None else bias[:kept])
        out = out.view(-1, length, kept // group_rows, group_rows)
        turned, value = out[..., : group_rows - d].unflatten(-1, (-1, d)), out[..., group_rows - d :]
        if head_norm is not None:
            scale = head_norm[: group_rows - d].view(-1, d)
            turned = (F.rms_norm(turned.to(scale.dtype), (d,), None, epsilon) * scale).to(x.dtype)
        turned = _rotated(turned, cos, sin).flatten(-2).to(x.dtype)
        y[state, :, :kept] = torch.cat((turned, value), -1).view(x.shape[1], kept)
    return y


def attention_reference(
    qkv: Tensor, groups: Sequence[int], length: int, heads: int, head_dim: int, scale: float, window: int
) -> Tensor:
    """Causal attention within sequences of ``length``: [E, N, G·(g+2)·d] -> [E, N, max(groups)·g·d]. A query sees
    ``window`` keys, its own among them; 0 is no window."""
    _check_attention(qkv, groups, length, heads, head_dim)
    y = qkv.new_zeros(*qkv.shape[:2], max(groups) * heads * head_dim)
    ones = torch.ones(length, length, dtype=torch.bool, device=qkv.device)
    seen = ones.tril() & ones.triu(1 - (window or length))
    for state, kept in enumerate(groups):
        parts = qkv[state, :, : kept * (heads + 2) * head_dim].reshape(-1, length, kept, heads + 2, head_dim)
        q, k, v = parts.permute(0, 2, 3, 1, 4).split([heads, 1, 1], dim=2)
        out = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), attn_mask=seen, scale=scale)
        y[state, :, : kept * heads * head_dim] = out.permute(0, 3, 1, 2, 4).reshape(qkv.shape[1], -1)
    return y


def hidden_reference(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int], activation: str) -> Tensor:
    """x [E, N, H] -> activation(gate) · up of every state's first ``widths`` channels, in [E, N, W] with W the largest
    width rounded up to 64; ``weight`` [2C, H] and ``bias`` [2C] have gate and up rows in turn."""
    _check_hidden(x, weight, widths, activation)
    y = x.new_zeros(*x.shape[:2], -(-max(widths) // STEP) * STEP)
    for state, width in enumerate(widths):
        both = F.linear(x[state], weight[: 2 * width], None if bias is None else bias[: 2 * width])
        gate, up = both.unflatten(-1, (-1, 2)).unbind(-1)
        y[state, :, :width] = _activated(gate, activation) * up
    return y


def stack_reference(weights: Sequence[Tensor], columns: int) -> Tensor:
    """Matrices [H, up to ``columns``] -> [L, H, columns], zero past each one's columns."""
    _check_stack(weights, columns)
    y = weights[0].new_zeros(len(weights), len(weights[0]), columns)
    for at, weight in enumerate(weights):
        y[at, :, : weight.shape[1]] = weight
    return y


def outputs_reference(
    y: Tensor, x: Tensor | None, inner: Tensor, weights: Tensor, bias: Tensor | None, inners: Sequence[int],
    widths: Sequence[int], which: Sequence[int], sources: Sequence[int], targets: Sequence[int], scale: float,
) -> None:  # fmt: skip
    """Job by job, y[target] [N, H] = x[source] + ``scale`` · (inner[inner, :, :width] · weights[which][:, :width]ᵀ +
    ``bias``), or only the product where x is None (``scale`` is then not used); at width 0 x alone.

    y [D, N, H] may be x if every job's target is its source. inner [E, N, C] and weights [L, H, C'] meet in whole steps
    of 64 columns: from a width to the next multiple one of them is zero, the other finite.
    """
    _check_outputs(y, x, inner, weights, inners, widths, which, sources, targets)
    for at, width, level, source, target in zip(inners, widths, which, sources, targets, strict=True):
        # A copy: in bf16 on CPUs with AMX, torch multiplies what lies past the columns of a view with zeros, NaN too.
        given = F.linear(inner[at, :, :width].contiguous(), weights[level, :, :width], bias if width else None)
        if x is None:
            y[target] = given
        else:
            y[target] = (x[source].float() + scale * given.float()).to(y.dtype) if width else x[source]


def residual_reference(
    x: Tensor, given: Tensor, weight: Tensor, sources: Sequence[int], which: Sequence[int], epsilon: float, scale: float
) -> Tensor:
    """x[sources] plus ``scale`` times the RMSNorm of given[which], where that is not -1: [D, N, H]."""
    _check_residual(x, given, sources, which)
    y = x[list(sources)]
    for target, at in enumerate(which):
        if at >= 0:
            y[target] += scale * _normed(given[at], weight, epsilon)
    return y


def losses_reference(x: Tensor, head: Tensor, targets: Tensor, length: int, scale: float, cap: float | None) -> Tensor:
    """Negative log-likelihoods fp32 [D, N] of normalised x [D, N, H], in nats. ``targets`` int64 [N]: the token after
    every token; a sequence's last one predicts nothing: 0. Logits are divided by ``scale``, then capped to ±``cap``."""
    _check_losses(x, head, targets, length)
    logits = F.linear(x, head) / scale
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    wide = logits if logits.dtype is torch.float64 else logits.float()
    found = F.cross_entropy(wide.transpose(1, 2), targets.expand(len(x), -1), reduction="none")
    return found * (torch.arange(len(targets), device=x.device) % length != length - 1)


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, epsilon).to(x.dtype)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved heads [..., length, groups, heads, d] turned by the angles of their positions."""
    first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None, None, :], sin[:, None, None, :]
    return torch.stack((first * c - second * s, second * c + first * s), -1).flatten(-2)


def _activated(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="none" if activation == "gelu" else "tanh")


def _require(holds: bool, field: str, value: object, problem: str) -> None:
    if not holds:
        raise InputError(field, value, problem, "Check the shapes, the widths and the tables")


def _check_indices(field: str, values: Sequence[int], limit: int, least: int = 0) -> None:
    """There is one, and all are from ``least`` on and below ``limit``."""
    good = len(values) > 0 and min(values) >= least and max(values) < limit
    _require(good, field, list(values), f"are not numbers from {least} to {limit - 1}")


def _check_heads(x: Tensor, weight: Tensor, rows: Sequence[int], length: int, group_rows: int) -> None:
    _require(len(rows) == len(x), "rows", list(rows), f"are not one a state of {len(x)}")
    _check_indices("rows", rows, len(weight) + 1, 1)
    _require(all(row % group_rows == 0 for row in rows), "rows", list(rows), f"are not multiples of {group_rows}")
    _check_product(x, weight)
    _require(x.shape[1] % length == 0, "length", length, f"does not divide {x.shape[1]} tokens")


def _check_attention(qkv: Tensor, groups: Sequence[int], length: int, heads: int, head_dim: int) -> None:
    _require(len(groups) == len(qkv), "groups", list(groups), f"are not one a state of {len(qkv)}")
    _check_indices("groups", groups, qkv.shape[2] // ((heads + 2) * head_dim) + 1, 1)
    _require(qkv.shape[1] % length == 0, "length", length, f"does not divide {qkv.shape[1]} tokens")


def _check_hidden(x: Tensor, weight: Tensor, widths: Sequence[int], activation: str) -> None:
    _require(len(widths) == len(x), "widths", list(widths), f"are not one a state of {len(x)}")
    _check_indices("widths", widths, len(weight) // 2 + 1, 1)
    _check_product(x, weight)
    _require(activation in ACTIVATIONS, "activation", activation, f"is not one of {ACTIVATIONS}")


def _check_product(x: Tensor, weight: Tensor) -> None:
    _require(x.is_contiguous() and x.dim() == 3, "x", list(x.shape), "is not contiguous [states, tokens, hidden]")
    _require(weight.dim() == 2 and weight.shape[1] == x.shape[2], "weight", list(weight.shape), "does not fit x")
    _require(weight.dtype == x.dtype, "weight", weight.dtype, f"is not {x.dtype} like x")


def _check_stack(weights: Sequence[Tensor], columns: int) -> None:
    _require(len(weights) > 0, "weights", 0, "are none")
    for weight in weights:
        good = weight.dim() == 2 and len(weight) == len(weights[0]) and weight.shape[1] <= columns
        _require(good and weight.stride(1) == 1, "weights", list(weight.shape), f"is not [H, up to {columns}]")
        _require(weight.dtype == weights[0].dtype, "weights", weight.dtype, "differ in dtype")


def _check_outputs(
    y: Tensor, x: Tensor | None, inner: Tensor, weights: Tensor, inners: Sequence[int], widths: Sequence[int],
    which: Sequence[int], sources: Sequence[int], targets: Sequence[int],
) -> None:  # fmt: skip
    _require(y.is_contiguous() and y.dim() == 3, "y", list(y.shape), "is not contiguous [states, tokens, hidden]")
    for name, tensor in (("x", x), ("inner", inner)):
        if tensor is not None:
            good = tensor.is_contiguous() and tensor.shape[1] == y.shape[1] and tensor.dtype == y.dtype
            _require(good, name, list(tensor.shape), "is not contiguous, of y's tokens and dtype")
    _require(x is None or x.shape[2] == y.shape[2], "x", y.shape[2], "is not x's hidden size")
    good = weights.dim() == 3 and weights.shape[1] == y.shape[2] and weights.dtype == y.dtype
    _require(good and weights.is_contiguous(), "weights", list(weights.shape), "is not contiguous [L, hidden, columns]")
    same = len({len(inners), len(widths), len(which), len(sources), len(targets)}) == 1
    _require(same, "widths", len(widths), "are not as many as inners, which, sources and targets")
    limits = len(inner), min(inner.shape[2], weights.shape[2]) + 1, len(weights), len(y if x is None else x), len(y)
    names = "inners", "widths", "which", "sources", "targets"
    for name, values, limit in zip(names, (inners, widths, which, sources, targets), limits, strict=True):
        _check_indices(name, values, limit)
    _require(len(set(targets)) == len(targets), "targets", list(targets), "are not distinct")
    aliased = x is not None and x.data_ptr() == y.data_ptr()
    _require(not aliased or list(sources) == list(targets), "targets", list(targets), "overwrite sources of others")


def _check_residual(x: Tensor, given: Tensor, sources: Sequence[int], which: Sequence[int]) -> None:
    good = x.is_contiguous() and given.is_contiguous() and given.shape[1:] == x.shape[1:] and given.dtype == x.dtype
    _require(good, "given", list(given.shape), f"does not fit x {list(x.shape)}")
    _require(len(sources) == len(which), "which", list(which), f"are not {len(sources)}")
    _check_indices("sources", sources, len(x))
    _check_indices("which", which, len(given), -1)


def _check_losses(x: Tensor, head: Tensor, targets: Tensor, length: int) -> None:
    _check_product(x, head)
    _require(head.is_contiguous(), "head", list(head.shape), "is not contiguous")
    _require(len(targets) == x.shape[1], "targets", len(targets), f"are not one a token of {x.shape[1]}")
    _require(x.shape[1] % length == 0, "length", length, f"does not divide {x.shape[1]} tokens")


def _norm_cuda(x: Tensor, weight: Tensor, states: Sequence[int], epsilon: float) -> Tensor:
    _require(x.is_contiguous(), "x", list(x.stride()), "is not contiguous")
    _check_indices("states", states, len(x))
    from ppf.kernels import grouped_rows

    return grouped_rows.norm(x, weight, states, epsilon)


def _heads_cuda(x, weight, bias, head_norm, cos, sin, rows, length, group_rows, epsilon):
    _check_heads(x, weight, rows, length, group_rows)
    from ppf.kernels import grouped

    return grouped.heads(x, weight, bias, head_norm, cos, sin, rows, length, group_rows, epsilon)


def _attention_cuda(qkv, groups, length, heads, head_dim, scale, window):
    _check_attention(qkv, groups, length, heads, head_dim)
    from ppf.kernels import grouped_attention

    return grouped_attention.attention(qkv, groups, length, heads, head_dim, scale, window)


def _hidden_cuda(x, weight, bias, widths, activation):
    _check_hidden(x, weight, widths, activation)
    from ppf.kernels import grouped

    return grouped.hidden(x, weight, bias, widths, activation)


def _stack_cuda(weights, columns):
    _check_stack(weights, columns)
    from ppf.kernels import grouped_rows

    return grouped_rows.stack(weights, columns)


def _outputs_cuda(y, x, inner, weights, bias, inners, widths, which, sources, targets, scale):
    _check_outputs(y, x, inner, weights, inners, widths, which, sources, targets)
    from ppf.kernels import grouped

    grouped.outputs(y, x, inner, weights, bias, (inners, widths, which, sources, targets), scale)


def _residual_cuda(x, given, weight, sources, which, epsilon, scale):
    _check_residual(x, given, sources, which)
    from ppf.kernels import grouped_rows

    return grouped_rows.residual(x, given, weight, sources, which, epsilon, scale)


def _losses_cuda(x, head, targets, length, scale, cap):
    _check_losses(x, head, targets, length)
    from ppf.kernels import grouped_losses

    return grouped_losses.losses(x, head, targets, length, scale, cap)


for _name, _reference, _cuda, _fake in (
    ("norm", norm_reference, _norm_cuda, lambda x, weight, states, epsilon: x.new_empty(len(states), *x.shape[1:])),
    (
        "heads", heads_reference, _heads_cuda,
        lambda x, weight, bias, head_norm, cos, sin, rows, *_: x.new_empty(*x.shape[:2], max(rows)),
    ),
    (
        "attention", attention_reference, _attention_cuda,
        lambda qkv, groups, length, heads, head_dim, *_: qkv.new_empty(*qkv.shape[:2], max(groups) * heads * head_dim),
    ),
    (
        "hidden", hidden_reference, _hidden_cuda,
        lambda x, weight, bias, widths, activation: x.new_empty(*x.shape[:2], -(-max(widths) // STEP) * STEP),
    ),
    (
        "stack", stack_reference, _stack_cuda,
        lambda weights, columns: weights[0].new_empty(len(weights), len(weights[0]), columns),
    ),
    ("outputs", outputs_reference, _outputs_cuda, lambda *_: None),
    (
        "residual", residual_reference, _residual_cuda,
        lambda x, given, weight, sources, *_: x.new_empty(len(sources), *x.shape[1:]),
    ),
    ("losses", losses_reference, _losses_cuda, lambda x, *_: x.new_empty(x.shape[:2], dtype=torch.float32)),
):  # fmt: skip
    LIBRARY.impl(f"grouped_{_name}", _reference, "CPU")
    LIBRARY.impl(f"grouped_{_name}", _cuda, "CUDA")
    torch.library.register_fake(f"ppf::grouped_{_name}", _fake, lib=LIBRARY)

"""P policies at once: every group of tokens meets its own prefix of the same weights, one launch per projection.

``widths`` are host integers, checked before the launch; their device tables are cached, so a first call outside the
capture makes a CUDA graph of the second possible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from . import dispatch
from .library import LIBRARY

LIBRARY.define("grouped_outputs(Tensor x, Tensor weight, int[] widths) -> Tensor")
LIBRARY.define("grouped_inputs(Tensor x, Tensor[] weights, int[] widths) -> Tensor")
LIBRARY.define("grouped_gate_up(Tensor x, Tensor gate, Tensor up, int[] widths) -> Tensor")


def grouped_masked_linear(
    x: Tensor, weight: Tensor | Sequence[Tensor], widths: Sequence[int], *, side: str = "output"
) -> Tensor:
    """Group p of x [P, T, K] times the prefix ``widths[p]`` of the weight.

    side "output": weight [N, K] or [P, N, K], the first widths[p] outputs: [P, T, max(widths)], zero past the width.
    side "input": the first widths[p] columns of x[p] and of the weight ([N, K'], [P, N, K'], or P tensors [N, K'] of
    one layout: refitted weights), K, K' >= max(widths): [P, T, N]. What lies past a width is not used. Inference only
    (no gradient). Raises ``InputError`` for operands that do not fit.
    """
    if side not in ("output", "input"):
        raise InputError("side", side, "is not a side of a linear layer", "Use 'output' or 'input'")
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    widths = _check(x, {"weight": weights}, widths)
    if side == "output":
        _check_matrix("weight", weights, len(widths), (max(widths), x.shape[2]), exact=(False, True))
        if len(weights) > 1:
            raise InputError("weight", f"{len(weights)} tensors", "is a list", "Stack the weights: [P, N, K]")
        return torch.ops.ppf.grouped_outputs(x, weights[0], widths)
    _check_matrix("weight", weights, len(widths), (0, max(widths)), exact=(False, False))
    if x.shape[2] < max(widths):
        raise InputError("x", list(x.shape), f"has fewer than {max(widths)} columns", "Give every kept input a column")
    return torch.ops.ppf.grouped_inputs(x, weights, widths)


def grouped_masked_swiglu(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor | Sequence[Tensor], widths: Sequence[int]
) -> Tensor:
    """The MLPs of P policies: x [P, T, H], gate and up [C, H], channels ranked so that policy p keeps the first
    widths[p]; down [H, C] for all, [P, H, C], or P tensors [H, C] (refitted). Returns [P, T, H]. Inference only.

    Raises ``InputError`` for operands that do not fit.
    """
    downs = [down] if isinstance(down, Tensor) else list(down)
    widths = _check(x, {"gate": [gate], "up": [up], "down": downs}, widths)
    for name, weight in (("gate", gate), ("up", up)):
        if weight.shape != gate.shape or weight.dim() != 2:
            raise InputError(name, list(weight.shape), "is not [C, H] like gate", "Give both as nn.Linear holds them")
        _check_matrix(name, [weight], len(widths), (max(widths), x.shape[2]), exact=(False, True))
    _check_matrix("down", downs, len(widths), (x.shape[2], max(widths)), exact=(True, False))
    act = torch.ops.ppf.grouped_gate_up(x, gate, up, widths)
    return torch.ops.ppf.grouped_inputs(act, downs, widths)


def _check(x: Tensor, weights: dict[str, list[Tensor]], widths: Sequence[int]) -> list[int]:
    """The widths as a list, once x, dtypes, devices and the number of groups agree."""
    widths = [int(w) for w in widths]
    if x.dim() != 3 or x.shape[0] != len(widths) or not widths:
        remedy = f"Give [P, T, inputs] with one group for each of the {len(widths)} widths"
        raise InputError("x", list(x.shape), "does not hold one group per width", remedy)
    if min(widths) < 0:
        raise InputError("widths", min(widths), "is negative", "Give the number of kept units of every policy")
    for name, tensors in weights.items():
        for tensor in tensors:
            if tensor.dtype != x.dtype or tensor.device != x.device:
                shown = f"{tensor.dtype} on {tensor.device}"
                raise InputError(name, shown, f"differs from x ({x.dtype} on {x.device})", "Cast or move one of them")
    return widths


def _check_matrix(
    name: str, weights: list[Tensor], groups: int, least: tuple[int, int], exact: tuple[bool, bool]
) -> None:
    """Raise ``InputError`` unless the weights are one layout, 1 or P of them, and hold ``least`` rows and columns."""
    first = weights[0]
    stacked = first.dim() == 3 and len(weights) == 1 and first.shape[0] == groups
    if not stacked and (first.dim() != 2 or len(weights) not in (1, groups)):
        shown = f"{len(weights)} x {list(first.shape)}"
        raise InputError(name, shown, "is not one matrix for all groups or one each", f"Give 1 or {groups}")
    if any(w.shape != first.shape or w.stride() != first.stride() for w in weights):
        raise InputError(name, [list(w.shape) for w in weights], "differ in layout", "Give all weights in one layout")
    for size, wanted, is_exact in zip(first.shape[-2:], least, exact, strict=True):
        if size < wanted or (is_exact and size != wanted):
            shape = f"needs {'exactly' if is_exact else 'at least'} {wanted} where it has {size}"
            raise InputError(name, list(first.shape), shape, "Check the shapes and the widths")


def _weight(weights: Sequence[Tensor], group: int) -> Tensor:
    if len(weights) > 1:
        return weights[group]
    return weights[0][group] if weights[0].dim() == 3 else weights[0]


def grouped_outputs_reference(x: Tensor, weight: Tensor, widths: Sequence[int]) -> Tensor:
    """One product per group, written into its prefix of zeros [P, T, max(widths)]."""
    y = x.new_zeros(*x.shape[:2], max(widths))
    for p, width in enumerate(widths):
        y[p, :, :width] = F.linear(x[p], _weight([weight], p)[:width])
    return y


def grouped_inputs_reference(x: Tensor, weights: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """One product per group over its first widths[p] columns: [P, T, N]."""
    # A copy of x: in bf16 on CPUs with AMX, torch multiplies what lies past the columns of a view with zeros, NaN too.
    kept = [x[p, :, :w].contiguous() for p, w in enumerate(widths)]
    return torch.stack([F.linear(part, _weight(weights, p)[:, : part.shape[1]]) for p, part in enumerate(kept)])


def grouped_gate_up_reference(x: Tensor, gate: Tensor, up: Tensor, widths: Sequence[int]) -> Tensor:
    """silu·mul of every group's prefix, in [P, T, W] with W = max(widths) rounded up to 64; zero past the width."""
    h = x.new_zeros(*x.shape[:2], _padded(widths))
    for p, width in enumerate(widths):
        h[p, :, :width] = F.silu(F.linear(x[p], gate[:width])) * F.linear(x[p], up[:width])
    return h


def _padded(widths: Sequence[int]) -> int:
    return (max(widths) + 63) // 64 * 64


def _applies(x: Tensor, *weights: Tensor) -> bool:
    return x.numel() > 0 and dispatch.kernels_apply(x, *weights) and dispatch.copy_engine(x, *weights)


def _stackable(weights: Sequence[Tensor]) -> bool:
    return all(w.dim() == 2 or w.is_contiguous() for w in weights)


def _grouped_outputs_cuda(x: Tensor, weight: Tensor, widths: Sequence[int]) -> Tensor:
    x = x.contiguous()
    if max(widths) == 0 or not (_applies(x, weight) and weight.is_contiguous()):
        return grouped_outputs_reference(x, weight, widths)
    from ppf.kernels import grouped

    return grouped.outputs(x, weight, tuple(widths))


def _grouped_inputs_cuda(x: Tensor, weights: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    x = x.contiguous()
    if max(widths) == 0 or not (_applies(x, *weights) and _stackable(weights)):
        return grouped_inputs_reference(x, weights, widths)
    from ppf.kernels import grouped

    return grouped.inputs(x, list(weights), tuple(widths))


def _grouped_gate_up_cuda(x: Tensor, gate: Tensor, up: Tensor, widths: Sequence[int]) -> Tensor:
    x = x.contiguous()
    if max(widths) == 0 or not _applies(x, gate, up):
        return grouped_gate_up_reference(x, gate, up, widths)
    from ppf.kernels import grouped

    return grouped.gate_up(x, gate, up, tuple(widths))


def _grouped_outputs_fake(x: Tensor, weight: Tensor, widths: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:2], max(widths))


def _grouped_inputs_fake(x: Tensor, weights: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:2], weights[0].shape[-2])


def _grouped_gate_up_fake(x: Tensor, gate: Tensor, up: Tensor, widths: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:2], _padded(widths))


for _name, _reference, _cuda, _fake in (
    ("grouped_outputs", grouped_outputs_reference, _grouped_outputs_cuda, _grouped_outputs_fake),
    ("grouped_inputs", grouped_inputs_reference, _grouped_inputs_cuda, _grouped_inputs_fake),
    ("grouped_gate_up", grouped_gate_up_reference, _grouped_gate_up_cuda, _grouped_gate_up_fake),
):
    LIBRARY.impl(_name, _reference, "CPU")
    LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"ppf::{_name}", _fake, lib=LIBRARY)

"""Elementwise steps of a forward pass that torch would spread over several kernels: inference only, no gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .library import LIBRARY

LIBRARY.define("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor")
LIBRARY.define("silu_mul(Tensor gate, Tensor up) -> Tensor")
LIBRARY.define("row_losses(Tensor logits, Tensor targets) -> Tensor")


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, heads, d] at positions 0…T-1; cos and sin [T, d] in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise."""
    return F.silu(gate) * up


def row_losses_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of every row, fp32 [rows]; logits [rows, vocabulary], targets int64 [rows]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _rotate_cuda(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    plain = x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] and cos.is_contiguous() and sin.is_contiguous()
    if not (x.numel() and plain and dispatch.triton_available()):
        return rotate_reference(x, cos, sin)
    from ppf.kernels import elementwise

    return elementwise.rotate(x, cos, sin)


def _silu_mul_cuda(gate: Tensor, up: Tensor) -> Tensor:
    plain = gate.shape == up.shape and gate.dtype == up.dtype != torch.float64 and _in_rows(gate) and _in_rows(up)
    if not (gate.numel() and plain and dispatch.triton_available()):
        return silu_mul_reference(gate, up)
    from ppf.kernels import elementwise

    return elementwise.silu_mul(gate, up)


def _in_rows(x: Tensor) -> bool:
    """Contiguous, or a matrix whose rows are: the prefix of a wider product."""
    return x.is_contiguous() or (x.dim() == 2 and x.stride(-1) == 1)


def _row_losses_cuda(logits: Tensor, targets: Tensor) -> Tensor:
    if not (logits.numel() and logits.is_contiguous() and targets.is_contiguous() and dispatch.triton_available()):
        return row_losses_reference(logits, targets)
    from ppf.kernels import elementwise

    return elementwise.losses(logits, targets)


for _name, _reference, _cuda, _fake in (
    ("rotate", rotate_reference, _rotate_cuda, lambda x, cos, sin: torch.empty_like(x)),
    ("silu_mul", silu_mul_reference, _silu_mul_cuda, lambda gate, up: torch.empty_like(gate)),
    (
        "row_losses",
        row_losses_reference,
        _row_losses_cuda,
        lambda logits, targets: logits.new_empty(len(logits), dtype=torch.float32),
    ),
):
    LIBRARY.impl(_name, _reference, "CPU")
    LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"ppf::{_name}", _fake, lib=LIBRARY)

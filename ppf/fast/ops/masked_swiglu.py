"""``masked_swiglu``: a Llama MLP of kept channels, silu(x·gateᵀ)·(x·upᵀ)·downᵀ, without materialising its weights.

Gate, up and silu·mul are one kernel; down is ``masked_linear`` with a selection on its input side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from . import dispatch, many_tokens
from .library import LIBRARY
from .masked_linear import as_tokens, check_columns, check_operands, masked_linear, masked_linear_cuda
from .selection import PREFIX, Selection

LIBRARY.define(
    "masked_swiglu(Tensor x, Tensor gate, Tensor up, Tensor down, int kind, int width, Tensor? rows, Tensor? blocks, "
    "bool down_transposed) -> Tensor"
)


def masked_swiglu(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, selection: Selection | None = None, *,
    down_transposed: bool = False,
) -> Tensor:  # fmt: skip
    """The MLP that keeps the selected channels.

    x: [..., H]; gate, up: [C, H]; down: [H, C], or [C, H] with ``down_transposed`` (then pruned channels are whole rows
    there too, and 1 to 16 tokens under an arbitrary index list read only what is kept); ``selection`` over C channels.
    Returns [..., H]; zeros if no channel is kept. Differentiable in x and the weights. Raises ``InputError`` for
    operands that do not fit.
    """
    check_operands(x, gate=gate, up=up, down=down)
    channels, hidden = gate.shape
    check_shapes(up, down, channels, hidden, down_transposed)
    check_columns(x, hidden)
    selection = selection or Selection.full(channels)
    selection.check("selection", channels)
    tokens = as_tokens(x)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate, up, down)):
        act = F.silu(masked_linear(tokens, gate, selection)) * masked_linear(tokens, up, selection)
        return masked_linear(act, down, in_selection=selection, transposed=down_transposed).view(x.shape)
    device = x.device
    y = torch.ops.ppf.masked_swiglu(
        tokens, gate, up, down, selection.input_kind, selection.width, selection.rows(device),
        selection.block_list(device), down_transposed,
    )  # fmt: skip
    return y.view(x.shape)


def check_shapes(up: Tensor, down: Tensor, channels: int, hidden: int, down_transposed: bool) -> None:
    """Raise ``InputError`` unless up and down fit a gate of [channels, hidden]."""
    if up.shape != (channels, hidden):
        raise InputError("up", list(up.shape), f"differs from gate, [{channels}, {hidden}]", "Give both as [C, H]")
    expected = (channels, hidden) if down_transposed else (hidden, channels)
    if down.shape != expected:
        remedy = f"Give {list(expected)}, or change down_transposed (now {down_transposed})"
        raise InputError("down", list(down.shape), "does not fit gate and up", remedy)


def masked_swiglu_reference(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, kind: int, width: int, rows: Tensor | None,
    blocks: Tensor | None, down_transposed: bool,
) -> Tensor:  # fmt: skip
    """The same on any device, by slicing and selecting: x [t, H] -> [t, H]."""
    act = _hidden_reference(x, gate, up, width, rows)
    kept = dispatch.take(down, 0 if down_transposed else 1, width, rows)
    return F.linear(act, kept.t() if down_transposed else kept)


def _hidden_reference(x: Tensor, gate: Tensor, up: Tensor, width: int, rows: Tensor | None) -> Tensor:
    kept = [F.linear(x, dispatch.take(w, 0, width, rows)) for w in (gate, up)]
    return F.silu(kept[0]) * kept[1]


def _hidden_cuda(
    x: Tensor, gate: Tensor, up: Tensor, kind: int, width: int, rows: Tensor | None, blocks: Tensor | None
) -> Tensor:
    path = dispatch.hidden_path(x, gate, up, kind, width)
    if path == "reference":
        return _hidden_reference(x, gate, up, width, rows)
    if path == "rows":
        from ppf.kernels import gemv

        return gemv.rows(x, (gate, up), rows, width)
    if path == "native":
        return many_tokens.gate_up(x, gate, up, rows, width)
    if path == "blocks":
        from ppf.kernels.blocks import gate_up_blocks

        return gate_up_blocks(x, gate, up, blocks)
    from ppf.kernels import masked_swiglu as tiles

    if path == "tiles":
        return tiles.gate_up(x, gate, up, rows, width)
    kept = [F.linear(x, dispatch.compact(w, 0, width, rows)) for w in (gate, up)]
    return tiles.multiply_silu(*kept)


def _masked_swiglu_cuda(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, kind: int, width: int, rows: Tensor | None,
    blocks: Tensor | None, down_transposed: bool,
) -> Tensor:  # fmt: skip
    act = _hidden_cuda(x, gate, up, kind, width, rows, blocks)
    return masked_linear_cuda(act, down, PREFIX, gate.shape[1], None, None, kind, width, rows, blocks, down_transposed)


def _masked_swiglu_fake(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, kind: int, width: int, rows: Tensor | None,
    blocks: Tensor | None, down_transposed: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


LIBRARY.impl("masked_swiglu", masked_swiglu_reference, "CPU")
LIBRARY.impl("masked_swiglu", _masked_swiglu_cuda, "CUDA")
torch.library.register_fake("ppf::masked_swiglu", _masked_swiglu_fake, lib=LIBRARY)

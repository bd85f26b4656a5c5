"""A layer as ``ppf.fast.ops.members`` takes it: its weights put together, and what transformers tells it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.grid import Grid
from ..model.views import Attention, FeedForward
from .ops.members import interleave, interleave_heads
from .outputs import Outputs


@dataclass(frozen=True)
class PreparedAttention:
    """G kv-groups of g query heads of d numbers each; norms are fp32 or have the other weights' dtype."""

    norm: Tensor  # [hidden]
    qkv: Tensor  # [G·(g+2)·d, hidden]
    bias: Tensor | None  # [G·(g+2)·d]
    head_norm: Tensor | None  # fp32 [(g+2)·d]
    o: Tensor  # [levels, hidden, G·g·d]
    o_bias: Tensor | None  # [hidden]
    after: Tensor | None  # [hidden]


@dataclass(frozen=True)
class PreparedFeedForward:
    """C channels."""

    norm: Tensor  # [hidden]
    gate_up: Tensor  # [2C, hidden]
    bias: Tensor | None  # [2C]
    down: Tensor  # [levels, hidden, C]
    down_bias: Tensor | None  # [hidden]
    after: Tensor | None  # [hidden]


@dataclass(frozen=True)
class PreparedLayer:
    """One layer's weights. An absent sub-layer has no units, and a norm that nothing comes of."""

    attention: PreparedAttention
    ffn: PreparedFeedForward


@dataclass(frozen=True)
class Told:
    """What a layer knows of positions: cos and sin fp32 [T, d/2], what scores are multiplied by, and how many keys a
    query sees (0 if all before it)."""

    cos: Tensor
    sin: Tensor
    scale: float
    window: int


def prepared(decoder: Decoder, grid: Grid, library: Outputs | None, index: int) -> PreparedLayer:
    """Layer ``index`` of ``decoder``, whose units are in ranking order, with the o and down of every level."""
    return PreparedLayer(_attention(decoder, grid, library, index), _ffn(decoder, grid, library, index))


def told(decoder: Decoder, length: int) -> list[Told]:
    """What transformers tells every layer about sequences of ``length``; what layers have in common is kept once."""
    pairs: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
    found = []
    for index, arguments in enumerate(decoder.frame.context(1, length)):
        scale, rotates = _scale_and_rotation(decoder, index)
        pair = arguments["position_embeddings"]
        key = id(pair[0]), rotates
        if key not in pairs:
            pairs[key] = _half(*pair, rotates)
        found.append(Told(*pairs[key], scale, _window(arguments.get("attention_mask"), length)))
    return found


def norm_weight(decoder: Decoder, weight: Tensor) -> Tensor:
    """What a norm multiplies by: ``weight``, or 1 + ``weight`` in fp32, for 16 bits would round most of it away."""
    return 1 + weight.float() if "one-plus norm" in decoder.traits else weight


def _attention(decoder: Decoder, grid: Grid, library: Outputs | None, index: int) -> PreparedAttention:
    d, sublayer = grid.structure.head_dim, grid.structure.attention[index]
    w, heads = _attention_views(decoder, index, sublayer.units), sublayer.columns // d
    return PreparedAttention(
        norm_weight(decoder, w.norm),
        _grouped(w.q, w.k, w.v, heads, d),
        _joined(lambda *biases: _grouped(*biases, heads, d), (w.q, w.k, w.v), (w.q_bias, w.k_bias, w.v_bias)),
        _head_norm(decoder, w, heads, d),
        _levels(library, w.o, index, grid),
        w.o_bias,
        None if w.after is None else norm_weight(decoder, w.after),
    )


def _ffn(decoder: Decoder, grid: Grid, library: Outputs | None, index: int) -> PreparedFeedForward:
    s = grid.structure
    w = _ffn_views(decoder, index, s.ffn[index].units)
    return PreparedFeedForward(
        norm_weight(decoder, w.norm),
        interleave(w.gate, w.up),
        _joined(interleave, (w.gate, w.up), (w.gate_bias, w.up_bias)),
        _levels(library, w.down, s.layers + index, grid),
        w.down_bias,
        None if w.after is None else norm_weight(decoder, w.after),
    )


def _attention_views(decoder: Decoder, index: int, units: int) -> Attention:
    """An absent sub-layer gets matrices without units, and a norm, for the kernels read one in any case."""
    if units:
        return decoder.attention(index, units)
    none = decoder.frame.head.new_empty(0, decoder.structure.hidden)
    return Attention(torch.ones_like(decoder.frame.head[0]), none, none, none, none.T)


def _ffn_views(decoder: Decoder, index: int, units: int) -> FeedForward:
    if units:
        return decoder.ffn(index, units)
    none = decoder.frame.head.new_empty(0, decoder.structure.hidden)
    return FeedForward(torch.ones_like(decoder.frame.head[0]), none, none, none.T)


def _grouped(q: Tensor, k: Tensor, v: Tensor, heads: int, d: int) -> Tensor:
    """[G·(g+2)·d, …]: of every kv-group the rows of its query heads, of its key and of its value."""
    parts = (interleave_heads(q, d), heads * d), (interleave_heads(k, d), d), (v, d)
    return torch.cat([part.unflatten(0, (-1, rows)) for part, rows in parts], 1).flatten(0, 1)


def _joined(join: Callable[..., Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """The biases in the order of the joined weights' rows, zeros where only others have one; None if there is none."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return join(*(weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs))


def _head_norm(decoder: Decoder, w: Attention, heads: int, d: int) -> Tensor | None:
    if w.q_norm is None or w.k_norm is None:
        return None
    q, k = (interleave_heads(norm_weight(decoder, weight).float(), d) for weight in (w.q_norm, w.k_norm))
    return torch.cat((q.repeat(heads), k, torch.ones_like(k)))


def _levels(library: Outputs | None, dense: Tensor, sublayer: int, grid: Grid) -> Tensor:
    """[levels, hidden, n]: the refitted output projections, or every time the dense one."""
    if library is None or not dense.shape[1]:
        return dense.expand(grid.maximum[sublayer] + 1, -1, -1)
    return library.levels(sublayer)


def _scale_and_rotation(decoder: Decoder, index: int) -> tuple[float, bool]:
    """What scores are multiplied by and whether queries and keys are rotated, from transformers' own layer."""
    if not (units := decoder.structure.attention[index].units):
        return 1.0, True
    layer = decoder.reference.module(index, {"attention": units, "ffn": 0})
    module = layer.get_submodule(decoder.family.attention.module)
    return float(module.scaling), bool(getattr(module, "use_rope", True))


def _half(cos: Tensor, sin: Tensor, rotates: bool) -> tuple[Tensor, Tensor]:
    """[T, d/2] fp32 of cos and sin [1, T, d], whose halves are alike; the angle 0 for layers that do not rotate."""
    cos, sin = (t[0, :, : t.shape[2] // 2].float().contiguous() for t in (cos, sin))
    return (cos, sin) if rotates else (torch.ones_like(cos), torch.zeros_like(sin))


def _window(mask: Tensor | None, length: int) -> int:
    """From a mask [1, 1, T, T] over keys, bool or added to scores; transformers leaves out one that is only causal."""
    if mask is None:
        return 0
    last = mask[0, 0, -1]
    seen = int((last if last.dtype is torch.bool else last == 0).sum())
    return seen if seen < length else 0

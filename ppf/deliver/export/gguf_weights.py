"""A checkpoint's weights as llama.cpp wants them: under its names, rows in its order, constant factors multiplied in.

llama.cpp's ``deci`` graph cannot run some policies as they are: it silently skips a layer whose FFN width is 0 together
with its attention; it aborts in generation if the last layer has no FFN; and it takes the head size from layer 0. The
first two are met by an FFN of width 32 that is all zeros, the third by refusing. ``openelm`` knows no absent
sub-layers at all: they become that FFN, and an attention of one head that is all zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ...errors import InputError
from ...families.traits import logit_scale
from ...model.build import LAYERS, TIED
from ...model.layer import LayerMap
from ...model.views import Attention, attention_of, ffn_of
from .gguf_architectures import Architecture
from .gguf_rope import Rotation
from .source import LAYER_0, Source

ZERO_FFN = 32
"""Width of an FFN that adds nothing: one block of q8_0."""

Named = Iterator[tuple[str, Tensor]]
_EMBEDDING, _LAST_NORM = TIED[1], "model.norm.weight"
# Layers for which llama.cpp computes the score scale of Gemma 27B from the heads, not from the head size.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}


@dataclass(frozen=True)
class Factors:
    """Constants of a model that its graph does not know, to be multiplied into weights."""

    query: float = 1.0
    residual: float = 1.0
    embedding: float = 1.0
    last: float = 1.0


def needs_zero_ffn(widths: list[tuple[int, int, int]], index: int) -> bool:
    """Whether layer ``index`` must get an FFN of zeros in ``deci``: it has none, but has attention or is the last."""
    heads, _, channels = widths[index]
    return not channels and (heads > 0 or index == len(widths) - 1)


def written_widths(source: Source, architecture: Architecture) -> list[tuple[int, int, int]]:
    """(query heads, kv heads, FFN width) of every layer as the file states them, sub-layers of zeros included.

    Raises ``InputError`` if layer 0 has no attention.
    """
    widths = source.widths
    if not widths[0][0]:
        problem = "llama.cpp takes the head size of all layers from layer 0, which has no attention"
        raise InputError("attention heads of layer 0", 0, problem, LAYER_0)
    if architecture.name == "openelm":
        return [(heads or 1, kv_heads or 1, channels or ZERO_FFN) for heads, kv_heads, channels in widths]
    return [
        (heads, kv_heads, ZERO_FFN if needs_zero_ffn(widths, index) else channels)
        for index, (heads, kv_heads, channels) in enumerate(widths)
    ]


def factors_of(source: Source, architecture: Architecture) -> Factors:
    """What must be multiplied into the weights; ``granite`` has fields for its multipliers."""
    config, own = source.config, architecture.name
    if own == "granite":
        return Factors()
    heads, size = source.widths[0][0], source.head_dim
    if config.num_hidden_layers == _GEMMA_27B.get(own):
        size = config.hidden_size // heads
    query = _score_scale(source) * sqrt(size)
    if "one-plus norm" in source.traits:  # Gemma's graphs scale the embedding as it does
        return Factors(query)
    embedding = getattr(config, "embedding_multiplier", 1.0)
    # A tied head sees the scaled embedding; the norm before it takes that back.
    last = 1 / logit_scale(config) / (embedding if config.tie_word_embeddings else 1.0)
    return Factors(query, getattr(config, "residual_multiplier", 1.0), embedding, last)


def weights(
    source: Source, architecture: Architecture, rotation: Rotation, read: Callable[[str], Tensor] | None = None
) -> Named:
    """Everything the file holds, in layer order: GGUF name and tensor, in the stored dtype or fp32.

    ``read`` gives a stored tensor by its name, by default from disk; one layer is in memory at a time.
    """
    read, factors = read or source.tensor, factors_of(source, architecture)
    shift = float("one-plus norm" in source.traits)
    yield "token_embd.weight", _times(read(_EMBEDDING), factors.embedding)
    if architecture.head == "stored" and source.config.tie_word_embeddings:
        yield "output.weight", read(_EMBEDDING)
    yield from rotation.tensors.items()
    writer = _Layers(source, architecture, rotation, factors, shift)
    for index in range(len(source.widths)):
        prefix = f"{LAYERS}{index}."
        layer = {name.removeprefix(prefix): read(name) for name in source.stored if name.startswith(prefix)}
        yield from ((f"blk.{index}.{name}", tensor) for name, tensor in writer.layer(index, layer))
    yield "output_norm.weight", _times(_plus(read(_LAST_NORM), shift), factors.last)
    if not source.config.tie_word_embeddings:
        yield "output.weight", read(TIED[0])


def planned(source: Source, architecture: Architecture, rotation: Rotation) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of everything that :func:`weights` gives, without reading any."""

    def read(name: str) -> Tensor:
        return torch.empty(source.stored[name].shape, device="meta")

    return [(name, tuple(tensor.shape)) for name, tensor in weights(source, architecture, rotation, read)]


def paired_rows(rows: Tensor, heads: int, rotated: int) -> Tensor:
    """Rows of queries or keys [heads · head_dim, …] in the order of a rotation of neighbouring rows.

    transformers rotates row j of a head with row j + rotated/2, llama.cpp row 2j with row 2j + 1.
    """
    of_head = rows.unflatten(0, (heads, -1))
    turned = of_head[:, :rotated].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat((turned, of_head[:, rotated:]), 1).flatten(0, 1)


@dataclass(frozen=True)
class _Layers:
    """What every layer is written with."""

    source: Source
    architecture: Architecture
    rotation: Rotation
    factors: Factors
    shift: float

    def layer(self, index: int, layer: Mapping[str, Tensor]) -> Named:
        """Names inside the block, and tensors."""
        heads, groups, channels = self.source.widths[index]
        if groups:
            yield from self._attention(index, layer, heads, groups)
        elif self.architecture.name == "openelm":
            yield from self._zero_attention()
        if channels:
            yield from self._ffn(index, layer, channels)
        elif written_widths(self.source, self.architecture)[index][2]:
            yield from self._zero_ffn()

    def _attention(self, index: int, layer: Mapping[str, Tensor], heads: int, groups: int) -> Named:
        family = self.source.family
        found = attention_of(family, LayerMap(family, self.source.structure, index), layer, groups)
        # Norms over all heads together are no head norms of a declaration.
        q_norm, k_norm = (layer.get(f"{family.attention.module}.{role}_norm.weight") for role in ("q", "k"))
        q_norm, k_norm = (q_norm, k_norm) if found.q_norm is None else (found.q_norm, found.k_norm)
        yield from self._norm("attn_norm", found.norm)
        yield from self._norm("attn_q_norm", q_norm, self.factors.query)
        yield from self._norm("attn_k_norm", k_norm)
        yield from self._rows(found, heads, groups, self.factors.query if q_norm is None else 1.0)
        yield from _both("attn_output", found.o, found.o_bias, self.factors.residual)
        yield from self._norm("post_attention_norm", found.after)

    def _rows(self, found: Attention, heads: int, groups: int, scale: float) -> Named:
        """Queries, keys and values; queries are multiplied by ``scale``."""
        rows = {
            "attn_q": (self._turned(found.q, heads, scale), self._turned(found.q_bias, heads, scale)),
            "attn_k": (self._turned(found.k, groups), self._turned(found.k_bias, groups)),
            "attn_v": (found.v, found.v_bias),
        }
        if "qkv" in self.architecture.fused:
            yield "attn_qkv.weight", torch.cat([weight for weight, _ in rows.values()])
        else:
            for name, (weight, bias) in rows.items():
                yield from _both(name, weight, bias)

    def _ffn(self, index: int, layer: Mapping[str, Tensor], channels: int) -> Named:
        family = self.source.family
        found = ffn_of(family, LayerMap(family, self.source.structure, index), layer, channels)
        yield from self._norm("ffn_norm", found.norm)
        if "gate and up" in self.architecture.fused:
            yield "ffn_up.weight", torch.cat((found.gate, found.up))
        else:
            yield from _both("ffn_gate", found.gate, found.gate_bias)
            yield from _both("ffn_up", found.up, found.up_bias)
        yield from _both("ffn_down", found.down, found.down_bias, self.factors.residual)
        yield from self._norm("post_ffw_norm", found.after)

    def _norm(self, name: str, weight: Tensor | None, scale: float = 1.0) -> Named:
        if weight is not None:
            yield f"{name}.weight", _times(_plus(weight, self.shift), scale)

    def _turned(self, rows: Tensor | None, heads: int, scale: float = 1.0) -> Tensor | None:
        """Rows of queries or keys, in the architecture's order, scaled, rotated ones stretched too."""
        if rows is None:
            return None
        rotated, rows = self.rotation.rotated, _times(rows, scale)
        if self.rotation.stretch != 1.0:
            rows = rows.float().unflatten(0, (heads, -1))
            rows = torch.cat((rows[:, :rotated] * self.rotation.stretch, rows[:, rotated:]), 1).flatten(0, 1)
        return paired_rows(rows, heads, rotated) if self.architecture.paired else rows

    def _zero_attention(self) -> Named:
        hidden, size = self.source.config.hidden_size, self.source.head_dim
        yield "attn_norm.weight", torch.ones(hidden)
        for role in ("q", "k"):
            yield f"attn_{role}_norm.weight", torch.ones(size)
        yield "attn_qkv.weight", torch.zeros(3 * size, hidden)
        yield "attn_output.weight", torch.zeros(hidden, size)

    def _zero_ffn(self) -> Named:
        hidden = self.source.config.hidden_size
        yield "ffn_norm.weight", torch.ones(hidden)
        for name in ("ffn_gate", "ffn_up"):
            yield f"{name}.weight", torch.zeros(ZERO_FFN, hidden)
        yield "ffn_down.weight", torch.zeros(hidden, ZERO_FFN)


def _score_scale(source: Source) -> float:
    """What the model multiplies scores by."""
    scalar = getattr(source.config, "query_pre_attn_scalar", None)
    usual = (source.head_dim if scalar is None else scalar) ** -0.5
    return getattr(source.config, "attention_multiplier", usual)


def _both(name: str, weight: Tensor, bias: Tensor | None, scale: float = 1.0) -> Named:
    yield f"{name}.weight", _times(weight, scale)
    if bias is not None:
        yield f"{name}.bias", _times(bias, scale)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if abs(factor - 1) < 1e-9 else tensor.float() * factor


def _plus(tensor: Tensor, shift: float) -> Tensor:
    return tensor.float() + shift if shift else tensor

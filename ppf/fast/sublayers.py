"""A decoder one sub-layer at a time, each stopping at a given width: by fused operations, or by transformers' layers.

Weights stand in ranking order, so a width is a prefix: rows [0, w) of the projections are views, nothing is copied, and
cuBLAS runs on them as fast as on physically shrunk matrices. The fused way spells out what the traits it serves mean;
tests compare it with transformers' own layers for every family that it claims. All others take those.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..families import KINDS
from ..families.traits import activation, unserved
from ..model.decoder import Decoder
from ..model.views import Attention, FeedForward
from .ops import elementwise  # noqa: F401  (defines the ops)

SERVES = frozenset({
    "window", "head norm", "activation", "sandwich norms", "post-norms", "one-plus norm", "score scale",
    "several rotations", "scaled embedding", "logit transform", "residual scale", "length-dependent rotation",
})  # fmt: skip
_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}

Told = dict[str, Any]


class SubLayers(Protocol):
    """Runs one sub-layer of a layer."""

    def __call__(self, index: int, kind: str, width: int, output: Tensor | None, x: Tensor, told: Told) -> Tensor:
        """x [B, T, H] after sub-layer ``kind`` of layer ``index`` with its first ``width`` units; may overwrite x.

        ``output`` [H, columns] replaces the output projection; ``told`` is the layer's entry of
        :meth:`ppf.model.frame.Frame.context`."""


def sublayers_of(decoder: Decoder) -> SubLayers:
    """The fused way where it serves all traits of the model, else transformers' layers, which is said once."""
    reason = unserved(decoder.traits, SERVES)
    if reason is None and activation(decoder.config) not in _ACTIVATIONS:
        reason = f"its activation is {activation(decoder.config)}"
    if reason is None:
        return Fused(decoder)
    warnings.warn(f"ppf: evaluation runs transformers' own layers for this model: {reason}", stacklevel=2)
    return ByReference(decoder)


class ByReference:
    """transformers' own layers, each as the layer that has only the sub-layer at hand."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def __call__(self, index: int, kind: str, width: int, output: Tensor | None, x: Tensor, told: Told) -> Tensor:
        d = self.decoder
        tensors = d.names(index).prefix(d.layers[index], kind, width, output)
        return d.reference(index, dict.fromkeys(KINDS, 0) | {kind: width}, tensors, x, told)


class Fused:
    """Few kernels a sub-layer; inference only."""

    def __init__(self, decoder: Decoder):
        s, config = decoder.structure, decoder.config
        self.decoder = decoder
        self._views: tuple[tuple[int, str], Attention | FeedForward] | None = None
        self.epsilon = config.rms_norm_eps
        self.one_plus = "one-plus norm" in decoder.traits
        self.residual = float(getattr(config, "residual_multiplier", 1.0))
        self.score_scale = _score_scale(config, s.head_dim)
        self.activation = activation(config)

    def __call__(self, index: int, kind: str, width: int, output: Tensor | None, x: Tensor, told: Told) -> Tensor:
        if kind == "attention":
            view = self._view(index, kind).prefix(width, output)
            return self._add(x, self._attend(self._norm(x, view.norm), view, told), view.o, view.o_bias, view.after)
        view = self._view(index, kind).prefix(width, output)
        inner = self._hidden(self._norm(x, view.norm), view)
        return self._add(x, inner, view.down, view.down_bias, view.after)

    def _view(self, index: int, kind: str) -> Attention | FeedForward:
        """The whole sub-layer; kept while it is asked for, since a layer may be a stream's."""
        if self._views is None or self._views[0] != (index, kind):
            self._views = None  # let go of the layer before
            units, of = self.decoder.structure.of(kind)[index].units, getattr(self.decoder, kind)
            self._views = (index, kind), of(index, units)
        return self._views[1]

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """RMSNorm over the last dimension, computed in fp32 inside; x itself where there is none."""
        if weight is None:
            return x
        if self.one_plus:
            return F.rms_norm(x.float(), weight.shape, 1 + weight.float(), self.epsilon).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.epsilon)

    def _attend(self, x: Tensor, w: Attention, told: Told) -> Tensor:
        """Input of the output projection, [B, T, G·g·d]."""
        batch, length, _ = x.shape
        parts = (F.linear(x, w.q, w.q_bias), F.linear(x, w.k, w.k_bias), F.linear(x, w.v, w.v_bias))
        q, k, v = (part.view(batch, length, -1, w.head_dim) for part in parts)
        q, k = self._norm(q, w.q_norm), self._norm(k, w.k_norm)
        cos, sin = (t[0] for t in told["position_embeddings"])
        q, k = (torch.ops.ppf.rotate(part, cos, sin) for part in (q, k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mask, group = told.get("attention_mask"), q.shape[1] // k.shape[1]
        # On a CPU the grouped form is the slow one, and so it is on a GPU where there is a mask.
        if group > 1 and (not x.is_cuda or mask is not None):
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=self.score_scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        return out.transpose(1, 2).reshape(batch, length, -1)

    def _hidden(self, x: Tensor, w: FeedForward) -> Tensor:
        """Input of the output projection, [B, T, C]."""
        gate, up = F.linear(x, w.gate, w.gate_bias), F.linear(x, w.up, w.up_bias)
        if self.activation == "silu":
            return torch.ops.ppf.silu_mul(gate, up)
        return _ACTIVATIONS[self.activation](gate) * up

    def _add(self, x: Tensor, inner: Tensor, weight: Tensor, bias: Tensor | None, after: Tensor | None) -> Tensor:
        """x [B, T, H] plus what the sub-layer gives. On a GPU x itself takes the sum where nothing stands between."""
        if not x.is_cuda or bias is not None or after is not None:
            return x + self.residual * self._norm(F.linear(inner, weight, bias), after)
        flat = inner.reshape(-1, inner.shape[-1])
        x.view(-1, x.shape[-1]).addmm_(flat, weight.t(), alpha=self.residual)
        return x


def _score_scale(config: Any, head_dim: int) -> float:
    if getattr(config, "query_pre_attn_scalar", None) is not None:
        return float(config.query_pre_attn_scalar) ** -0.5
    given = getattr(config, "attention_multiplier", None)
    return float(head_dim**-0.5 if given is None else given)

"""The ops of a decoder that generates: one new token per sequence over a static cache, and a prompt's rotary embedding.

A cache holds keys and values [B, G, S, d] of one layer. ``start`` int32 [B] is each sequence's first position in it
(prompts are padded on the left), ``position`` int32 [1] the position of the token at hand, the same for all sequences.
``cos`` and ``sin`` fp32 [S, d/2] belong to positions counted from ``start``. An input is normalised (RMSNorm with
``gain``) inside the op that reads it. Biases and head norms (RMSNorm over each head's d numbers, after the bias and
before the rotation) are None where a model has none. Arguments are trusted: these are called hundreds of times a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import elementwise  # noqa: F401  (defines silu_mul)
from .library import LIBRARY

MAX_TOKENS = 64
Optional = Tensor | None

LIBRARY.define(
    "decode_qkv(Tensor x, Tensor gain, Tensor q, Tensor k, Tensor v, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, "
    "Tensor cos, Tensor sin, Tensor start, Tensor position, Tensor(a!) k_cache, Tensor(b!) v_cache, float epsilon, "
    "bool rotate) -> Tensor"
)
LIBRARY.define(
    "decode_attention(Tensor q, Tensor(a!) k_cache, Tensor v_cache, Tensor start, Tensor position, "
    "Tensor(b!) partial, Tensor(c!) statistics, Tensor(d!) arrived, int shares, float scale, int window, "
    "Tensor? q_norm, Tensor? k_norm, Tensor? cos, Tensor? sin, float epsilon) -> Tensor"
)
LIBRARY.define(
    "decode_gate_up(Tensor x, Tensor gain, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, float epsilon) "
    "-> Tensor"
)
LIBRARY.define("decode_add_linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y) -> ()")
LIBRARY.define("decode_head(Tensor x, Tensor gain, Tensor weight, Tensor(a!) y, float epsilon) -> ()")
LIBRARY.define(
    "decode_select(Tensor logits, Tensor eos, Tensor pad, Tensor(a!) finished, Tensor(b!) token, Tensor(c!) position) "
    "-> ()"
)
LIBRARY.define(
    "decode_rotary(Tensor(a!) q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, "
    "Tensor start, Tensor(b!) k_cache, Tensor(c!) v_cache, float epsilon) -> ()"
)


def qkv(
    x: Tensor, gain: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, start: Tensor,
    position: Tensor, k_cache: Tensor, v_cache: Tensor, epsilon: float,
    biases: tuple[Optional, Optional, Optional] = (None, None, None), rotate: bool = True,
) -> Tensor:  # fmt: skip
    """Queries [B, G·g·d] of x [B, H]; keys and values go to ``position`` of the caches.

    q: [G·g·d, H]; k, v: [G·d, H], all of one row pitch. ``biases`` of q, k, v: contiguous vectors, all three or none.
    Queries and keys are rotated, or, not ``rotate``, left to :func:`attention` with ``heads``. 1 <= B <= 64.
    """
    return torch.ops.ppf.decode_qkv(
        x, gain, q, k, v, *biases, cos, sin, start, position, k_cache, v_cache, epsilon, rotate
    )


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, position: Tensor, space: tuple[Tensor, Tensor, Tensor],
    shares: int, scale: float, window: int = 0, heads: tuple[Optional, Optional, Tensor, Tensor] | None = None,
    epsilon: float = 0.0,
) -> Tensor:  # fmt: skip
    """softmax(scale · q·kᵀ)·v over positions [start, position] of the caches: q [B, G·g·d] to the same shape.

    Of those positions only the last ``window`` are seen, if that is not 0. ``heads``: norms [d] of queries and of keys,
    cos and sin; q and the key at ``position`` are then normalised and rotated first, the key in the cache, too.
    ``space`` and ``shares``: from :func:`workspace`; calls that follow each other on one stream may share them.
    """
    return torch.ops.ppf.decode_attention(
        q, k_cache, v_cache, start, position, *space, shares, scale, window, *(heads or (None,) * 4), epsilon
    )


def gate_up(
    x: Tensor, gain: Tensor, gate: Tensor, up: Tensor, epsilon: float, biases: tuple[Optional, Optional] = (None, None)
) -> Tensor:
    """silu(n·gateᵀ + bias)·(n·upᵀ + bias) [B, C] for n = RMSNorm(x), x [B, H], gate and up [C, H], biases [C]."""
    return torch.ops.ppf.decode_gate_up(x, gain, gate, up, *biases, epsilon)


def add_linear(x: Tensor, weight: Tensor, y: Tensor, bias: Optional = None) -> None:
    """y [B, N] += x [B, K] · weightᵀ + bias [N], weight [N, K] with unit last stride."""
    torch.ops.ppf.decode_add_linear(x, weight, bias, y)


def head(x: Tensor, gain: Tensor, weight: Tensor, y: Tensor, epsilon: float) -> None:
    """Logits y fp32 [B, V] = RMSNorm(x) [B, H] · weightᵀ."""
    torch.ops.ppf.decode_head(x, gain, weight, y, epsilon)


def select(logits: Tensor, eos: Tensor, pad: Tensor, finished: Tensor, token: Tensor, position: Tensor) -> None:
    """``token`` int64 [B] = argmax of logits fp32 [B, V], or ``pad`` int64 [] where ``finished``; ``position`` += 1.

    ``finished`` int8 [B] becomes 1 where the token is one of ``eos`` int64 [8] (unused places are -1).
    """
    torch.ops.ppf.decode_select(logits, eos, pad, finished, token, position)


def rotary(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, start: Tensor, k_cache: Tensor, v_cache: Tensor,
    norms: tuple[Optional, Optional] = (None, None), epsilon: float = 0.0,
) -> None:  # fmt: skip
    """A prompt's q [B·T, G·g·d] rotated in place; rotated k and v [B·T, G·d] to positions [0, T) of the caches.

    ``norms`` [d] of q and k: every head is normalised before it is rotated.
    """
    torch.ops.ppf.decode_rotary(q, k, v, *norms, cos, sin, start, k_cache, v_cache, epsilon)


def multiply_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up of a prompt, [t, C] each, in one pass."""
    return torch.ops.ppf.silu_mul(gate, up)


def workspace(
    tokens: int, groups: int, group: int, head_dim: int, positions: int, device: torch.device
) -> tuple[int, tuple[Tensor, Tensor, Tensor]]:
    """Into how many shares :func:`attention` should split ``positions``, and the scratch tensors for that."""
    if device.type != "cuda":
        return 1, tuple(torch.empty(0, device=device) for _ in range(3))
    from ppf.kernels import decode_attention as kernels

    shares = kernels.splits(tokens, groups, positions, device)
    return shares, tuple(kernels.workspace(tokens, groups, group, head_dim, shares, device))


def _norm(x: Tensor, gain: Optional, epsilon: float) -> Tensor:
    return x if gain is None else F.rms_norm(x, (x.shape[-1],), gain, epsilon)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., d] by cos, sin [..., d/2] in fp32 (fp64 stays fp64)."""
    a, b = (x.double() if x.dtype is torch.float64 else x.float()).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def _angles(cos: Tensor, sin: Tensor, start: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, d/2] of every sequence's token at ``position``."""
    angle = (position.long() - start).clamp_min(0)
    return cos[angle][:, None], sin[angle][:, None]


def qkv_reference(
    x: Tensor, gain: Tensor, q: Tensor, k: Tensor, v: Tensor, q_bias: Optional, k_bias: Optional, v_bias: Optional,
    cos: Tensor, sin: Tensor, start: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, epsilon: float,
    rotate: bool,
) -> Tensor:  # fmt: skip
    n, at = _norm(x, gain, epsilon), position.long()
    groups, d = k_cache.shape[1], k_cache.shape[3]
    query, key, value = (F.linear(n, w, b).view(len(x), -1, d) for w, b in ((q, q_bias), (k, k_bias), (v, v_bias)))
    if rotate:
        query, key = (_turn(heads, *_angles(cos, sin, start, position)) for heads in (query, key))
    k_cache.index_copy_(2, at, key.view(-1, groups, 1, d))
    v_cache.index_copy_(2, at, value.view(-1, groups, 1, d))
    return query.flatten(1)


def attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, position: Tensor, partial: Tensor, statistics: Tensor,
    arrived: Tensor, shares: int, scale: float, window: int, q_norm: Optional, k_norm: Optional, cos: Optional,
    sin: Optional, epsilon: float,
) -> Tensor:  # fmt: skip
    batch, groups, length, d = k_cache.shape
    query = q.view(batch, -1, d)
    if cos is not None:
        angles, newest = _angles(cos, sin, start, position), position.long()
        query = _turn(_norm(query, q_norm, epsilon), *angles)
        key = _turn(_norm(k_cache.index_select(2, newest)[:, :, 0], k_norm, epsilon), *angles)
        k_cache.index_copy_(2, newest, key[:, :, None])
    at = torch.arange(length, device=q.device)
    seen = (at <= position)[None] & (at >= torch.minimum(start, position)[:, None])
    if window:
        seen &= at > position - window
    # Positions outside hold anything, NaN included.
    value = torch.where(seen[:, None, :, None], v_cache, 0)
    score = torch.einsum("bghd,bgsd->bghs", query.view(batch, groups, -1, d), k_cache) * scale
    weight = score.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return (weight @ value).reshape(q.shape)


def gate_up_reference(
    x: Tensor, gain: Tensor, gate: Tensor, up: Tensor, gate_bias: Optional, up_bias: Optional, epsilon: float
) -> Tensor:
    n = _norm(x, gain, epsilon)
    return F.silu(F.linear(n, gate, gate_bias)) * F.linear(n, up, up_bias)


def add_linear_reference(x: Tensor, weight: Tensor, bias: Optional, y: Tensor) -> None:
    y += F.linear(x, weight, bias)


def head_reference(x: Tensor, gain: Tensor, weight: Tensor, y: Tensor, epsilon: float) -> None:
    y.copy_(F.linear(_norm(x, gain, epsilon), weight))


def select_reference(
    logits: Tensor, eos: Tensor, pad: Tensor, finished: Tensor, token: Tensor, position: Tensor
) -> None:
    token.copy_(torch.where(finished.bool(), pad, logits.argmax(-1)))
    finished |= (token[:, None] == eos).any(-1)
    position += 1


def rotary_reference(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Optional, k_norm: Optional, cos: Tensor, sin: Tensor, start: Tensor,
    k_cache: Tensor, v_cache: Tensor, epsilon: float,
) -> None:  # fmt: skip
    batch, groups, _, d = k_cache.shape
    length = q.shape[0] // batch
    angle = (torch.arange(length, device=q.device) - start[:, None]).clamp_min(0)
    c, s = cos[angle][:, :, None], sin[angle][:, :, None]
    query, key, value = (t.reshape(batch, length, -1, d) for t in (q, k, v))
    q.copy_(_turn(_norm(query, q_norm, epsilon), c, s).view(q.shape))
    k_cache[:, :, :length] = _turn(_norm(key, k_norm, epsilon), c, s).transpose(1, 2)
    v_cache[:, :, :length] = value.transpose(1, 2)


def _normed(x: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor | None, bool]:
    """What a kernel takes: x and the gain for one token, else x normalised already and none; and whether with PDL."""
    from ppf.kernels import decode

    pdl = decode.pdl_available(x.device, len(x))
    return (x, gain, pdl) if len(x) == 1 else (decode.norm(x, gain, epsilon, pdl), None, pdl)


def _qkv_cuda(
    x: Tensor, gain: Tensor, q: Tensor, k: Tensor, v: Tensor, q_bias: Optional, k_bias: Optional, v_bias: Optional,
    cos: Tensor, sin: Tensor, start: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, epsilon: float,
    rotate: bool,
) -> Tensor:  # fmt: skip
    from ppf.kernels import decode_qkv

    y, biases = x.new_empty(len(x), len(q)), (q_bias, k_bias, v_bias)
    n, gain, pdl = _normed(x, gain, epsilon)
    decode_qkv.qkv(n, gain, q, k, v, biases, cos, sin, start, position, y, k_cache, v_cache, epsilon, rotate, pdl)
    return y


def _attention_cuda(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, position: Tensor, partial: Tensor, statistics: Tensor,
    arrived: Tensor, shares: int, scale: float, window: int, q_norm: Optional, k_norm: Optional, cos: Optional,
    sin: Optional, epsilon: float,
) -> Tensor:  # fmt: skip
    from ppf.kernels import decode, decode_attention

    y, space = torch.empty_like(q), [partial, statistics, arrived]
    heads = None if cos is None else (q_norm, k_norm, cos, sin)
    pdl = decode.pdl_available(q.device, len(q))
    decode_attention.attention(
        q, k_cache, v_cache, start, position, y, space, scale, shares, window, heads, epsilon, pdl
    )
    return y


def _gate_up_cuda(
    x: Tensor, gain: Tensor, gate: Tensor, up: Tensor, gate_bias: Optional, up_bias: Optional, epsilon: float
) -> Tensor:
    from ppf.kernels import decode

    y = x.new_empty(len(x), len(gate))
    n, gain, pdl = _normed(x, gain, epsilon)
    decode.linear(n, (gate, up), y, gain, epsilon, biases=(gate_bias, up_bias), pdl=pdl)
    return y


def _add_linear_cuda(x: Tensor, weight: Tensor, bias: Optional, y: Tensor) -> None:
    from ppf.kernels import decode

    decode.linear(x, (weight,), y, add=True, biases=(bias,), pdl=decode.pdl_available(x.device, len(x)))


def _head_cuda(x: Tensor, gain: Tensor, weight: Tensor, y: Tensor, epsilon: float) -> None:
    from ppf.kernels import decode

    n, gain, pdl = _normed(x, gain, epsilon)
    decode.linear(n, (weight,), y, gain, epsilon, pdl=pdl)


def _select_cuda(logits: Tensor, eos: Tensor, pad: Tensor, finished: Tensor, token: Tensor, position: Tensor) -> None:
    from ppf.kernels import decode_select

    decode_select.select(logits, eos, pad, finished, token, position)


def _rotary_cuda(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Optional, k_norm: Optional, cos: Tensor, sin: Tensor, start: Tensor,
    k_cache: Tensor, v_cache: Tensor, epsilon: float,
) -> None:  # fmt: skip
    from ppf.kernels import decode_prefill

    decode_prefill.rotary(q, k, v, q_norm, k_norm, cos, sin, start, k_cache, v_cache, epsilon)


def _qkv_fake(x: Tensor, gain: Tensor, q: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], q.shape[0])


def _attention_fake(q: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(q)


def _gate_up_fake(x: Tensor, gain: Tensor, gate: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], gate.shape[0])


def _nothing(*arguments: object) -> None:
    """Fake of the ops that only write."""


_OPS = {
    "decode_qkv": (qkv_reference, _qkv_cuda, _qkv_fake),
    "decode_attention": (attention_reference, _attention_cuda, _attention_fake),
    "decode_gate_up": (gate_up_reference, _gate_up_cuda, _gate_up_fake),
    "decode_add_linear": (add_linear_reference, _add_linear_cuda, _nothing),
    "decode_head": (head_reference, _head_cuda, _nothing),
    "decode_select": (select_reference, _select_cuda, _nothing),
    "decode_rotary": (rotary_reference, _rotary_cuda, _nothing),
}
for _name, (_reference, _cuda, _fake) in _OPS.items():
    LIBRARY.impl(_name, _reference, "CPU")
    LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"ppf::{_name}", _fake, lib=LIBRARY)

"""The prompt: cuBLAS products, fused elementwise kernels between them, and no work that nobody reads.

Only the last token's hidden state is wanted, so after the last layer's keys and values are in the cache, that layer
and everything behind it run as a decode step of one token.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import decode
from .plan import Attention, FeedForward
from .session import MAX_PROMPTS, Session

# Tokens computed at once: activations stay below some 2 GB for a 7B model, and the products are at their peak.
BLOCK_TOKENS = 16384
# Up to so many tokens the host's launches can take longer than the device's work.
GRAPH_TOKENS = 2048


def prefill(session: Session, ids: Tensor, padded: bool) -> None:
    """Process prompts ids int64 [B, T], padded on the left by ``session.start`` if ``padded`` says that any is.

    Leaves keys and values of positions [0, T) in the caches, ``logits`` and ``token`` for position T, and
    ``position`` at T. Of short prompts, the second of a length records a graph, which the following ones replay.
    """
    key = (ids.shape[1], padded)
    if session.plan.device.type != "cuda" or ids.numel() > GRAPH_TOKENS:
        _run(session, ids, padded)
    elif key not in session.prompts:
        session.prompts[key] = None
        if len(session.prompts) > MAX_PROMPTS:
            session.prompts.popitem(last=False)
        _run(session, ids, padded)
    else:
        known = session.prompts[key]
        if known is None:
            with torch.inference_mode(False):  # as the session's buffers
                held = ids.clone()
            known = session.prompts[key] = session.record(lambda: _run(session, held, padded)), held
        session.prompts.move_to_end(key)
        graph, held = known
        held.copy_(ids)
        graph.replay()


def _run(session: Session, ids: Tensor, padded: bool) -> None:
    batch, length = ids.shape
    plan = session.plan
    last = max(index for index, groups in enumerate(plan.groups) if groups)
    hidden = torch.empty(batch, plan.embedding.shape[1], dtype=plan.dtype, device=plan.device)
    rows = max(1, BLOCK_TOKENS // length)
    for first in range(0, batch, rows):
        part = slice(first, min(batch, first + rows))
        hidden[part] = _prompts(session, ids[part], part, last, padded)
    session.position.fill_(length - 1)
    for index in range(last, len(plan.layers)):
        session.layer(index, plan.layers[index], hidden)
    session.head(hidden)


def _prompts(session: Session, ids: Tensor, part: slice, last: int, padded: bool) -> Tensor:
    """Some sequences through the layers before ``last``, and its keys and values; the last token's state [b, H]."""
    plan, (batch, length) = session.plan, ids.shape
    attend = partial(_attend, mask=_mask(session.start[part], length) if padded else None)
    hidden = F.embedding(ids, plan.embedding).flatten(0, 1)
    for index, layer in enumerate(plan.layers[: last + 1]):
        if layer.attention is not None:
            normed = _norm(hidden, layer.attention.norm, plan.epsilon)
            q, keys, values = _project(session, layer.attention, normed, index, part, length)
            if index == last:
                break
            y = attend(q.view(batch, length, -1, plan.head_dim), keys, values)
            hidden.addmm_(y.flatten(0, 1).flatten(1), layer.attention.o.t())
        if layer.ffn is not None:
            _add_ffn(hidden, layer.ffn, plan.epsilon)
    return hidden.view(batch, length, -1)[:, -1]


def _project(
    session: Session, weights: Attention, normed: Tensor, index: int, part: slice, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [b·T, G·g·d]; the cache's keys and values [b, G, T, d], written."""
    q, k, v = (F.linear(normed, w) for w in (weights.q, weights.k, weights.v))
    keys, values = (cache[part] for cache in session.caches[index])
    decode.rotary(q, k, v, session.cos, session.sin, session.start[part], keys, values)
    return q, keys[:, :, :length], values[:, :, :length]


def _add_ffn(hidden: Tensor, weights: FeedForward, epsilon: float) -> None:
    normed = _norm(hidden, weights.norm, epsilon)
    act = decode.multiply_silu(F.linear(normed, weights.gate), F.linear(normed, weights.up))
    hidden.addmm_(act, weights.down.t())


def _norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), gain, epsilon)


def _mask(start: Tensor, length: int) -> Tensor:
    """What may be attended to, bool [b, 1, T, T]; a padding token attends to itself, or it would become NaN."""
    at = torch.arange(length, device=start.device)
    causal = at[None, :] <= at[:, None]
    own = torch.eye(length, dtype=torch.bool, device=start.device)
    return (causal & (at >= start[:, None, None]) | own)[:, None]


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """q [b, T, heads, d] over keys and values [b, G, T, d]: [b, T, heads, d]."""
    q = q.transpose(1, 2)
    group = q.shape[1] // keys.shape[1]
    if group > 1:
        # With grouped queries the library falls back to its slowest kernel as soon as there is a mask.
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None)
    return y.transpose(1, 2)

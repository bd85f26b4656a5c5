"""The prompt: cuBLAS products, fused elementwise kernels between them, and no work that nobody reads.

Only the last token's hidden state is wanted, so after the last layer's keys and values are in the cache, that layer
and everything behind it run as a decode step of one token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.views import Attention, FeedForward
from ..ops import decode
from .session import MAX_PROMPTS, Session

# Tokens computed at once: activations stay below some 2 GB for a 7B model, and the products are at their peak.
BLOCK_TOKENS = 16384
# Queries of a windowed layer that go together: each block reads as many keys as it has queries, and a window more.
BLOCK_QUERIES = 4096
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
    start = session.start[part]
    mask = _mask(start, range(length), range(length), length) if padded else None
    hidden = F.embedding(ids, plan.embedding).flatten(0, 1)
    for index, layer in enumerate(plan.layers[: last + 1]):
        a = layer.attention
        if a is not None:
            q, keys, values = _project(session, a, _norm(hidden, a.norm, plan.epsilon), index, part, length)
            if index == last:
                break
            q, window = q.view(batch, length, -1, plan.head_dim), layer.window
            within = window is None or length <= window
            y = _attend(q, keys, values, mask) if within else _attend_within(q, keys, values, start, window)
            _add(hidden, y.flatten(0, 1).flatten(1), a.o, a.o_bias)
        if layer.ffn is not None:
            _add_ffn(hidden, layer.ffn, plan.epsilon)
    return hidden.view(batch, length, -1)[:, -1]


def _project(
    session: Session, a: Attention, normed: Tensor, index: int, part: slice, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [b·T, G·g·d]; the cache's keys and values [b, G, T, d], written."""
    q, k, v = (F.linear(normed, w, b) for w, b in ((a.q, a.q_bias), (a.k, a.k_bias), (a.v, a.v_bias)))
    keys, values = (cache[part] for cache in session.caches[index])
    decode.rotary(
        q, k, v, session.cos, session.sin, session.start[part], keys, values, (a.q_norm, a.k_norm),
        session.plan.epsilon,
    )  # fmt: skip
    return q, keys[:, :, :length], values[:, :, :length]


def _add_ffn(hidden: Tensor, f: FeedForward, epsilon: float) -> None:
    normed = _norm(hidden, f.norm, epsilon)
    act = decode.multiply_silu(F.linear(normed, f.gate, f.gate_bias), F.linear(normed, f.up, f.up_bias))
    _add(hidden, act, f.down, f.down_bias)


def _add(hidden: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden += x · weightᵀ + bias."""
    hidden.addmm_(x, weight.t())
    if bias is not None:
        hidden.add_(bias)


def _norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), gain, epsilon)


def _attend_within(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, window: int) -> Tensor:
    """:func:`_attend` to the last ``window`` positions from ``start`` [b] on: blocks of queries, each with the keys
    that it reaches."""
    length, blocks = q.shape[1], []
    for first in range(0, length, BLOCK_QUERIES):
        queries = range(first, min(length, first + BLOCK_QUERIES))
        seen = range(max(0, first - window + 1), queries.stop)
        own, reached = slice(queries.start, queries.stop), slice(seen.start, seen.stop)
        mask = _mask(start, queries, seen, window)
        blocks.append(_attend(q[:, own], keys[:, :, reached], values[:, :, reached], mask))
    return torch.cat(blocks, 1)


def _mask(start: Tensor, queries: range, keys: range, window: int) -> Tensor:
    """What may be attended to, bool [b, 1, queries, keys]; a padding token attends to itself, lest it become NaN."""
    at, of = (torch.arange(r.start, r.stop, device=start.device) for r in (keys, queries))
    back = of[:, None] - at[None, :]
    seen = (back >= 0) & (back < window)
    return (seen & (at >= start[:, None, None]) | (back == 0))[:, None]


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """q [b, T, heads, d] over keys and values [b, G, S, d] where ``mask`` says so, or causally: [b, T, heads, d]."""
    q = q.transpose(1, 2)
    group = q.shape[1] // keys.shape[1]
    if group > 1:
        # With grouped queries the library falls back to its slowest kernel as soon as there is a mask.
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None)
    return y.transpose(1, 2)

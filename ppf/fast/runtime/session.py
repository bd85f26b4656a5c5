"""A batch that generates: its static cache, the buffers of a step, the step itself, and the graph of it.

A session is made for one plan, batch size and number of positions. What changes from token to token lives in device
buffers (``token``, ``position``, ``start``), so that one captured graph serves every step of every request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.views import Attention
from .. import capture
from ..ops import decode
from .plan import Layer, Plan
from .storage import Storage

# More end-of-sequence tokens than this and the caller stops by itself.
MAX_EOS = 8
# Prompts of one length that get a graph of their own; the GPU outruns the host only on short ones.
MAX_PROMPTS = 8


class Session:
    """Buffers and views for ``batch`` sequences of up to ``positions`` tokens each."""

    def __init__(self, plan: Plan, storage: Storage, batch: int, positions: int):
        self.plan, self.batch, self.positions = plan, batch, positions
        self.caches = storage.views(plan, batch, positions)
        self.cos, self.sin = storage.rotary(plan, positions)
        device = plan.device
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.start = torch.zeros(batch, dtype=torch.int32, device=device)
        self.position = torch.zeros(1, dtype=torch.int32, device=device)
        self.finished = torch.zeros(batch, dtype=torch.int8, device=device)
        self.eos = torch.full((MAX_EOS,), -1, dtype=torch.int64, device=device)
        self.pad = torch.zeros((), dtype=torch.int64, device=device)
        self.logits = torch.zeros(batch, len(plan.head), dtype=torch.float32, device=device)
        sizes = max(plan.groups), plan.query_heads, plan.head_dim, plan.reach(positions)
        self.shares, self.space = decode.workspace(batch, *sizes, device)
        self.graph: torch.cuda.CUDAGraph | None = None
        # By length and padding: None after the first prompt, then its graph and the ids it reads.
        self.prompts: OrderedDict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor] | None] = OrderedDict()

    def reset(self, start: Tensor, eos: list[int], pad: int) -> None:
        """Begin a new batch of prompts; ``start`` int32 [B] is the padding of each on its left."""
        self.start.copy_(start)
        self.finished.zero_()
        self.eos.copy_(torch.tensor((eos + [-1] * MAX_EOS)[:MAX_EOS]))
        self.pad.fill_(pad)

    def layer(self, index: int, layer: Layer, hidden: Tensor) -> None:
        """One decoder layer on one token per sequence, hidden [B, H], in place."""
        f = layer.ffn
        if layer.attention is not None:
            self._attention(layer.attention, layer.window, *self.caches[index], hidden)
        if f is not None:
            act = decode.gate_up(hidden, f.norm, f.gate, f.up, self.plan.epsilon, (f.gate_bias, f.up_bias))
            decode.add_linear(act, f.down, hidden, f.down_bias)

    def _attention(self, a: Attention, window: int | None, keys: Tensor, values: Tensor, hidden: Tensor) -> None:
        epsilon, scale = self.plan.epsilon, self.plan.head_dim**-0.5
        # Heads are normalised before they are rotated, and only attention has whole heads: it does both.
        normed = a.q_norm is not None or a.k_norm is not None
        q = decode.qkv(
            hidden, a.norm, a.q, a.k, a.v, self.cos, self.sin, self.start, self.position, keys, values, epsilon,
            (a.q_bias, a.k_bias, a.v_bias), rotate=not normed,
        )  # fmt: skip
        heads = (a.q_norm, a.k_norm, self.cos, self.sin) if normed else None
        y = decode.attention(
            q, keys, values, self.start, self.position, self.space, self.shares, scale, window or 0, heads, epsilon
        )
        decode.add_linear(y, a.o, hidden, a.o_bias)

    def head(self, hidden: Tensor) -> None:
        """Logits of hidden [B, H], and the likeliest token of each sequence (``pad`` after its end)."""
        decode.head(hidden, self.plan.norm, self.plan.head, self.logits, self.plan.epsilon)
        decode.select(self.logits, self.eos, self.pad, self.finished, self.token, self.position)

    def step(self) -> None:
        """Feed ``token`` at ``position``; afterwards ``logits`` and the next ``token`` are there."""
        hidden = F.embedding(self.token, self.plan.embedding)
        for index, layer in enumerate(self.plan.layers):
            self.layer(index, layer, hidden)
        self.head(hidden)

    def advance(self) -> None:
        """:meth:`step`, replayed from the graph on a GPU. The graph must exist: see :meth:`capture`."""
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def capture(self) -> None:
        """Record :meth:`step` (on a GPU, once). Runs it, so call it before the prompt is there."""
        if self.graph is not None or self.plan.device.type != "cuda":
            return
        self.position.zero_()
        capture.warm_up(self.step, self.plan.device)
        self.graph = self.record(self.step)

    def record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of ``work``, whose kernels must be compiled already.

        A session's graphs share the memory of their intermediate results: one of them runs at a time.
        """
        return capture.record(work, pool=None if self.graph is None else self.graph.pool())[0]

"""Memory of the caches: one allocation a layer, as wide as any plan of the model needs, seen through views."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan


class Storage:
    """Keys and values of all layers for ``tokens`` (sequences times positions) of at most ``groups`` kv-groups each.

    Sessions of different shapes and policies share it, one generation at a time: each reads only positions that it
    has written itself.
    """

    def __init__(self, groups: tuple[int, ...], head_dim: int, dtype: torch.dtype, device: torch.device):
        self._groups, self._head_dim, self._dtype, self._device = groups, head_dim, dtype, device
        self._flat: list[tuple[Tensor, Tensor]] = []
        self._tokens = 0
        self._rotary: tuple[Tensor, Tensor] | None = None

    def reserve(self, tokens: int) -> bool:
        """Make room; True if memory moved, so that views and graphs made before are void."""
        if tokens <= self._tokens:
            return False
        self._flat = []  # the old memory goes before the new one comes
        sizes = [tokens * groups * self._head_dim for groups in self._groups]
        self._flat = [tuple(self._empty(size) for _ in range(2)) for size in sizes]
        self._tokens = tokens
        return True

    def views(self, plan: Plan, batch: int, positions: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, G, S, d] of every layer, for that plan's own G (0 where a layer has no attention)."""
        views = []
        for groups, pair in zip(plan.groups, self._flat, strict=True):
            size = batch * groups * positions * self._head_dim
            views.append(tuple(t[:size].view(batch, groups, positions, self._head_dim) for t in pair))
        return views

    def rotary(self, plan: Plan, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each fp32 [positions, d/2]; a pair of channels turns by one angle, so half is enough."""
        if self._rotary is None or len(self._rotary[0]) < positions:
            probe = torch.empty(0, dtype=torch.float32, device=self._device)
            cos, sin = plan.rotary(probe, torch.arange(positions, device=self._device)[None])
            half = self._head_dim // 2
            self._rotary = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return tuple(t[:positions] for t in self._rotary)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self._dtype, device=self._device)

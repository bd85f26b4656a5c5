"""The agent on a GPU, one answer at a time: some hundred small kernels as one replay of a CUDA graph."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ...fast.capture import record, warm_up
from .actor import Agent


class CapturedAgent:
    """Answers of ``agent`` for one ratio at a time, computed on ``device``.

    Launches are the cost: one by one they take milliseconds, recorded half of one (dev/LOG.md). The agent is
    copied, so that later training changes nothing. Levels are those of :class:`Agent` on the same device.
    """

    def __init__(self, agent: Agent, device: torch.device):
        self._agent = copy.deepcopy(agent).to(device).eval()  # the graph reads its weights wherever they lie
        self._ratio = torch.full((1,), 0.3, device=device)
        with torch.cuda.device(device):
            warm_up(lambda: self._agent(self._ratio), device)
            self._graph, self._levels = record(lambda: self._agent(self._ratio))

    def __call__(self, ratio: float) -> Tensor:
        """Levels int64 [1, S] on the CPU of the policy that removes ``ratio``."""
        self._ratio.fill_(ratio)
        self._graph.replay()
        return self._levels.cpu()

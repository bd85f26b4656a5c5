"""The divergence of policies from the dense model, KL(dense ‖ policy), from cached dense outputs.

Of the dense model's distribution the K likeliest tokens are kept, with the rest as one more outcome: 6·K bytes a token
instead of the vocabulary's. Lumping outcomes can only lower a divergence, so that the figure is a lower bound; with the
whole vocabulary kept it is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...fast.batched import Batched
from ...fast.forward import logit_block, norm
from ...fast.plan import executed
from ...model.grid import Grid
from ...model.weights import DecoderWeights
from .serial import Serial

TOP = 64


class Divergences:
    """Divergences on an engine's text; the dense model runs once, when it is made."""

    def __init__(self, engine: Serial | Batched, weights: DecoderWeights, grid: Grid, top: int = TOP):
        self.engine, self.weights = engine, weights
        self.top = min(top, len(weights.head))
        self._dense: list[list[tuple[Tensor, Tensor]]] = [[] for _ in engine.parts]
        engine.visit([executed(grid.maximum)], self._remember)

    @torch.no_grad()
    def means(self, levels: Sequence[Sequence[int]]) -> Tensor:
        """Mean divergence per predicted token of every policy (levels in execution order), fp64 [P] in nats."""
        total = torch.zeros(len(levels), dtype=torch.float64, device=self.weights.device)

        def add(index: int, part: int, hidden: Tensor) -> None:
            for logits, dense in zip(self._logits(hidden), self._dense[part], strict=True):
                total[index] += _divergence(*dense, logits).double().sum()

        self.engine.visit(levels, add)
        count = sum(len(tokens) * (tokens.shape[1] - 1) for tokens in self.engine.parts)
        return total / count

    def _remember(self, _: int, part: int, hidden: Tensor) -> None:
        for logits in self._logits(hidden):
            values, tokens = logits.log_softmax(-1).topk(self.top, -1)
            self._dense[part].append((values.half(), tokens.int()))

    def _logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits fp32 [block, vocabulary] of all but each sequence's last token, from hidden states [B, T, hidden]."""
        normed = norm(hidden, self.weights.norm, self.weights.epsilon)[:, :-1].flatten(0, 1)
        for part in normed.split(logit_block(self.weights.head)):
            yield F.linear(part, self.weights.head).float()


def _divergence(dense: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
    """KL of every row, fp32 [rows], from the dense model's highest log-probabilities [rows, K] of ``tokens``."""
    dense = dense.float()
    ours = logits.gather(-1, tokens.long()) - logits.logsumexp(-1, keepdim=True)
    top = (dense.exp() * (dense - ours)).sum(-1)
    if dense.shape[-1] == logits.shape[-1]:
        return top
    rest, our_rest = ((1 - value.exp().sum(-1)).clamp_min(1e-7) for value in (dense, ours))
    return top + rest * (rest.log() - our_rest.log())

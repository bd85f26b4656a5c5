"""Token losses from the last hidden states, a block of logits at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.frame import Frame
from .ops import elementwise  # noqa: F401  (defines the op)

# Logits in fp32 held at once. A GPU wants large products: 1 GB is 2,048 tokens of a vocabulary of 128k, or 65,536 of
# one of 4k. A CPU wants them to stay in cache: twice as fast; but every block reads the whole head, so that of a large
# vocabulary it takes more.
_LOGIT_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}
_LEAST_BLOCK = 256


def token_losses(frame: Frame, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, fp32 [B, T-1], of tokens [B, T] given what the last layer gives [B, T, H]."""
    return head_losses(frame.norm(hidden), frame.head, tokens, frame.scale, frame.cap)


def head_losses(normed: Tensor, head: Tensor, tokens: Tensor, scale: float = 1.0, cap: float | None = None) -> Tensor:
    """The same for hidden states that are normalised already, and a head [vocabulary, H] whose logits are divided by
    ``scale`` and capped to ±``cap``."""
    x, targets = normed[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    block = logit_block(head)
    losses = [
        torch.ops.ppf.row_losses(logits(part, head, scale, cap), target)
        for part, target in zip(x.split(block), targets.split(block), strict=True)
    ]
    return torch.cat(losses).view(len(tokens), -1)


def logits(normed: Tensor, head: Tensor, scale: float = 1.0, cap: float | None = None) -> Tensor:
    """Logits [..., vocabulary] of normalised hidden states [..., H], as transformers computes them."""
    found = F.linear(normed, head)
    found = found if scale == 1.0 else found / scale
    return found if cap is None else torch.tanh(found / cap) * cap


def logit_block(head: Tensor) -> int:
    """How many tokens to make logits of at once."""
    return max(_LEAST_BLOCK, _LOGIT_BYTES[head.device.type] // (4 * len(head)))

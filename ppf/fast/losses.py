"""Token losses from the last hidden states, a block of logits at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.frame import Frame
from .ops import (
    dispatch,
    elementwise,  # noqa: F401  (defines row_losses)
    grouped,  # noqa: F401  (defines grouped_losses)
)

# Logits in fp32 held at once. A GPU wants large products: 1 GB is 2,048 tokens of a vocabulary of 128k, or 65,536 of
# one of 4k. A CPU wants them to stay in cache: twice as fast; but every block reads the whole head, so that of a large
# vocabulary it takes more.
_LOGIT_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}
_LEAST_BLOCK = 256
# Up to this hidden size, reading and writing logits costs more than cuBLAS's products are faster.
_LARGEST_FUSED = 1024


def token_losses(frame: Frame, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, fp32 [B, T-1], of tokens [B, T] given what the last layer gives [B, T, H]."""
    return head_losses(frame.norm(hidden), frame.head, tokens, frame.scale, frame.cap)


def head_losses(normed: Tensor, head: Tensor, tokens: Tensor, scale: float = 1.0, cap: float | None = None) -> Tensor:
    """The same for hidden states that are normalised already, and a head [vocabulary, H] whose logits are divided by
    ``scale`` and capped to ±``cap``."""
    if _fused(normed, head):
        targets, length = tokens.roll(-1, dims=1).flatten(), tokens.shape[1]
        x = normed.reshape(1, -1, normed.shape[-1]).contiguous()
        return torch.ops.ppf.grouped_losses(x, head, targets, length, scale, cap).view(tokens.shape)[:, :-1]
    x, targets = normed[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    block = logit_block(head)
    losses = [
        torch.ops.ppf.row_losses(logits(part, head, scale, cap), target)
        for part, target in zip(x.split(block), targets.split(block), strict=True)
    ]
    return torch.cat(losses).view(len(tokens), -1)


def _fused(normed: Tensor, head: Tensor) -> bool:
    """Whether the kernel serves these that keeps logits to itself, and is the faster way."""
    learns = torch.is_grad_enabled() and (normed.requires_grad or head.requires_grad)
    if learns or not normed.is_cuda or normed.numel() == 0 or normed.dtype != head.dtype:
        return False
    small = normed.shape[-1] <= _LARGEST_FUSED and head.is_contiguous()
    return small and dispatch.kernels_apply(normed, head) and dispatch.copy_engine(head)


def logits(normed: Tensor, head: Tensor, scale: float = 1.0, cap: float | None = None) -> Tensor:
    """Logits [..., vocabulary] of normalised hidden states [..., H], as transformers computes them."""
    found = F.linear(normed, head)
    found = found if scale == 1.0 else found / scale
    return found if cap is None else torch.tanh(found / cap) * cap


def logit_block(head: Tensor) -> int:
    """How many tokens to make logits of at once."""
    return max(_LEAST_BLOCK, _LOGIT_BYTES[head.device.type] // (4 * len(head)))

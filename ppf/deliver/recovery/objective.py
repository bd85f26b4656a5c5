"""What a recovery training minimises: the text's cross-entropy, mixed with the divergence from the dense model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .head import Head, hidden_states

# Logits that exist at once: 64 Mi numbers, so that a vocabulary of 128k fits beside the model.
_LOGITS = 1 << 26


class Objective:
    """(1 − w) · cross-entropy + w · KL(dense ‖ pruned), in nats a token; w is ``distillation`` (Hinton et al., arXiv
    1503.02531, at temperature 1). Without a ``teacher``, the dense model's head, w is 0."""

    def __init__(self, teacher: Head | None, distillation: float):
        self.teacher, self.distillation = teacher, distillation if teacher is not None else 0.0

    def __call__(self, student: PreTrainedModel, tokens: Tensor, taught: Tensor | None = None) -> Tensor:
        """The sum over all predicted tokens, fp32 [], of int64 ``tokens`` [B, T]; differentiable in ``student``.

        ``taught`` are the dense model's hidden states [B · (T − 1), its hidden], None without a teacher.
        """
        rows = [hidden_states(student, tokens), tokens[:, 1:].reshape(-1)]
        heads = [Head.of(student)]
        if self.teacher is not None:
            rows.append(taught)
            heads.append(self.teacher)
        block = max(1, _LOGITS // len(heads[0].weight))
        pieces = list(zip(*(part.split(block) for part in rows), strict=True))
        if len(pieces) == 1:
            return self._block(heads, *pieces[0])
        # Logits of a block are computed again in the backward pass instead of kept.
        return torch.stack([checkpoint(self._block, heads, *piece, use_reentrant=False) for piece in pieces]).sum()

    def _block(self, heads: list[Head], hidden: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        ours = F.log_softmax(heads[0](hidden), dim=-1)
        loss = (1 - self.distillation) * F.nll_loss(ours, targets, reduction="sum")
        if taught is None:
            return loss
        with torch.no_grad():
            theirs = F.log_softmax(heads[1](taught), dim=-1)
        return loss + self.distillation * F.kl_div(ours, theirs, reduction="sum", log_target=True)


class Root(nn.Module):
    """A student as the module that FSDP takes for a whole: all that a loss reads is gathered for the length of one
    call, the head too, which the objective applies past the student's own forward pass."""

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = student

    def forward(self, objective: Objective, tokens: Tensor, taught: Tensor | None) -> Tensor:
        """As :meth:`Objective.__call__`."""
        return objective(self.student, tokens, taught)

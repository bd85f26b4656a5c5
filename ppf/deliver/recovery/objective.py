"""What a recovery training minimises: the text's cross-entropy, mixed with the divergence from the dense model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ...families.traits import logit_cap, logit_scale
from ...fast.losses import logits

# Logits that exist at once: 64 Mi numbers, so that a vocabulary of 128k fits beside the model.
_LOGITS = 1 << 26


class Objective:
    """(1 − w) · cross-entropy + w · KL(dense ‖ pruned), in nats a token; w is ``distillation`` (Hinton et al., arXiv
    1503.02531, at temperature 1). Without a ``teacher`` w is 0."""

    def __init__(self, teacher: PreTrainedModel | None, distillation: float):
        self.teacher, self.distillation = teacher, distillation if teacher is not None else 0.0

    def __call__(self, student: PreTrainedModel, tokens: Tensor) -> Tensor:
        """The sum over all predicted tokens, fp32 [], of int64 ``tokens`` [B, T]; differentiable in ``student``."""
        rows = [_inputs(student, tokens), tokens[:, 1:].reshape(-1)]
        heads = [_Head.of(student)]
        if self.teacher is not None:
            with torch.no_grad():
                rows.append(_inputs(self.teacher, tokens))
            heads.append(_Head.of(self.teacher))
        block = max(1, _LOGITS // len(heads[0].weight))
        pieces = list(zip(*(part.split(block) for part in rows), strict=True))
        if len(pieces) == 1:
            return self._block(heads, *pieces[0])
        # Logits of a block are computed again in the backward pass instead of kept.
        return torch.stack([checkpoint(self._block, heads, *piece, use_reentrant=False) for piece in pieces]).sum()

    def _block(self, heads: list[_Head], hidden: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        ours = F.log_softmax(heads[0](hidden), dim=-1)
        loss = (1 - self.distillation) * F.nll_loss(ours, targets, reduction="sum")
        if taught is None:
            return loss
        with torch.no_grad():
            theirs = F.log_softmax(heads[1](taught), dim=-1)
        return loss + self.distillation * F.kl_div(ours, theirs, reduction="sum", log_target=True)


@dataclass(frozen=True)
class _Head:
    """From hidden states [N, hidden] to logits fp32 [N, vocabulary], as the model's configuration says."""

    weight: Tensor
    scale: float
    cap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Head:
        return cls(model.get_output_embeddings().weight, logit_scale(model.config), logit_cap(model.config))

    def __call__(self, hidden: Tensor) -> Tensor:
        # Outside autocast the dtypes must agree; inside it casts both.
        return logits(hidden.to(self.weight.dtype), self.weight, self.scale, self.cap).float()


def _inputs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Hidden states [B · (T − 1), hidden] that predict the second to the last token of each sequence."""
    return model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)

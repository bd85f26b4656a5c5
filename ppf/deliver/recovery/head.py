"""From hidden states to logits, of students and teachers alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...families.traits import logit_cap, logit_scale
from ...fast.losses import logits
from ...model.frame import Frame


@dataclass(frozen=True)
class Head:
    """From hidden states [N, hidden] to logits fp32 [N, vocabulary], as the model's configuration says."""

    weight: Tensor
    scale: float
    cap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        return cls(model.get_output_embeddings().weight, logit_scale(model.config), logit_cap(model.config))

    @classmethod
    def of_frame(cls, frame: Frame) -> Head:
        return cls(frame.head, frame.scale, frame.cap)

    def __call__(self, hidden: Tensor) -> Tensor:
        # Outside autocast the dtypes must agree; inside it casts both.
        return logits(hidden.to(self.weight.dtype), self.weight, self.scale, self.cap).float()


def predicting(hidden: Tensor) -> Tensor:
    """Of hidden states [B, T, hidden] those that predict a token, the second to the last: [B · (T − 1), hidden]."""
    return hidden[:, :-1].flatten(0, 1)


def hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What ``model`` knows at every token but the last, [B · (T − 1), hidden], of int64 ``tokens`` [B, T]."""
    return predicting(model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state)


def no_autocast(device: torch.device) -> torch.autocast:
    """A context in which dtypes are what they are."""
    return torch.autocast(device.type, enabled=False)

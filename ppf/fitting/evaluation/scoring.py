"""Perplexity of a transformers model itself: the protocol of :mod:`ppf.fitting.evaluation`, on real modules."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError, PPFError
from ...families.traits import logit_cap, logit_scale
from ...fast.losses import head_losses, logits
from ...model.precision import compute_dtype
from ...progress import Progress, silent
from ...text import batches

_PROBE_TOKENS = 8


@torch.no_grad()
def model_log_perplexity(
    model: PreTrainedModel, sequences: Tensor, progress: Progress = silent, counted: Tensor | None = None
) -> float:
    """Mean negative log-likelihood in nats of int64 ``sequences`` [N, T], each scored from its second token on, or only
    of the tokens ``counted``, bool [N, T].

    Logits exist for a block of tokens at a time, so that a vocabulary of 256k fits. ``progress`` counts tokens.
    Raises ``InputError`` for a model whose logits are not its head applied to its hidden states, scaled and capped as
    its configuration says, and ``PPFError`` if the result is not finite.
    """
    head = model.get_output_embeddings().weight
    scale, cap = logit_scale(model.config), logit_cap(model.config)
    _require_plain_head(model, head, scale, cap, sequences[:1, :_PROBE_TOKENS])
    total, scored = torch.zeros((), dtype=torch.float64, device=model.device), 0
    parts = batches(sequences, model.device)
    masks = [None] * len(parts) if counted is None else batches(counted, model.device)
    for batch, counts in zip(parts, masks, strict=True):
        tokens = batch.to(model.device)
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        losses = head_losses(hidden, head, tokens, scale, cap)
        total += (losses if counts is None else losses[counts[:, 1:].to(model.device)]).double().sum()
        scored += tokens.numel()
        progress("score", scored, sequences.numel())
    value = float(total) / (sequences[:, 1:].numel() if counted is None else int(counted[:, 1:].sum()))
    require_finite(value, model.dtype)
    return value


def require_finite(value: float, dtype: torch.dtype) -> None:
    """Raise ``PPFError`` for a log-perplexity that is not a number."""
    if not math.isfinite(value):
        raise PPFError(f"the log-perplexity is {value}: activations overflow in {dtype}. Use float32 or bfloat16")


def in_compute_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` itself if its device computes well in its dtype, else a copy in one that it does (fp16 on a CPU)."""
    dtype = compute_dtype(model.dtype, model.device)
    return model if dtype is model.dtype else copy.deepcopy(model).to(dtype)


def _require_plain_head(model: PreTrainedModel, head: Tensor, scale: float, cap: float | None, tokens: Tensor) -> None:
    """Nobody believes a configuration either: a transform that PPF does not know would be missed silently."""
    tokens = tokens.to(model.device)
    expected = model(input_ids=tokens, use_cache=False).logits
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    if not torch.allclose(logits(hidden, head, scale, cap), expected, rtol=0.02, atol=0.02, equal_nan=True):
        problem = "its logits are not its output embedding applied to its hidden states"
        raise InputError("model", type(model).__name__, problem, "Score a model of one of PPF's families")

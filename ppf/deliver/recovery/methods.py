"""Which weights a method trains, and how they become part of the checkpoint again."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from ...errors import InputError
from ...families import family_of
from .settings import RecoverySettings


def require_installed(method: str) -> None:
    """Raise ``InputError`` if ``method`` needs a package that is not there."""
    if method == "lora" and importlib.util.find_spec("peft") is None:
        remedy = "Install it with pip install 'ppf[train]', or use full or norms"
        raise InputError("method", method, "needs the package peft, which is not installed", remedy)


class Student:
    """A pruned model in training. ``model`` computes with the weights being trained; :meth:`merged` ends it.

    What is trained is held in fp32, the rest in the checkpoint's dtype (on a CPU in fp32 too). Dropout stays off.
    """

    def __init__(self, model: PreTrainedModel, settings: RecoverySettings):
        self.model, self._stored = model, model.dtype
        if model.device.type == "cpu":
            model.float()
        model.requires_grad_(False)
        self._adapter = _add_lora(model, settings) if settings.method == "lora" else None
        self.trained = _trained(model, settings.method)
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def merged(self) -> PreTrainedModel:
        """The ordinary model with the trained weights in it, in the checkpoint's own dtype."""
        model = self.model
        if self._adapter is not None:
            # In fp32, so that each weight is rounded once: after its update.
            model = self._adapter.float().merge_and_unload()
        # Parameters only: rotary frequencies are buffers, and stay in fp32.
        for parameter in model.parameters():
            parameter.grad, parameter.data = None, parameter.data.to(self._stored)
        model.config.dtype = self._stored
        return model.requires_grad_(False)


def _trained(model: PreTrainedModel, method: str) -> dict[str, torch.nn.Parameter]:
    """Name → parameter, in the model's order."""
    wanted = {
        "lora": lambda name: ".lora_" in name,
        "full": lambda name: True,
        "norms": lambda name: "norm" in name or name.endswith(".bias"),
    }[method]
    return {name: parameter for name, parameter in model.named_parameters() if wanted(name)}


def _add_lora(model: PreTrainedModel, settings: RecoverySettings) -> Any:
    """Put LoRA's layers into ``model``, initialised from the seed; returns the wrapper that can merge them."""
    from peft import LoraConfig, get_peft_model

    # Every linear layer of the decoder. The update starts at zero (B = 0) and is scaled by alpha / rank = 2.
    linear = list(family_of(model.config.model_type).projections())
    config = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, lora_dropout=0.0, target_modules=linear, bias="none"
    )
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # the caller's random state is not ours to advance
        torch.manual_seed(settings.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
            return get_peft_model(model, config)

"""Which weights a method trains, and how they become part of the checkpoint again."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError
from ...families import family_of
from .objective import Root
from .settings import RecoverySettings
from .sharding import shard_student, widen


def require_installed(method: str) -> None:
    """Raise ``InputError`` if ``method`` needs a package that is not there."""
    if method == "lora" and importlib.util.find_spec("peft") is None:
        remedy = "Install it with pip install 'ppf[train]', or use full or norms"
        raise InputError("method", method, "needs the package peft, which is not installed", remedy)


class Trainee(Protocol):
    """What a training trains: ``model`` tells its sizes, ``trained`` are the weights, in fp32, by name."""

    model: PreTrainedModel
    device: torch.device
    trained: Mapping[str, torch.nn.Parameter]

    @property
    def turns(self) -> Sequence[Callable[..., Tensor]]:
        """Each called as :class:`ppf.deliver.recovery.objective.Root`, with a backward pass of its own; a part's loss
        is their sum."""

    def begin(self, step: int) -> None:
        """Said before the parts of a step."""

    def expect(self, last: bool) -> None:
        """Said before a part, of which ``last`` is the last."""

    def settle(self) -> None:
        """Said once all parts of a step have left their gradients."""


class Student:
    """A pruned model in training. ``root`` computes losses with the weights being trained, by name in ``trained``;
    :meth:`merged` ends it.

    What is trained is held in fp32, the rest in the checkpoint's dtype (on a CPU in fp32 too). Dropout stays off.
    ``shared`` is the device of this process, if every process is to hold a share of ``model`` there.
    """

    def __init__(self, model: PreTrainedModel, settings: RecoverySettings, shared: torch.device | None = None):
        self.model, self.settings, self._stored = model, settings, model.dtype
        self.device, self._shared = shared or model.device, shared is not None
        if self.device.type == "cpu":
            model.float()
        model.requires_grad_(False)
        self._adapter = _add_lora(model, settings) if settings.method == "lora" else None
        for parameter in trained_parameters(model, settings.method).values():
            parameter.requires_grad_(True)
        self.root = Root(model)
        if shared is None:
            widen(model)
        else:
            # Autocast would keep bf16 copies of all that full trains; gathered in bf16, a layer is gone after its turn.
            shard_student(self.root, model, shared, bf16=settings.method == "full" and shared.type == "cuda")
        self.trained = trained_parameters(model, settings.method)

    @property
    def turns(self) -> tuple[Root]:
        """It has one size."""
        return (self.root,)

    def begin(self, step: int) -> None:
        """All steps are alike."""

    def settle(self) -> None:
        """Gradients are summed by FSDP."""

    def expect(self, last: bool) -> None:
        """Say before a part of a batch whether it is the ``last``: gradients are summed over processes after it.

        With method full after every part: the whole model's gradient would take 4 bytes a parameter in each process.
        """
        if self._shared:
            self.root.set_requires_gradient_sync(last or self.settings.method == "full")

    def release(self) -> None:
        """Let go of the weights, which are saved elsewhere."""
        self.model = self.root = self._adapter = None
        self.trained = {}

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from ``weights``, whole and by the names in ``trained``."""
        for name, parameter in self.trained.items():
            parameter.data.copy_(weights[name])

    def merged(self) -> PreTrainedModel:
        """The ordinary model with the trained weights in it, in the checkpoint's own dtype; of a whole model only."""
        model = self.model
        if self._adapter is not None:
            # In fp32, so that each weight is rounded once: after its update.
            model = self._adapter.float().merge_and_unload()
        # Parameters only: rotary frequencies are buffers, and stay in fp32.
        for parameter in model.parameters():
            parameter.grad, parameter.data = None, parameter.data.to(self._stored)
        model.config.dtype = self._stored
        return model.requires_grad_(False)


def trained_parameters(model: PreTrainedModel, method: str) -> dict[str, torch.nn.Parameter]:
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

"""A session: a run with its model's weights in memory, on a device. Evaluates and materialises policies."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .. import checkpoint
from ..fast.permute import permuted
from ..model.decoder import Decoder
from ..model.policy import Policy
from ..model.precision import compute_dtype
from .evaluation import Evaluator
from .library import Library, fits_on_device, load_refits
from .materialize import materialize
from .run import Run
from .run.directory import layer_file


class Session:
    """The weights that a run's model and library have, loaded when first needed."""

    def __init__(self, run: Run, device: str | torch.device = "cpu", decoder: Decoder | None = None):
        """``decoder`` are the run's dense weights on ``device`` if the caller has them already."""
        self.run, self.device = run, checkpoint.resolve_device(device)
        if decoder is not None:
            self.decoder = decoder

    @cached_property
    def decoder(self) -> Decoder:
        """The dense weights in checkpoint order and dtype. Raises ``InputError`` if the checkpoint is gone or is no
        longer the one fitted."""
        self.run.require_model()
        return checkpoint.load_decoder(self.run.model_path, device=str(self.device))

    @cached_property
    def permuted(self) -> Decoder:
        """The dense weights with every layer's units in ranking order."""
        return permuted(self.decoder, self.run.ranking)

    @cached_property
    def library(self) -> Library:
        """All refits in the checkpoint's dtype; their factors on the device if there is room, else mapped files."""
        ranked, run = self.permuted, self.run
        room = fits_on_device(run.grid, ranked.dtype, self.device)
        layers = []
        for index in range(run.structure.layers):
            outputs = ranked.names(index).outputs(ranked.layers[index])
            needed = [f"{kind}.{name}" for kind in outputs for name in ("half", "inverse", "error")]
            tensors = run.tensors(layer_file("library", index), *needed)
            layers.append(load_refits(tensors, outputs, run.grid, index, room))
        return Library.of_layers(layers)

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The dense model's own, if it has one."""
        return checkpoint.load_generation_config(self.run.model_path)

    def evaluator(
        self, dtype: torch.dtype | None = None, refit: bool = True, sequences: Tensor | None = None
    ) -> Evaluator:
        """Masked evaluation of the run's model on its evaluation text (or on ``sequences`` int64 [N, T])."""
        dtype = dtype or compute_dtype(self.decoder.dtype, self.device)
        sequences = self.run.sequences() if sequences is None else sequences
        library = self.library.to(dtype) if refit else None
        return Evaluator(self.permuted.to(dtype), self.run.grid, sequences, library)

    def materialize(self, policy: Policy, refit: bool = True) -> PreTrainedModel:
        """The physically smaller model of ``policy``, in the checkpoint's dtype on this session's device.

        Raises ``InputError`` for a policy off the grid.
        """
        library = self.library if refit else None
        model = materialize(self.decoder, self.run.ranking, self.run.grid, policy, library)
        if (generation := self.generation_config) is not None:
            model.generation_config = generation
        return model

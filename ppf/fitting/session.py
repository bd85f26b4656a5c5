"""A session: a run with its model's weights, on a device or streamed to it. Evaluates and materialises policies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .. import checkpoint, memory
from ..fast.permute import identity, permuted, take_permuted
from ..model.decoder import Decoder
from ..model.grid import Grid
from ..model.layer import LayerRanking
from ..model.policy import Policy
from ..model.precision import compute_dtype
from ..model.stream import Host, Placement, Staged, Stream
from ..progress import Progress, silent
from ..timings import timed
from .evaluation import Evaluator
from .evaluation.shared import evaluator_class
from .library import Library, library_bytes
from .materialize import Teacher, materialize, pruned_tensors
from .reconstruction import Reconstruction
from .run import Run

# Factors stay on a GPU if they take no more than this share of what the weights leave; solving them takes more.
_FACTORS_SHARE = 0.4
_HOST_SHARE = 1.5


class Session:
    """The weights that a run's model and library have, loaded when first needed.

    ``placement`` says where they are kept; ``decoder`` are the run's dense weights on ``device`` if the caller has them
    already. Resident weights exist once: what asks for them in ranking order takes them over.
    """

    def __init__(
        self,
        run: Run,
        device: str | torch.device = "auto",
        decoder: Decoder | None = None,
        placement: Placement | None = None,
    ):
        self.run, self.device = run, checkpoint.resolve_device(device)
        self.placement = placement or Placement()
        memory.bound(self.device, self.placement.gpu_memory)
        if decoder is not None:
            self.decoder = decoder

    @cached_property
    @timed("reading weights")
    def decoder(self) -> Decoder:
        """The dense weights in checkpoint order and dtype. Raises ``InputError`` if the checkpoint is gone or is no
        longer the one fitted."""
        self.run.require_model()
        return checkpoint.load_decoder(self.run.model_path, device=str(self.device), placement=self.placement)

    @cached_property
    @timed("reading weights")
    def permuted(self) -> Decoder:
        """The dense weights with every layer's units in ranking order. Takes over :attr:`decoder`, which is read again
        if somebody asks for it."""
        decoder = self.decoder
        if not decoder.resident:
            decoder.layers.close()  # the permuted stream fetches for itself
            return permuted(decoder, self.run.ranking)
        holder = [self.__dict__.pop("decoder")]
        del decoder
        return take_permuted(holder, self.run.ranking)

    @cached_property
    @timed("reading library")
    def library(self) -> Library:
        """All refits in the checkpoint's dtype; their factors on the device if there is room, else they stream."""
        ranked = self.permuted
        return Library(ranked, self.run.grid, self._factors(), errors=_Errors(self))

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The dense model's own, if it has one."""
        return checkpoint.load_generation_config(self.run.model_path)

    def evaluator(
        self, dtype: torch.dtype | None = None, refit: bool = True, sequences: Tensor | None = None
    ) -> Evaluator:
        """Masked evaluation of the run's model on its evaluation text (or on ``sequences`` int64 [N, T]).

        While this session is :func:`ppf.fitting.evaluation.shared.led`, all processes of the job share its work.
        """
        made_by = evaluator_class(self, dtype, refit, sequences)
        dtype = dtype or compute_dtype(self.permuted.dtype, self.device)
        scored = self.run.scored() if sequences is None else None
        sequences = self.run.sequences() if sequences is None else sequences
        library = self.library.to(dtype) if refit else None
        return made_by(self.permuted.to(dtype), self.run.grid, sequences, library, scored)

    def materialize(
        self, policy: Policy, refit: bool = True, thorough: bool = False, progress: Progress = silent
    ) -> PreTrainedModel:
        """The physically smaller model of ``policy``, in the checkpoint's dtype on this session's device.

        ``refit`` False leaves output projections as they were; ``thorough`` trains all kept weights after the refit, a
        few layers at a time (:mod:`ppf.fitting.reconstruction`). Raises ``InputError`` for a policy off the grid.
        """
        model = materialize(*self._materials(policy, refit), self._teacher(policy, thorough, progress))
        if (generation := self.generation_config) is not None:
            model.generation_config = generation
        return model

    def pruned_tensors(
        self, policy: Policy, thorough: bool = False, progress: Progress = silent
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of every weight of :meth:`materialize`'s model, a layer at a time, for those who write it
        somewhere: it never exists as a whole. See :func:`ppf.fitting.materialize.pruned_tensors`."""
        return pruned_tensors(*self._materials(policy, True), self._teacher(policy, thorough, progress))

    def _materials(
        self, policy: Policy, refit: bool
    ) -> tuple[Decoder, list[LayerRanking], Grid, Policy, Library | None]:
        library, ranked = self.library if refit else None, self.permuted
        return ranked, identity(ranked), self.run.grid, policy, library

    def _teacher(self, policy: Policy, thorough: bool, progress: Progress) -> Teacher | None:
        if not thorough:
            return None
        self.run.grid.check(policy)
        run, part = self.run, "calibration"
        texts = run.sequences(part), run.scored(part)
        return Reconstruction(self.permuted, policy, *texts, run.settings.seed, progress).taught

    def factor_tensors(self, index: int) -> dict[str, Tensor]:
        """One layer's file of the library, memory-mapped. Raises ``InputError`` if it is damaged."""
        return self.run.factors(index)

    def _factors(self) -> Sequence[Mapping[str, Tensor]]:
        layers, size = range(self.run.structure.layers), library_bytes(self.run.grid)
        if self.device.type != "cuda":
            return [self.factor_tensors(index) for index in layers]
        if self.permuted.resident and size <= _FACTORS_SHARE * memory.room(self.device):
            moved = (self.factor_tensors(index).items() for index in layers)
            return [{name: tensor.to(self.device) for name, tensor in items} for items in moved]
        if self.placement.weights != "disk" and _HOST_SHARE * size <= memory.host_room():
            return Stream(Host(map(self.factor_tensors, layers), pinned=True), self.device)
        return Stream(Staged(len(layers), self.factor_tensors, pinned=True), self.device)


class _Errors(Sequence[Mapping[str, Tensor]]):
    """Every layer's small tensors of the library, from its file."""

    def __init__(self, session: Session):
        self._session = session

    def __len__(self) -> int:
        return self._session.run.structure.layers

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._session.factor_tensors(index)

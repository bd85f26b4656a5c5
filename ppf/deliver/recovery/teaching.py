"""What the dense model says about a text, wherever its weights are: on the device, a share of them, or streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ... import checkpoint, memory, ranks
from ...checkpoint.placing import chosen
from ...families import KINDS
from ...fast.losses import head_losses
from ...fast.sublayers import sublayers_of
from ...fitting.evaluation.scoring import in_compute_dtype, model_log_perplexity
from ...model.decoder import Decoder
from ...model.precision import compute_dtype
from ...model.stream import Placement
from ...progress import Progress, silent
from ...text import batches
from ...timings import timed
from .head import Head, hidden_states, no_autocast, predicting
from .sharding import shard_teacher


class Teacher(Protocol):
    """A dense model; ``dtype`` is what its perplexity is measured in."""

    head: Head
    dtype: torch.dtype
    device: torch.device

    def hidden(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each of ``parts``, int64 [B, T] on the device, the hidden states [B · (T − 1), hidden] that predict its
        tokens; without gradients. The parts may differ in B only."""

    def log_perplexity(self, sequences: Tensor, progress: Progress = silent) -> float:
        """Mean negative log-likelihood in nats of int64 ``sequences`` [N, T], each scored from its second token on."""


class ModelTeacher:
    """A transformers model on the device, or this process's share of one: then all processes ask it together."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.head = model, Head.of(model)
        self.device = self.head.weight.device
        self.dtype = compute_dtype(model.dtype, self.device)

    def hidden(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """A part when it is asked for: its hidden states need not wait for their turn."""
        return map(self._hidden, parts)

    @torch.no_grad()
    def _hidden(self, tokens: Tensor) -> Tensor:
        return hidden_states(self.model, tokens)

    def log_perplexity(self, sequences: Tensor, progress: Progress = silent) -> float:
        return model_log_perplexity(in_compute_dtype(self.model), sequences, progress)


class DecoderTeacher:
    """Weights of any placement: all parts go through one layer before any goes through the next, so that a layer
    that streams is fetched once a step."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.head = decoder, Head.of_frame(decoder.frame)
        self.device, self.dtype = decoder.device, decoder.dtype
        self._run = sublayers_of(decoder)

    def hidden(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        return map(predicting, self._normed(parts))

    @torch.no_grad()
    def log_perplexity(self, sequences: Tensor, progress: Progress = silent) -> float:
        parts = [part.to(self.device) for part in batches(sequences, self.device)]
        total, scored = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for tokens, normed in zip(parts, self._normed(parts), strict=True):
            losses = head_losses(normed, self.head.weight, tokens, self.head.scale, self.head.cap)
            total, scored = total + losses.double().sum(), scored + tokens.numel()
            progress("score", scored, sequences.numel())
        return float(total) / (len(sequences) * (sequences.shape[1] - 1))

    @torch.no_grad()
    def _normed(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What the head reads, [B, T, hidden] of each part."""
        decoder, frame = self.decoder, self.decoder.frame
        with no_autocast(self.device):
            told = {len(part): frame.context(*part.shape) for part in parts}
            states = [frame.begin(part) for part in parts]
            for index, kind in product(range(len(decoder.layers)), KINDS):
                units = decoder.structure.of(kind)[index].units
                for at, part in enumerate(parts if units else ()):
                    states[at] = self._run(index, kind, units, None, states[at], told[len(part)][index])
            return [frame.norm(state) for state in states]


@timed("reading weights")
def load_teacher(folder: Path, device: torch.device, placement: Placement) -> Teacher:
    """The dense model in ``folder`` for ``device``: whole on it, or its layers streamed, as ``placement`` wants it.

    Of many processes each holds its share, unless streaming is asked for: then each streams all of it. Raises
    ``InputError`` as :func:`ppf.checkpoint.load` does.
    """
    place = _place(folder, device, placement)
    if place != "gpu":
        decoder = checkpoint.load_decoder(folder, device, "auto", Placement(place, placement.gpu_memory))
        return DecoderTeacher(decoder.to(compute_dtype(decoder.dtype, device)))
    if ranks.world() == 1:
        return ModelTeacher(checkpoint.load(folder, device=str(device)))
    model = checkpoint.load(folder)  # mapped: every process takes its share of one layer after the other
    model.to(compute_dtype(model.dtype, device))
    return ModelTeacher(shard_teacher(model, device))


def _place(folder: Path, device: torch.device, placement: Placement) -> str:
    if placement.weights != "auto" or ranks.world() > 1:
        return "gpu" if placement.weights == "auto" else placement.weights
    opened = checkpoint.Checkpoint(folder)
    place = chosen(opened, device, opened.resolve_dtype(), placement)
    if place != "gpu":
        memory.note(f"the teacher's layers stream from {place}: beside the student there is no room for all of them")
    return place

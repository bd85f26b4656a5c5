"""The thorough refit: all kept weights of some layers at a time learn what the dense layers make of the text.

Least squares on output projections takes the kept units as they are, and every sub-layer by itself. Here the layers of
a window are trained together, in order, on what the pruned model before them gives, towards the dense model's residual
stream behind the window: they make up for their own loss and for what layers before them have lost. Then the window
moves on by one layer, and the layer that leaves it is final. Only a window's weights are trained at a time, so that
memory does not grow with the model. Reconstruction by gradient, a block at a time, is BRECQ's (arXiv 2102.05426,
section 3.2), for quantised models; of a pruned model's sub-layers, that of arXiv 2510.14444.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import memory
from ..errors import InputError
from ..families import KINDS
from ..model.decoder import Decoder
from ..model.layer import Layer
from ..model.policy import Policy
from ..progress import Progress, silent
from ..timings import timed

WINDOW = 4
_PASSES = 6
_BATCH_TOKENS = 8192
_RATE = 1e-3
_WARM_UP = 10
# fp32 weights, their gradients and Adam's two moments, with the copies in the dtype that computes.
_TRAINED_BYTES = 20
_SHARE = 0.5


@dataclass(frozen=True)
class Schedule:
    """How long a window is trained, and how: ``steps`` of ``batch`` sequences each, ``layers`` at a time."""

    layers: int
    steps: int
    batch: int

    @classmethod
    def of(cls, decoder: Decoder, sequences: Tensor) -> Schedule:
        """Six passes over ``sequences`` int64 [N, T], in batches of 8,192 tokens or an eighth of the text; four layers,
        or as many as fit."""
        count, length = sequences.shape
        batch = max(1, min(count // 8, _BATCH_TOKENS // length))
        layer = decoder.structure.decoder_parameters // decoder.structure.layers
        each = _TRAINED_BYTES * layer + 2 * batch * length * decoder.token_bytes
        fitting = int(_SHARE * memory.room(decoder.device)) // each
        return cls(max(1, min(WINDOW, fitting)), math.ceil(_PASSES * count / batch), batch)

    def rate(self, step: int) -> float:
        """Adam's learning rate: ten steps of warm-up, then half a cosine to zero."""
        return _RATE * min(1, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass
class _Open:
    """A layer of the window: its number, its widths, and its weights, fp32."""

    index: int
    widths: Mapping[str, int]
    weights: dict[str, Tensor] = field(repr=False)


class Reconstruction:
    """Trains the kept layers of ``policy`` as they pass. ``decoder`` is the dense model in ranking order.

    ``sequences`` int64 [N, T] are the calibration text; of ``scored``, bool [N, T], only those tokens count. ``seed``
    draws the batches: the same one gives the same weights, on a GPU as far as its attention adds up in the same order.
    """

    def __init__(
        self, decoder: Decoder, policy: Policy, sequences: Tensor, scored: Tensor | None = None, seed: int = 0,
        progress: Progress = silent,
    ):  # fmt: skip
        self.decoder, self.policy, self.progress = decoder, policy, progress
        self.schedule = Schedule.of(decoder, sequences)
        self._drawn = torch.Generator().manual_seed(seed)
        self._scored = None if scored is None else scored.to(decoder.device)
        self._parts = 1  # of a batch that goes through at once
        self._held = self._place(sequences)
        self._dense = self._begin(sequences)  # behind the last layer that was read
        self._pruned = self._dense.clone()  # before the window's first layer

    def taught(self, layers: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Every layer of ``layers`` (kept weights by names inside the layer, in order) after its training."""
        window: deque[_Open] = deque()
        for index, kept in enumerate(layers):
            self._dense = self._after(index, self._full(index), self.decoder.layers[index], self._dense)
            window.append(_Open(index, {kind: self.policy[kind][index] for kind in KINDS}, kept))
            if len(window) == self.schedule.layers:
                yield self._next(window)
        while window:
            yield self._next(window)

    def _next(self, window: deque[_Open]) -> dict[str, Tensor]:
        """Train the window, and take its first layer out of it."""
        self._train([layer for layer in window if any(layer.widths.values())])
        done = window.popleft()
        weights = {name: tensor.to(self.decoder.dtype) for name, tensor in done.weights.items()}
        if any(done.widths.values()):
            self._pruned = self._after(done.index, done.widths, weights, self._pruned)
        self.progress("reconstruct", done.index + 1, self.decoder.structure.layers)
        return weights

    @timed("reconstructing")
    def _train(self, layers: list[_Open]) -> None:
        if not layers:
            return
        for layer in layers:
            layer.weights = {n: tensor.float().clone().requires_grad_(True) for n, tensor in layer.weights.items()}
        weights = [tensor for layer in layers for tensor in layer.weights.values()]
        optimizer = torch.optim.Adam(weights, lr=_RATE, betas=(0.9, 0.95), fused=True)
        for step in range(self.schedule.steps):
            optimizer.param_groups[0]["lr"] = self.schedule.rate(step)
            self._gradients(layers, torch.randint(len(self._pruned), (self.schedule.batch,), generator=self._drawn))
            optimizer.step()
            optimizer.zero_grad()
        for layer in layers:
            layer.weights = {name: tensor.detach() for name, tensor in layer.weights.items()}

    def _gradients(self, layers: list[_Open], chosen: Tensor) -> None:
        """Those of one batch, in as many parts as it takes to fit."""
        while True:
            try:
                for part in chosen.chunk(self._parts):
                    with torch.enable_grad():
                        (self._loss(layers, part) * len(part) / len(chosen)).backward()
                return
            except torch.OutOfMemoryError:
                if self._parts >= len(chosen):
                    remedy = "Use --refit fast, or a GPU (or --gpu-memory-gb) with more room"
                    raise InputError("refit", "thorough", "does not fit into the GPU's memory", remedy) from None
            self._parts *= 2
            for layer in layers:
                for tensor in layer.weights.values():
                    tensor.grad = None
            memory.note(f"a batch of the refit does not fit: {self._parts} parts of it, one after the other")

    def _loss(self, layers: list[_Open], chosen: Tensor) -> Tensor:
        """The mean over tokens of |pruned - dense|² / |dense|²: no token counts more because its state is large."""
        chosen = chosen.to(self._held)
        hidden, wanted = (states[chosen].to(self.decoder.device) for states in (self._pruned, self._dense))
        for layer in layers:
            hidden = self._layer(layer.index, layer.widths, layer.weights, hidden)
        off = (hidden.float() - wanted).square().mean(-1) / wanted.square().mean(-1)
        if self._scored is None:
            return off.mean()
        counts = self._scored[chosen.to(self._scored.device)]
        return (off * counts).sum() / counts.sum().clamp(min=1)

    @torch.no_grad()
    def _after(self, index: int, widths: Mapping[str, int], weights: Layer, states: Tensor) -> Tensor:
        """The states behind a layer; written over those before it."""
        for batch in states.split(self.schedule.batch):
            batch.copy_(self._layer(index, widths, weights, batch.to(self.decoder.device)))
        return states

    def _layer(self, index: int, widths: Mapping[str, int], weights: Layer, hidden: Tensor) -> Tensor:
        """transformers' own layer; weights of 16 bits are rounded on the way, as they will be in the result."""
        decoder, half = self.decoder, self.decoder.dtype.itemsize == 2
        told = decoder.frame.context(*hidden.shape[:2])[index]
        fast = half and decoder.device.type == "cuda"
        if half and not fast:  # a CPU computes in fp32
            weights = {name: tensor.float() for name, tensor in weights.items()}
        with torch.autocast(decoder.device.type, torch.bfloat16, enabled=fast):
            return decoder.reference(index, widths, weights, hidden, told)

    def _full(self, index: int) -> dict[str, int]:
        return {kind: self.decoder.structure.of(kind)[index].units for kind in KINDS}

    def _place(self, sequences: Tensor) -> torch.device:
        """Where the states of the text are kept: on the device if they take no more than a fifth of it."""
        size = 2 * 4 * sequences.numel() * self.decoder.structure.hidden
        device = self.decoder.device
        return device if size <= 0.2 * memory.room(device) else torch.device("cpu")

    @torch.no_grad()
    def _begin(self, sequences: Tensor) -> Tensor:
        """What the first layer reads of every sequence, fp32 [N, T, hidden]."""
        batches = sequences.split(self.schedule.batch)
        found = [self.decoder.frame.begin(batch.to(self.decoder.device)) for batch in batches]
        return torch.cat([states.to(self._held, torch.float32) for states in found])

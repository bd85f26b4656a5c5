"""Layers that stream: one decoder layer at a time on the device, the next one on its way, wherever weights are kept.

A model that does not fit on a GPU is kept in pinned host memory or stays in its memory-mapped files. A layer travels as
one block of bytes, on a CUDA stream of its own, so that copies overlap with whatever the layer before computes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

Layer = Mapping[str, Tensor]
Change = Callable[[int, Layer], Layer]

# Tensors of a packed layer begin at multiples of this: what the copy engine and vector loads want.
_ALIGNMENT = 256


PLACES = "auto", "gpu", "host", "disk"


@dataclass(frozen=True)
class Placement:
    """Where weights are kept: "gpu" is the device that computes, "host" pinned memory, "disk" their files, "auto" the
    first of these with room. ``gpu_memory`` bounds all that a command holds on a GPU, in bytes; None is no bound.

    Raises ``InputError`` for anything else.
    """

    weights: str = "auto"
    gpu_memory: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in PLACES:
            raise InputError("weights", self.weights, "is not a place for weights", f"Use one of {', '.join(PLACES)}")
        if self.gpu_memory is not None and self.gpu_memory < 1 << 30:
            given = f"{self.gpu_memory / 1e9:g}"
            raise InputError("gpu-memory-gb", given, "is too little for any model", "Use at least 2")


@dataclass(frozen=True)
class Packing:
    """Where the tensors of a layer lie in one block of bytes: name, dtype, shape and offset of each."""

    entries: tuple[tuple[str, torch.dtype, torch.Size, int], ...]
    nbytes: int

    @classmethod
    def of(cls, layer: Layer) -> Packing:
        entries, end = [], 0
        for name, tensor in layer.items():
            entries.append((name, tensor.dtype, tensor.shape, end))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(entries), end)

    def pack(self, layer: Layer, block: Tensor) -> None:
        """Copy ``layer`` into ``block``, uint8 of at least ``nbytes``."""
        for name, tensor in self.views(block).items():
            tensor.copy_(layer[name])

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """The tensors in ``block``."""
        found = {}
        for name, dtype, shape, start in self.entries:
            size = math.prod(shape) * dtype.itemsize
            found[name] = block[start : start + size].view(dtype).view(shape)
        return found


class Host:
    """Layers in host memory, pinned if they are for a GPU: one block each. ``layers`` are read one after the other."""

    def __init__(self, layers: Iterator[Layer], pinned: bool):
        self._held = [self._hold(layer, pinned) for layer in layers]

    def __len__(self) -> int:
        return len(self._held)

    def __call__(self, index: int) -> tuple[Packing, Tensor]:
        return self._held[index]

    def release(self, index: int, copied: torch.cuda.Event | None) -> None:
        """Nothing to do: the block stays."""

    def apart(self) -> Host:
        """The same layers for another stream: nothing here is ever written again."""
        return self

    @staticmethod
    def _hold(layer: Layer, pinned: bool) -> tuple[Packing, Tensor]:
        packing = Packing.of(layer)
        block = pinned_block(packing.nbytes) if pinned else torch.empty(packing.nbytes, dtype=torch.uint8)
        packing.pack(layer, block)
        return packing, block


class Staged:
    """Layers read when they are asked for, through two blocks that take turns: ``read(index)`` gives one on the CPU."""

    def __init__(self, count: int, read: Callable[[int], Layer], pinned: bool):
        self._count, self._read, self._pinned = count, read, pinned
        self._blocks: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def __len__(self) -> int:
        return self._count

    def __call__(self, index: int) -> tuple[Packing, Tensor]:
        layer = self._read(index)
        packing, turn = Packing.of(layer), self._turn
        if (event := self._copied[turn]) is not None:
            event.synchronize()  # this block's last copy must have left it
        if len(self._blocks[turn]) < packing.nbytes:
            make = pinned_block if self._pinned else _plain_block
            self._blocks[turn] = make(packing.nbytes)
        packing.pack(layer, self._blocks[turn])
        return packing, self._blocks[turn][: packing.nbytes]

    def apart(self) -> Staged:
        """The same layers for another stream, which reads with a thread of its own, through blocks of its own."""
        return Staged(self._count, self._read, self._pinned)

    def release(self, index: int, copied: torch.cuda.Event | None) -> None:
        """The block handed out last is free once ``copied`` has happened."""
        self._copied[self._turn] = copied
        self._turn = 1 - self._turn


class Stream(Sequence[Layer]):
    """The layers of ``source`` (:class:`Host` or :class:`Staged`) on ``device``, one at a time, the next one fetched
    ahead by a thread. Ask for them in ascending order: any other is right too, but waits for its copy.

    ``changes`` are applied to a layer after its copy. What was handed out before stays valid as long as it is held;
    hold one layer at a time.
    """

    def __init__(self, source: Host | Staged, device: torch.device, changes: tuple[Change, ...] = ()):
        self._source, self.device, self._changes = source, device, changes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ppf-stream")
        self._at, self._layer = -1, None
        self._next: tuple[int, Future[Any]] | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Layer:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index != self._at:
            self._layer = None  # let go before the next one takes memory
            self._layer, self._at = self._take(index), index
        return self._layer

    def __iter__(self) -> Iterator[Layer]:
        return (self[index] for index in range(len(self)))

    def map(self, change: Change) -> Stream:
        """The same layers, each after ``change(index, layer)``."""
        return Stream(self._source.apart(), self.device, (*self._changes, change))

    def close(self) -> None:
        """Let go of the layer at hand and of the one on its way."""
        if self._next is not None:
            self._next[1].result()
        self._next, self._at, self._layer = None, -1, None

    def _take(self, index: int) -> Layer:
        ahead, self._next = self._next, None  # one that failed, for lack of memory say, is not asked again
        future = ahead[1] if ahead and ahead[0] == index else self._thread.submit(self._fetch, index)
        views, copied = future.result()
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
            for tensor in views.values():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        if self._changes:
            views = self._changed(index, views)
        following = (index + 1) % len(self)  # a wave of policies is followed by the next one, from the first layer
        self._next = None if len(self) == 1 else (following, self._thread.submit(self._fetch, following))
        return views

    def _changed(self, index: int, views: Layer) -> Layer:
        """``views`` after all changes. What is as it was, norms as a rule, is copied: it would keep the whole block."""
        storage = {tensor.untyped_storage().data_ptr() for tensor in views.values()}
        for change in self._changes:
            views = change(index, views)
        left = {name: t for name, t in views.items() if t.untyped_storage().data_ptr() in storage}
        few = 2 * sum(t.nbytes for t in left.values()) < sum(t.nbytes for t in views.values())
        return dict(views) | {name: t.clone() for name, t in left.items()} if few else views

    def _fetch(self, index: int) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """In the thread: the layer's tensors on the device, and the event that ends their copy."""
        packing, block = self._source(index)
        if self._copies is None:
            # A staging block is written again; only what outlives it may be handed out.
            copy = block.clone() if isinstance(self._source, Staged) else block
            self._source.release(index, None)
            return packing.views(copy), None
        with torch.cuda.device(self.device), torch.cuda.stream(self._copies):
            moved = block.to(self.device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._copies)
        self._source.release(index, copied)
        return packing.views(moved), copied


def pinned_block(size: int) -> Tensor:
    """``size`` bytes of page-locked memory, uint8: no more than that, where torch's own allocator rounds up to a power
    of two."""
    held = np.empty(size, dtype=np.uint8)
    if size:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(held.ctypes.data, size, 0))
        # numpy ends weak references before it frees the memory; an address that stays registered cannot be used again.
        weakref.finalize(held, torch.cuda.cudart().cudaHostUnregister, held.ctypes.data)
    return torch.from_numpy(held)


def _plain_block(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)

"""Recording work on a GPU as a CUDA graph: many small kernels are then one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

_WARM_UP = 3


def warm_up(work: Callable[[], Any], device: torch.device, times: int = _WARM_UP) -> None:
    """Run ``work`` on a side stream, as torch asks before a recording: kernels compile, libraries allocate."""
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(times):
            work()
    current.wait_stream(side)


def record(work: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of ``work``, which has run before, and what it returned: tensors that every replay fills anew.

    The graph holds addresses: whatever ``work`` reads must outlive it.
    Graphs with one ``pool`` share the memory of their intermediate results: one of them runs at a time.
    """
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    # The collector might free another graph or its memory meanwhile, which CUDA forbids: the recording would be void.
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
    finally:
        if collecting:
            gc.enable()
    return graph, result

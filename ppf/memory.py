"""How much memory there is for what a command computes, and the bound that a user sets on a GPU's."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from . import ranks
from .errors import InputError

# What CUDA, its libraries and the kernels' code take on an H100 before torch allocates anything.
_CONTEXT = 700 << 20
# And what NCCL takes beside that where several processes share the work.
_COMMUNICATION = 1700 << 20
_limits: dict[int, int] = {}
# A CPU's caches of activations and solutions: more gains nothing there.
_CPU_ROOM = 8 << 30


def bound(device: torch.device, limit: int | None) -> None:
    """Hold this process to ``limit`` bytes of a GPU's memory, CUDA's own included; None and CPUs are not bound.

    torch raises ``OutOfMemoryError`` beyond it. Raises ``InputError`` for more than the GPU has.
    """
    if limit is None or device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if limit > total:
        remedy = "Use less, or leave it out"
        raise InputError("gpu-memory-gb", f"{limit / 1e9:g}", f"is more than the GPU's {total / 1e9:.0f}", remedy)
    ours = limit - _outside()
    torch.cuda.set_per_process_memory_fraction(ours / total, _number(device))
    _limits[_number(device)] = ours


def capacity(device: torch.device) -> int | None:
    """Bytes that a GPU has for this process whatever it holds at the moment, so that what is planned by it does not
    depend on that; None on a CPU, where memory decides nothing."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory - _outside()
    return min(total, _limits.get(_number(device), total))


def tokens_at_once(device: torch.device, share: float, token_bytes: int) -> int | None:
    """How many tokens' activations of ``token_bytes`` each take ``share`` of what a GPU has; None on a CPU."""
    total = capacity(device)
    return None if total is None else int(share * total) // token_bytes


def room(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``: what is free, and no more than the bound leaves."""
    if device.type != "cuda":
        return _CPU_ROOM
    free, _ = torch.cuda.mem_get_info(device)
    held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    found = free + reserved - held
    limit = _limits.get(_number(device))
    return max(0, found if limit is None else min(found, limit - held))


def host_room() -> int:
    """Bytes of host memory that are available, by Linux's own estimate."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/meminfo does not say how much memory is available")


def note(text: str) -> None:
    """One line to the user: what was done because memory is short."""
    warnings.warn(f"ppf: {text}", stacklevel=2)


def _outside() -> int:
    """Bytes that this process holds of a GPU outside torch's allocator."""
    return _CONTEXT + (_COMMUNICATION if ranks.world() > 1 else 0)


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index

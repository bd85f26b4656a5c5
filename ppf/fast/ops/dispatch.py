"""Whether the Triton kernels can serve a call: what every family of ops asks before it launches one."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def triton_available() -> bool:
    """Triton is an optional dependency; without it CUDA tensors take the reference path."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def kernels_apply(x: Tensor, *weights: Tensor) -> bool:
    """The kernels are built for 16-bit types and unit last strides; the reference path takes everything else."""
    sixteen_bit = x.dtype in (torch.bfloat16, torch.float16)
    return sixteen_bit and triton_available() and all(w.stride(-1) == 1 for w in weights)


def copy_engine(*tensors: Tensor) -> bool:
    """True if the device has Hopper's copy engine and it can address these tensors."""
    from ppf.kernels.tile import describable

    return torch.cuda.get_device_capability(tensors[0].device)[0] >= 9 and describable(*tensors)

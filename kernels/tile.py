"""What every Triton launcher here needs: precision of a dot, tensor descriptors, the number of multiprocessors."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def precision(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied exactly: tf32 would miss the promise "at most twice torch's error"."""
    return "ieee" if dtype == torch.float32 else "tf32"


def describable(*tensors: Tensor) -> bool:
    """True if Hopper's copy engine can address the tensors: 16-byte aligned base and row pitch, unit last stride."""
    return all(
        t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


def descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Host-side descriptor of a 2-D row-major tensor, read in tiles of ``block``; outside reads give zero."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a persistent kernel should start (a few under the interpreter, to exercise the loop)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit
def silu_mul(gate, up):
    """silu(gate) · up in fp32."""
    return gate / (1.0 + tl.exp(-gate)) * up

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


def row_major(tensor: Tensor) -> Tensor:
    """``tensor`` with unit stride along its last dimension (itself if it has that already)."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


@lru_cache
def copy_engine(device: torch.device) -> bool:
    """Hopper's copy engine, or the interpreter, which plays it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


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


def three_fit(tiles: int, device: torch.device) -> bool:
    """Whether three programs a multiprocessor (two steps deep, 168 registers) beat two (three steps deep).

    Each is as good as its last wave is full; at equal fill the deeper pipeline wins by some 3 %.
    """
    two, three = (n * multiprocessors(device) for n in (2, 3))
    return 0.97 * tiles / (triton.cdiv(tiles, three) * three) > tiles / (triton.cdiv(tiles, two) * two)


@triton.jit
def swizzle(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile number to (m, n): GROUP tiles of m share each n, so that operands are reread from L2."""
    band = GROUP * tiles_n
    first = (tile // band) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + (tile % band) % height, (tile % band) // height


@triton.jit
def silu_mul(gate, up):
    """silu(gate) · up in fp32."""
    return gate / (1.0 + tl.exp(-gate)) * up

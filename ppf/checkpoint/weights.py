"""Weights as they are on disk, one at a time, and the check that every number is one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import InputError
from .headers import StoredTensor


def read_tensors(
    stored: Mapping[str, StoredTensor], device: str | torch.device = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all of ``stored``; on the CPU they are the mapped file. Raises ``InputError`` if a file is
    larger than can be mapped."""
    names = defaultdict(list)
    for name, tensor in stored.items():
        names[tensor.file].append(name)
    for file in sorted(names):
        with _opened(file, device) as reader:
            for name in names[file]:
                yield name, reader.get_tensor(stored[name].name)


def _opened(file: Path, device: str | torch.device) -> safe_open:
    try:
        return safe_open(file, framework="pt", device=str(device))
    except RuntimeError as error:  # torch maps it with room for changes, which must fit into memory
        remedy = "Write the model in smaller files: save_pretrained(folder, max_shard_size='5GB')"
        raise InputError("safetensors file", file, f"cannot be mapped ({error})", remedy) from None


def finite(file: Path, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``tensor`` in ``dtype`` (None: as it is). Raises ``InputError`` for NaN, Inf, and what overflows in float16."""
    if not _all_finite(tensor):
        problem = f"tensor {name} holds NaN or Inf"
        raise InputError("weights", file, problem, "The file is damaged or the model diverged: get it again")
    cast = tensor if dtype is None else tensor.to(dtype)
    # bfloat16 and float32 reach further than float16.
    if dtype is torch.float16 and cast is not tensor and not _all_finite(cast):
        raise InputError("dtype", dtype, f"tensor {name} of {file} overflows in it", "Use bfloat16 or float32")
    return cast


def _all_finite(tensor: Tensor) -> bool:
    # aminmax propagates NaN, and reads bf16 on a CPU several times faster than isfinite().all().
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())

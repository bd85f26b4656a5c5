"""Which dtype to compute in."""

from __future__ import annotations

import torch


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The checkpoint's own dtype on CUDA; on a CPU fp32, unless it is bf16 and the processor multiplies bf16 itself."""
    if device.type == "cuda" or stored is torch.float32:
        return stored
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if stored is torch.bfloat16 and native else torch.float32

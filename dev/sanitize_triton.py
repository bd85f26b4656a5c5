"""The grouped and elementwise Triton kernels on ragged shapes, for compute-sanitizer. Each tensor gets its own memory.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    python dev/sanitize_triton.py                # fills Triton's cache: compiling under the sanitizer takes minutes
    for tool in memcheck racecheck initcheck; do compute-sanitizer --tool $tool python dev/sanitize_triton.py; done

The CUDA kernels have a program of their own: csrc/check_gather.cu.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppf.kernels import elementwise, grouped, grouped_attention, grouped_losses, grouped_rows

DEVICE = torch.device("cuda")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def grouped_calls() -> dict[str, Callable[[], object]]:
    """States that end within a tile and within a step, one that nothing is added to, and weights of their own."""
    x, inner = normal(3, 70, 192), torch.zeros(3, 70, 128, dtype=torch.bfloat16, device=DEVICE)
    inner[:, :, :100] = normal(3, 70, 100)
    qkv, norm, head = normal(256, 192), normal(192), normal(1000, 192)
    gate_up, downs = normal(256, 192), [normal(192, width) for width in (128, 104)]
    cos, sin = normal(35, 16), normal(35, 16)
    attended, targets = normal(3, 70, 256), torch.randint(0, 1000, (70,), device=DEVICE)
    jobs = [0, 1, 2, 2], [100, 128, 0, 36], [1, 0, 0, 0], [0, 1, 2, 2], [3, 1, 2, 0]
    y, stacked = torch.empty(4, 70, 192, dtype=torch.bfloat16, device=DEVICE), normal(2, 192, 128)
    return {
        "grouped norm": lambda: grouped_rows.norm(x, norm, [2, 0], 1e-5),
        "grouped residual": lambda: grouped_rows.residual(x, x, norm, [2, 0], [-1, 1], 1e-5, 1.0),
        "grouped stack": lambda: grouped_rows.stack(downs, 128),
        "grouped heads": lambda: grouped.heads(x, qkv, None, None, cos, sin, [256, 128, 256], 35, 128, 1e-5),
        "grouped attention": lambda: grouped_attention.attention(attended, [2, 1, 2], 35, 2, 32, 0.2, 0),
        "grouped hidden": lambda: grouped.hidden(x, gate_up, None, [128, 64, 100], "silu"),
        "grouped outputs": lambda: grouped.outputs(y, x, inner, stacked, None, jobs, 1.0),
        "grouped losses": lambda: grouped_losses.losses(x, head, targets, 35, 1.0, None),
    }


def elementwise_calls() -> dict[str, Callable[[], object]]:
    """Rows that end within a block, packed and not."""
    logits, targets = normal(6, 5000), torch.randint(0, 5000, (6,), device=DEVICE)
    return {
        "silu_mul": lambda: elementwise.silu_mul(normal(13, 99), normal(13, 99)),
        "silu_mul, rows apart": lambda: elementwise.silu_mul(normal(13, 1100)[:, :1099], normal(13, 1099)),
        "rotate": lambda: elementwise.rotate(normal(2, 9, 5, 24), normal(9, 24), normal(9, 24)),
        "losses": lambda: elementwise.losses(logits, targets),
    }


def main() -> None:
    torch.manual_seed(0)
    for name, call in (grouped_calls() | elementwise_calls()).items():
        call()
        torch.cuda.synchronize()
        print(f"ran {name}", flush=True)


if __name__ == "__main__":
    main()

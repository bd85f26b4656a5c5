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

from ppf.kernels import elementwise, grouped

DEVICE = torch.device("cuda")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def grouped_calls() -> dict[str, Callable[[], object]]:
    """Three groups, an empty one among them, and one that ends within a step."""
    x, widths = normal(3, 70, 192), (64, 0, 100)
    gate, up, weight = normal(256, 192), normal(256, 192), normal(320, 192)
    own = [normal(320, 192) for _ in widths]
    return {
        "grouped gate_up": lambda: grouped.gate_up(x, gate, up, widths),
        "grouped outputs": lambda: grouped.outputs(x, weight, widths),
        "grouped inputs": lambda: grouped.inputs(x, [weight], widths),
        "grouped inputs, own weights": lambda: grouped.inputs(x, own, widths),
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

"""Every Triton kernel family once, on ragged shapes, for compute-sanitizer. Each tensor gets an allocation of its own.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    python dev/sanitize_triton.py                # fills Triton's cache: compiling under the sanitizer takes minutes
    for tool in memcheck racecheck initcheck; do compute-sanitizer --tool $tool python dev/sanitize_triton.py; done

The CUDA kernels have programs of their own: csrc/check_gather.cu and csrc/check_products.cu.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppf.kernels import blocks, gemv, grouped
from ppf.kernels import masked_linear as linear
from ppf.kernels import masked_swiglu as swiglu

DEVICE = torch.device("cuda")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def listed(count: int, total: int) -> Tensor:
    return torch.randperm(total)[:count].int().to(DEVICE)


def small(tokens: int) -> dict[str, Callable[[], object]]:
    """The kernels for 1 to 16 tokens."""
    x, first, second = normal(tokens, 200), normal(300, 200), normal(300, 200)
    rows, into = listed(151, 300), listed(99, 200)
    part = x.index_select(1, into)

    def masked() -> object:
        full, counts = gemv.expand(part, into, 200)
        return gemv.rows(full, (first,), None, 300, gemv.MASKED, counts)

    return {
        "rows": lambda: gemv.rows(x, (first,), rows, 151),
        "gate and up": lambda: gemv.rows(x, (first, second), rows, 151),
        "rows, listed inputs": lambda: gemv.rows(part, (first,), None, 300, 2, into),
        "rows, masked inputs": masked,
        "rows, input blocks": lambda: gemv.rows(normal(tokens, 128), (normal(77, 192),), None, 77, 1, listed(2, 3)),
        "columns": lambda: gemv.columns(part, normal(200, 300), into),
        "qkv": lambda: gemv.qkv(x, normal(256, 200), normal(64, 200), normal(64, 200), None, None, 200, 48),
    }


def large() -> dict[str, Callable[[], object]]:
    """The kernels for many tokens."""
    x, weight, other = normal(130, 192), normal(256, 192), normal(256, 192)
    rows, two, three = listed(99, 256), listed(2, 3), listed(3, 4)
    groups, widths = normal(3, 70, 192), (64, 0, 100)
    return {
        "linear": lambda: linear.linear(x, weight, rows, 99),
        "linear, input blocks": lambda: linear.linear(normal(130, 128), weight, None, 256, two),
        "linear, transposed": lambda: linear.linear(
            normal(130, 99), normal(192, 256), listed(99, 192), 256, transposed=True
        ),
        "gate_up": lambda: swiglu.gate_up(x, weight, other, rows, 99),
        "multiply_silu": lambda: swiglu.multiply_silu(normal(13, 99), normal(13, 99)),
        "gate_up_blocks": lambda: blocks.gate_up_blocks(x, weight, other, three),
        "linear_blocks": lambda: blocks.linear_blocks(x, weight, three),
        "input_blocks": lambda: blocks.input_blocks(normal(130, 128), weight, two),
        "input_blocks, transposed": lambda: blocks.input_blocks(normal(130, 128), normal(192, 256), two, True),
        "grouped outputs": lambda: grouped.outputs(groups, normal(320, 192), widths),
        "grouped inputs": lambda: grouped.inputs(groups, [normal(320, 192)], widths),
    }


def main() -> None:
    torch.manual_seed(0)
    for title, calls in (("1 token", small(1)), ("5 tokens", small(5)), ("130 tokens", large())):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            print(f"ran {name}, {title}", flush=True)


if __name__ == "__main__":
    main()

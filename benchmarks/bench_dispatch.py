"""The ways a masked product can take, raced against each other: what the thresholds in ppf/ops/dispatch.py rest on.

    python benchmarks/bench_dispatch.py --output benchmarks/results/dispatch_h200.json        (about 40 s)

CUDA graphs over rotating weights, the contenders taking turns (see bench_masked_gemm). "native" is CUDA
(ppf.fast.ops.many_tokens), "triton" is ppf.kernels, "copy" gathers the kept weights first, "cublas" has weights shrunk
beforehand: no contender, but the mark. Figures are microseconds. 1 to 16 tokens have one way only (dev/LOG.md has the
race of 2026-11-25 that the native products for them lost).
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from bench_masked_gemm import MODELS, measure_limits, normal, race
from torch import Tensor

from ppf.fast.ops import dispatch, many_tokens
from ppf.fast.ops.selection import Selection
from ppf.kernels import blocks as block_kernels
from ppf.kernels import masked_linear as linear_kernels
from ppf.kernels import masked_swiglu as tiles

COPIES = 3
Calls = dict[str, Callable[[int], object]]


class Weights:
    """Copies of one MLP, its transposed down and its shrunk form under one list."""

    def __init__(self, hidden: int, channels: int, keep: float):
        self.hidden, self.channels, self.width = hidden, channels, int(channels * keep) // 64 * 64
        self.gate, self.up, self.turned = ([normal(channels, hidden) for _ in range(COPIES)] for _ in range(3))
        self.down = [w.t().contiguous() for w in self.turned]
        self.list = Selection.indices(torch.randperm(channels)[: self.width].sort().values, channels)
        self.blocks = Selection.blocks(torch.randperm(channels // 64)[: self.width // 64], channels)
        self.shrunk = [[self.list.take(w[i], d).clone() for w, d in ((self.gate, 0), (self.up, 0), (self.down, 1))]
                       for i in range(COPIES)]  # fmt: skip
        device = self.gate[0].device
        self.rows = self.list.rows(device)
        self.block_rows, self.entries = self.blocks.rows(device), self.blocks.entries(device)

    def cublas_hidden(self, x: Tensor, i: int) -> Tensor:
        gate, up, _ = self.shrunk[i]
        return F.silu(F.linear(x, gate)) * F.linear(x, up)


def contenders(w: Weights, tokens: int) -> dict[str, Calls]:
    """Tens of tokens to thousands: gate and up, outputs alone, down with listed units and with listed blocks."""
    x, act = normal(tokens, w.hidden), normal(tokens, w.width)

    def copied(weight: Tensor, dim: int) -> Tensor:
        return dispatch.compact(weight, dim, w.width, w.rows)

    return {
        "hidden, list": {
            "cublas": lambda i: w.cublas_hidden(x, i),
            "native": lambda i: many_tokens.gate_up(x, w.gate[i], w.up[i], w.rows, w.width),
            "triton": lambda i: tiles.gate_up(x, w.gate[i], w.up[i], w.rows, w.width),
            "copy": lambda i: tiles.multiply_silu(*(F.linear(x, copied(v[i], 0)) for v in (w.gate, w.up))),
        },
        "hidden, blocks": {
            "cublas": lambda i: w.cublas_hidden(x, i),
            "native": lambda i: many_tokens.gate_up(x, w.gate[i], w.up[i], w.block_rows, w.width),
            "triton": lambda i: block_kernels.gate_up_blocks(x, w.gate[i], w.up[i], w.entries),
        },
        "outputs, list": {
            "cublas": lambda i: F.linear(x, w.shrunk[i][0]),
            "native": lambda i: many_tokens.outputs(x, w.gate[i], w.rows, w.width),
            "triton": lambda i: linear_kernels.linear(x, w.gate[i], w.rows, w.width),
            "copy": lambda i: F.linear(x, copied(w.gate[i], 0)),
        },
        "down transposed, list": {
            "cublas": lambda i: F.linear(act, w.shrunk[i][2]),
            "triton": lambda i: linear_kernels.linear(act, w.turned[i], w.rows, w.hidden, transposed=True),
            "copy": lambda i: F.linear(act, copied(w.turned[i], 0).t()),
        },
        "down, blocks": {
            "cublas": lambda i: F.linear(act, w.shrunk[i][2]),
            "triton": lambda i: block_kernels.input_blocks(act, w.down[i], w.entries),
        },
    }


def measure(model: str, keep: float, tokens: list[int]) -> list[dict]:
    hidden, channels, _, _ = MODELS[model]
    weights, results = Weights(hidden, channels, keep), []
    for count in tokens:
        for form, calls in contenders(weights, count).items():
            us = {name: round(seconds * 1e6, 2) for name, seconds in race(calls, COPIES, laps=5).items()}
            results.append({"model": model, "keep": keep, "tokens": count, "form": form, "us": us})
            print(f"{model} keep {keep:.2f} t={count:<5} {form:28} {us}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", action="append", choices=sorted(MODELS))
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 256, 512, 1024, 2048, 4096])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    limits = measure_limits()
    with torch.no_grad():
        models = arguments.model or sorted(MODELS)
        rows = [row for model in models for keep in (0.5, 0.75) for row in measure(model, keep, arguments.tokens)]
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "copy_TB_per_s": round(limits.bandwidth / 1e12, 3),
        "product_TFLOP_per_s": round(limits.flops / 1e12, 1),
        "rows": rows,
    }
    temporary = arguments.output.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(arguments.output)


if __name__ == "__main__":
    main()

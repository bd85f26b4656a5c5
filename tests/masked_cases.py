"""What the tests of the masked ops share: the error rule, selections of every kind, and where kernels can run.

The rule: measured against the same product in fp64, an op may be at most twice as wrong as torch itself on physically
shrunk weights of that dtype. Kernels run on a GPU, or on the CPU under Triton's interpreter, which has to be chosen
before Triton is imported: ``interpreted`` reruns a test file in such a process.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppf.fast.ops.selection import Selection

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter multiplies bf16 wrongly, and fp32 is the strictest check; the GPU is asked for what it serves.
DTYPES = [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16]
on_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="kernels need a GPU or the interpreter")
# The smallest error worth a ratio, in units of the dtype's own rounding: below it both sides are exact by luck.
FLOOR = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-24, torch.float64: 2**-53}


def selections(total: int) -> list[Selection]:
    """Every kind, sorted and not, with a repeated unit, empty and full."""
    generator = torch.Generator().manual_seed(total)
    shuffled = torch.randperm(total, generator=generator)
    kept = [Selection.prefix(total * 3 // 8, total), Selection.prefix(0, total), Selection.full(total)]
    kept += [
        Selection.indices(shuffled[: total // 2 + 1].sort().values, total),
        Selection.indices(shuffled[:37], total),
    ]
    kept += [Selection.indices([total - 1, 3, 3, 0, 17, 3], total)]
    if total % 64 == 0:
        kept += [Selection.blocks([total // 64 - 1, 0, 1], total)]
    return kept


def kernel_selections(total: int) -> list[Selection]:
    """Those that reach a kernel: not empty; under the interpreter, which is slow, one of each kind."""
    kept = [s for s in selections(total) if s.width]
    return [kept[0], *kept[3:]] if INTERPRETED else kept


def error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact|| in fp64; NaN counts as infinite."""
    difference = (got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)
    return float("inf") if difference.isnan() else difference.item()


def within_twice(got: Tensor, shrunk: Tensor, exact: Tensor) -> bool:
    """The rule: ``got`` against ``shrunk``, torch's result of the same dtype, both against the fp64 ``exact``."""
    assert got.shape == shrunk.shape == exact.shape and got.dtype == shrunk.dtype
    if got.numel() == 0 or not exact.any():
        return torch.equal(got.double(), exact.double())
    return error(got, exact) <= 2 * max(error(shrunk, exact), FLOOR[got.dtype])


def normal(*shape: int, dtype=torch.bfloat16) -> Tensor:
    """Weights of the size that keeps activations near one, on the GPU."""
    return (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).to(dtype)


def listed(count: int, total: int) -> Tensor:
    return torch.randperm(total)[:count].int().cuda()


def poisoned(weight: Tensor, index: Tensor, dim: int) -> Tensor:
    """A copy whose unlisted rows or columns are NaN."""
    pruned = torch.full_like(weight, float("nan"))
    return pruned.index_copy_(dim, index.long(), weight.index_select(dim, index))


def mlp(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x · weightᵀ in the dtype and in fp64."""
    return F.linear(x, weight), F.linear(x.double(), weight.double())


def interpreted(file: str) -> None:
    """Run the kernel tests of ``file`` under Triton's interpreter; fails unless some ran and all passed."""
    pytest.importorskip("triton")
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "kernel and not interpreter", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]

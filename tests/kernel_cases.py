"""What the tests of the Triton kernels share: the error rule, and where kernels can run.

The rule: measured against the same result in fp64, a kernel may be at most twice as wrong as torch itself in that
dtype. Kernels run on a GPU, or on the CPU under Triton's interpreter, which has to be chosen before Triton is imported:
``interpreted`` reruns a test file in such a process.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter multiplies bf16 wrongly, and fp32 is the strictest check; the GPU is asked for what it serves.
DTYPES = [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16]
on_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="kernels need a GPU or the interpreter")
# The smallest error worth a ratio, in units of the dtype's own rounding: below it both sides are exact by luck.
FLOOR = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-24, torch.float64: 2**-53}


def error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact|| in fp64; NaN counts as infinite."""
    difference = (got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)
    return float("inf") if difference.isnan() else difference.item()


def within_twice(got: Tensor, torchs: Tensor, exact: Tensor) -> bool:
    """The rule: ``got`` against ``torchs``, torch's result of the same dtype, both against the fp64 ``exact``."""
    assert got.shape == torchs.shape == exact.shape and got.dtype == torchs.dtype
    if got.numel() == 0 or not exact.any():
        return torch.equal(got.double(), exact.double())
    return error(got, exact) <= 2 * max(error(torchs, exact), FLOOR[got.dtype])


def interpreted(file: str) -> None:
    """Run the kernel tests of ``file`` under Triton's interpreter; fails unless some ran and all passed."""
    pytest.importorskip("triton")
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "kernel and not interpreter", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]

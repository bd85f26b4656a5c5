"""Predictors: milliseconds for one policy, policies a second in a batch, seconds of a training; all with uncertainty.

    python benchmarks/bench_predictor.py --device cuda --output benchmarks/results/predictor_h200.json \
        [--run RUN --test-text TEXT]

Geometry of ref-14m (32 sub-layers, 12 FFN levels), a made-up log-perplexity. Medians of wall time, the device waited
for, levels already on it; on a GPU one policy also as a recorded call (CapturedPredictor). The Gaussian process's limit
in a batch: n² fp32 operations a policy (the triangle of L⁻¹ times its covariances) at the rate of a plain fp32 matrix
product measured in the same run. With a RUN its predictor is timed beside true evaluations of some policies on the
whole of TEXT, one by one and in batches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from shapes import structure
from torch import Tensor

from ppf.choose.candidates.sampling import random_levels, random_ratios
from ppf.choose.predictor import KINDS, CapturedPredictor, make_predictor
from ppf.choose.predictor.training import fit_predictor
from ppf.fitting.reader import Reader
from ppf.fitting.run import Run
from ppf.fitting.session import Session
from ppf.model.grid import Grid

GRID = Grid(structure("ref-14m"), 64)
DRAWN = 1 << 11
BATCH = {"cuda": 1 << 18, "cpu": 1 << 12}
EVALUATED = {"cuda": 64, "cpu": 2}


def damage(levels: Tensor) -> Tensor:
    """A made-up log-perplexity fp32 [P]: every sub-layer's own loss, and products of neighbours."""
    lost = 1 - levels / torch.tensor(GRID.maximum)
    weight = 0.3 + 2 * torch.rand(GRID.sublayers, generator=torch.Generator().manual_seed(7))
    own = (weight * lost.square()).mean(-1)
    return 3.5 + own + 1.5 * (lost[:, :-1] * lost[:, 1:]).mean(-1) + own.square()


def sample(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return random_levels(GRID, random_ratios(count, generator), generator)


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call, the device waited for; two calls before do not count."""
    times = []
    for _ in range(repeats + 2):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def gemm_rate(device: str) -> float:
    """fp32 operations a second of a square matrix product."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, 5)


def measure(kind: str, count: int, device: str, rate: float) -> dict[str, Any]:
    """One kind of predictor at ``count`` measurements."""
    levels = sample(count, seed=0)
    predictor = make_predictor(kind, GRID).to(device)
    wait(device)
    started = time.perf_counter()
    fit_predictor(predictor, levels, damage(levels), seed=0)
    predictor.eval()(levels[:1])
    wait(device)
    fitted = time.perf_counter() - started
    # Drawing policies takes longer than predicting them, and repeated ones take as long as new ones.
    batch = sample(DRAWN, seed=1).to(device).repeat(BATCH[device] // DRAWN, 1)
    one = seconds(lambda: predictor(batch[:1]), device, 50)
    captured = CapturedPredictor(predictor) if device == "cuda" else None
    recorded = seconds(lambda: captured(batch[:1]), device, 50) if captured else None
    many = len(batch) / seconds(lambda: predictor(batch), device, 5)
    started = time.perf_counter()
    fit_predictor(predictor, levels, damage(levels), seed=0, steps=150, fresh=False)
    wait(device)
    row = {"kind": kind, "measurements": count, "fit_s": fitted, "refit_s": time.perf_counter() - started}
    row |= {"one_ms": 1000 * one, "batch": len(batch), "per_second": many}
    if recorded:
        row["one_recorded_ms"] = 1000 * recorded
    if kind == "gp":
        row["share_of_limit"] = many * count**2 / rate
    return row


def against_a_test_set(path: Path, text: Path, device: str) -> dict[str, Any]:
    """A run's predictor and true evaluations of some policies on all of ``text``, seconds a policy."""
    run = Run(path)
    sequences = Reader.of(run.model_path, run.sequences().shape[1]).sequences(text)
    evaluator, predictor = Session(run, device).evaluator(sequences=sequences), run.predictor.to(device).eval()
    generator = torch.Generator().manual_seed(2)
    levels = random_levels(run.grid, random_ratios(DRAWN, generator), generator)
    policies = run.grid.decode(levels[: EVALUATED[device]])
    batch = levels.to(device).repeat(BATCH[device] // DRAWN, 1)
    single = CapturedPredictor(predictor) if device == "cuda" else predictor
    true = seconds(lambda: evaluator.log_perplexity(policies[0]), device, 5)
    together = seconds(lambda: evaluator.log_perplexities(policies), device, 3) / len(policies)
    one = seconds(lambda: single(batch[:1]), device, 50)
    many = seconds(lambda: predictor(batch), device, 5) / len(batch)
    return {
        "measurements": len(run.experience), "tokens": evaluator.tokens, "evaluate_one_s": true,
        "evaluate_in_a_batch_s": together, "predict_one_s": one, "predict_in_a_batch_s": many,
        "times_faster_one": true / one, "times_faster_batch": together / many,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--measurements", nargs="+", type=int, default=[4000, 2000, 600])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--test-text", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    rate = gemm_rate(device)
    environment = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    data: dict[str, Any] = {"environment": environment, "gemm_TFLOP/s": rate / 1e12}
    if arguments.run:
        data["test_set"] = against_a_test_set(arguments.run, arguments.test_text, device)
        print(json.dumps(data["test_set"]), flush=True)
    rows: list[dict[str, Any]] = []
    for kind in arguments.kinds:
        for count in arguments.measurements:
            rows.append(measure(kind, count, device, rate))
            print(json.dumps(rows[-1]), flush=True)
            if arguments.output:  # after every row: what was measured stays when the rest is cut off
                arguments.output.write_text(json.dumps(data | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

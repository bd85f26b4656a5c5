"""How long it takes to move policies onto a budget, by structure, batch and device. About 30 s on a CPU, 20 s on a GPU.

    python benchmarks/bench_projection.py --output benchmarks/results/projection_cpu.json [--device cuda]

``general`` is any utilities, ``nearest`` the direct path that mutation, breeding and random policies take; on a GPU
``graph`` is the general path of one policy replayed from a CUDA graph. The limit of a projection is its launches, not
bytes: the utilities of one Llama-2-7B policy are 44 kB. All costs are checked against the budget.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import structure

from ppf._version import versions
from ppf.choose.budget.projection import Projector
from ppf.model.grid import Grid
from ppf.storage.files import write_json

SHAPES = {
    "ref-14m": structure("ref-14m"),
    "llama-2-7b": structure("llama-2-7b"),
    "llama-3-8b": structure("llama-3-8b"),
}
BATCHES = (1, 64, 512)
_ELEMENTS = 1 << 24  # utilities of a batch at most, so that a CPU is done in seconds


def milliseconds(call: Callable[[], Any], cuda: bool, laps: int) -> dict[str, float]:
    """Median and least wall-clock time of a call, until the GPU is idle."""
    times = []
    for lap in range(laps + 2):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        if lap > 1:
            times.append(1e3 * (time.perf_counter() - start))
    return {"median": statistics.median(times), "least": min(times)}


def rows(device: torch.device, name: str) -> list[dict[str, Any]]:
    grid, generator, found = Grid(SHAPES[name], 64), torch.Generator().manual_seed(0), []
    projector, cuda = Projector(grid).to(device), device.type == "cuda"
    for batch in BATCHES:
        if batch * grid.sublayers * grid.levels > _ELEMENTS:
            continue
        utility = torch.randn(batch, grid.sublayers, grid.levels, generator=generator).cumsum(-1).to(device)
        fractions = torch.rand(batch, grid.sublayers, generator=generator).to(device)
        ratio = (0.1 + 0.5 * torch.rand(batch, generator=generator)).to(device)
        calls = {
            "general": partial(projector, utility, ratio),
            "nearest": partial(projector.nearest, fractions, ratio),
        }
        if cuda and batch == 1:
            calls["graph"] = recorded(calls["general"]).replay
        for path, call in calls.items():
            row = {"structure": name, "batch": batch, "path": path}
            found.append(row | milliseconds(call, cuda, 60 if batch == 1 else 5))
            print(found[-1], flush=True)
        check(grid, calls["general"](), ratio)
        check(grid, calls["nearest"](), ratio)
    return found


def recorded(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def check(grid: Grid, levels: torch.Tensor, ratio: torch.Tensor) -> None:
    target = (1 - ratio.double()) * grid.structure.decoder_parameters
    assert float((grid.kept(levels) - target).abs().max()) <= min(grid.step_cost) / 2 * (1 + 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} thread(s)"
    facts = {"date": datetime.date.today().isoformat(), "device": where, "versions": versions()}
    found = [row for name in SHAPES for row in rows(device, name)]
    write_json(options.output, facts | {"unit": "milliseconds", "rows": found})


if __name__ == "__main__":
    main()

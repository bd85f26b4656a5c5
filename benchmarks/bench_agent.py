"""The agent: milliseconds from a budget to a policy that meets it, one at a time and in batches.

    python benchmarks/bench_agent.py --device cuda --output benchmarks/results/agent_h200.json

Medians of wall time, the device waited for. On a GPU one answer is timed as Python calls it and as the replay of a CUDA
graph; its limit there is the launches alone, some 1.3 µs each in a graph. Weights are random: time does not depend on
them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from shapes import structure

from ppf._version import versions
from ppf.choose.agent import Agent
from ppf.choose.candidates.sampling import RATIO_RANGE
from ppf.model.grid import Grid

GRIDS = {
    "ref-14m": Grid(structure("ref-14m"), 64),
    "llama-2-7b": Grid(structure("llama-2-7b"), 64),
    "llama-3-8b": Grid(structure("llama-3-8b"), 64),
}
BATCHES = {"cpu": (1,), "cuda": (1, 64, 1024)}
REPETITIONS = 50


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median over repetitions, after a few to warm up."""
    times = []
    for repetition in range(REPETITIONS + 5):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repetition >= 5:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def graphed(agent: Agent, ratio: torch.Tensor) -> torch.cuda.CUDAGraph:
    """One answer recorded; raises what the recording raises (an operation that waits for the device, say)."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        agent(ratio)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        agent(ratio)
    return graph


def rows(name: str, grid: Grid, device: torch.device) -> list[dict[str, Any]]:
    """One row a batch size, and one for the graph of a single answer."""
    agent, found = Agent(grid).to(device).eval(), []
    torch.nn.init.normal_(agent.network[4].weight, std=0.1)
    for batch in BATCHES[device.type]:
        ratio = torch.linspace(*RATIO_RANGE, batch, device=device)
        took = milliseconds(lambda ratio=ratio: agent(ratio), device)
        found.append({"model": name, "batch": batch, "ms": took, "answers_per_s": 1000 * batch / took})
    if device.type == "cuda":
        try:
            graph = graphed(agent, torch.tensor([0.37], device=device))
            found.append({"model": name, "batch": 1, "graph": True, "ms": milliseconds(graph.replay, device)})
        except RuntimeError as error:
            found.append({"model": name, "batch": 1, "graph": True, "error": str(error).splitlines()[0]})
    return found


def main() -> None:
    """Measure all models and write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    found = [row for name, grid in GRIDS.items() for row in rows(name, grid, device)]
    data = {"device": where, "versions": versions(), "date": datetime.now(UTC).isoformat(timespec="minutes")}
    arguments.output.write_text(json.dumps(data | {"rows": found}, indent=1) + "\n", encoding="utf-8")
    for row in found:
        print(row)


if __name__ == "__main__":
    main()

"""Whether the sum of a latency table meets whole models: predicted beside measured, policy by policy. Needs a GPU.

    python benchmarks/bench_profiling.py --output benchmarks/results/profiling_h100.json    # about 60 s

Two shapes with random weights in bf16: one whose steps are all launches, and one of a billion parameters. For prompt
passes and decode steps, random policies from 10 to 60 %, uniform ones and the dense model are timed against the sum.
A share of the physical limit is not given: what is measured here is the error of the sum, not the speed of the runtime
(see bench_decode.py).
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import torch
from shapes import random_model

from ppf.choose.candidates.sampling import random_levels, uniform_policy
from ppf.deliver.profiling import measure_profile, profile_facts
from ppf.fast.permute import identity
from ppf.fast.timing import Workload, milliseconds
from ppf.fitting.materialize import materialize
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy
from ppf.storage.files import write_json

# FFN multiple, tokens.
MEASURED = {"ref-14m": (64, 512), "1b": (256, 2048)}


def policies(grid: Grid) -> list[Policy]:
    ratios = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    drawn = grid.decode(random_levels(grid, ratios, torch.Generator().manual_seed(0)))
    return [*drawn, uniform_policy(grid, 0.3), uniform_policy(grid, 0.5), grid.dense()]


def rows(name: str) -> list[dict[str, Any]]:
    decoder, (multiple, tokens) = Decoder.of_model(random_model(name)), MEASURED[name]
    grid = Grid(decoder.structure, multiple)
    order, found = identity(decoder), []
    for workload in (Workload("prefill", 1, tokens), Workload("decode", 1, tokens), Workload("decode", 16, tokens)):
        start = time.perf_counter()
        profile = measure_profile(grid, lambda p: materialize(decoder, order, grid, p), workload)
        seconds, costs = time.perf_counter() - start, profile.costs(grid)
        for policy in policies(grid):
            predicted = float(costs.of(grid.encode([policy]))[0])
            measured = milliseconds(materialize(decoder, order, grid, policy), workload)
            row = {"shape": name, "workload": vars(workload), "ratio": grid.ratio(policy), "predicted": predicted}
            found.append(row | {"measured": measured, "off": measured / predicted - 1, "profile_seconds": seconds})
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    facts = profile_facts(random_model("ref-14m")) | {"date": datetime.date.today().isoformat()}
    write_json(
        options.output, facts | {"unit": "milliseconds", "rows": [row for name in MEASURED for row in rows(name)]}
    )


if __name__ == "__main__":
    main()

"""The runtime at shapes of 7B and 8B with random weights, against stock transformers in the same run. Needs a GPU.

    python benchmarks/bench_decode.py --output benchmarks/results/decode_h100.json [--model llama-2-7b]
    python benchmarks/bench_decode.py --output benchmarks/results/decode_compiled_h100.json --compiled

Dense, and with half of the kv-groups and channels of every layer; then one elastic model, switched between uniform
policies. Medians of whole ``generate()`` calls; what the columns mean is in ppf/fast/runtime/benchmark.py. ``--alone``
measures nothing but one sequence's decoding, by PPF. ``--compiled`` compares that with stock generation too, eager and
with a static cache and torch.compile: it compiles for minutes. Expect a minute a shape without options, seconds with
the first, three minutes with the second.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
import triton
from shapes import random_decoder, random_model
from transformers import PreTrainedModel

from ppf.choose.candidates.sampling import uniform_policy
from ppf.deliver.elastic.model import Elastic, elastic_model
from ppf.families import KINDS
from ppf.fast.runtime.benchmark import Ceilings, decode_row, measure_ceilings, prefill_row, rows_as_dicts
from ppf.fitting.factors import Factors, boundaries_of, packed_size, stored_dtype, tensors_of
from ppf.fitting.library import Library
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid

MODELS = "llama-2-7b", "llama-3-8b", "qwen2.5-7b", "qwen3-8b"


def measure(model: PreTrainedModel, ratio: float, mode: str, ceilings: Ceilings) -> list[dict[str, Any]]:
    """All rows of one model; ``mode`` is "alone", "compiled" or "all"."""
    rows = [decode_row(model, "ppf", 1, 128, 256, ceilings, ratio)]
    if mode == "alone":
        print(rows[0], flush=True)
        return rows_as_dicts(rows)
    # Eager steps take as long as they take, however many; compiled ones are compiled for one length.
    rows.append(decode_row(model, "eager", 1, 128, 32, ceilings, ratio, 1))
    if mode == "compiled":
        rows.append(decode_row(model, "compiled", 1, 128, 256, ceilings, ratio, 1))
    else:
        rows += [decode_row(model, "ppf", batch, 128, 128, ceilings, ratio) for batch in (16, 64)]
        rows += [prefill_row(model, r, batch, 2048, ceilings, ratio) for r in ("ppf", "eager") for batch in (1, 8)]
    for row in rows:
        print(row, flush=True)
    return rows_as_dicts(rows)


def elastic(name: str, ceilings: Ceilings) -> dict[str, Any]:
    """Milliseconds of switching, speed on prefix views, and memory, of one elastic model.

    Its library is real in size and in what it solves, but all layers share one layer's factors: a whole one would take
    long to make, and no figure here depends on its values.
    """
    decoder = random_decoder(name)
    grid, model, result = Grid(decoder.structure, 256), elastic_model(decoder), {}
    for kind, library in (("without refit", None), ("with refit", shared_library(decoder, grid))):
        model.attach(grid, decoder, library, lambda ratio: uniform_policy(grid, ratio))
        first = [switch(model, ratio) for ratio in (0.3, 0.5)]
        resident = [switch(model, ratio) for ratio in (0.3, 0.5) * 10]
        result[kind] = {"first_ms": first, "again_ms_median": median(resident), "again_ms_max": max(resident)}
        if library is not None:
            rows = []
            for ratio in (0.0, 0.5):
                model.set_ratio(ratio)
                rows.append(decode_row(model, "ppf", 1, 128, 128, ceilings, ratio))
                rows.append(prefill_row(model, "ppf", 1, 2048, ceilings, ratio))
            result[kind]["rows"] = rows_as_dicts(rows)
        held = sum(tensor.nbytes for layer in decoder.layers for tensor in layer.values())
        result[kind]["weight_gigabytes"] = held / 1e9
        print(kind, result[kind], flush=True)
    return result


def switch(model: Elastic, ratio: float) -> float:
    """Milliseconds until the model has ``ratio``, the device included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.set_ratio(ratio)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def shared_library(decoder: Decoder, grid: Grid) -> Library:
    """A library whose layers share one pair of factors."""

    def factors(kind: str) -> Factors:
        boundaries = tuple(boundaries_of(grid, kind, 0))
        dtype = stored_dtype(boundaries[-1])
        packed = 0.01 / boundaries[-1] * torch.randn(packed_size(boundaries), dtype=dtype, device="cuda")
        return Factors(packed, boundaries, torch.zeros(len(boundaries), dtype=torch.float64))

    shared = tensors_of({kind: factors(kind) for kind in KINDS})
    return Library(decoder, grid, [shared] * grid.structure.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--alone", dest="mode", action="store_const", const="alone", default="all")
    parser.add_argument("--compiled", dest="mode", action="store_const", const="compiled")
    arguments = parser.parse_args()
    ceilings = measure_ceilings(torch.device("cuda"), torch.bfloat16)
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "copy_TB_per_s": round(ceilings.bytes_per_second / 1e12, 3),
        "product_TFLOP_per_s": round(ceilings.operations_per_second / 1e12, 1),
        "models": {},
    }
    for name in arguments.model or MODELS:
        rows = []
        for keep in (1.0, 0.5):
            start, model = time.perf_counter(), random_model(name, keep)
            rows += measure(model, 1 - keep, arguments.mode, ceilings)
            del model
            gc.collect()  # graphs and models hold each other
            torch.cuda.empty_cache()
            print(f"{name} {keep}: {time.perf_counter() - start:.0f} s", flush=True)
            report["models"][name] = {"rows": rows}
            write(report, arguments.output)
        if arguments.mode == "all":
            report["models"][name]["elastic"] = elastic(name, ceilings)
            write(report, arguments.output)


def write(report: dict[str, Any], path: Path) -> None:
    """After every model, so that a killed run leaves what it has measured."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()

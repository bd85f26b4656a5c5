"""The runtime at Llama shapes with random weights, against stock transformers in the same run. Needs a GPU.

    python benchmarks/bench_decode.py --output benchmarks/results/decode_h100.json [--model llama-2-7b]
    python benchmarks/bench_decode.py --output benchmarks/results/decode_compiled_h100.json --compiled

Dense, and with half of the kv-groups and channels of every layer; then one elastic model, switched between uniform
policies. Medians of whole ``generate()`` calls; what the columns mean is in ppf/runtime/benchmark.py. ``--compiled``
compares one sequence's decoding with stock generation with a static cache and torch.compile too, and nothing else: it
compiles for minutes. Expect two minutes for the first command and, with ``--model llama-2-7b``, three for the second.
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
from transformers import LlamaConfig, PreTrainedModel

from ppf.deliver.elastic.model import ElasticLlamaForCausalLM
from ppf.fast.runtime.benchmark import Ceilings, decode_row, measure_ceilings, prefill_row, rows_as_dicts
from ppf.fitting.library import Library, Refit
from ppf.model import PPFLlamaConfig, build
from ppf.model.grid import Grid
from ppf.model.layout import expected_tensors
from ppf.model.policy import Policy
from ppf.model.weights import DecoderWeights

COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "head_dim": 128, "max_position_embeddings": 4096}
MODELS = {
    "llama-2-7b": {"intermediate_size": 11008, "heads": 32, "kv": 32, "vocab_size": 32000},
    "llama-3-8b": {"intermediate_size": 14336, "heads": 32, "kv": 8, "vocab_size": 128256},
}


def model_of(name: str, keep: float) -> PreTrainedModel:
    """Random weights on the GPU, in bf16, with the share ``keep`` of every layer's kv-groups and channels."""
    shape = dict(MODELS[name])
    heads, kv = shape.pop("heads"), shape.pop("kv")
    shape["intermediate_size"] = int(shape["intermediate_size"] * keep)
    config = LlamaConfig(
        **COMMON, **shape, num_attention_heads=int(heads * keep), num_key_value_heads=int(kv * keep),
        tie_word_embeddings=False,
    )  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(0)
    state = {}
    for tensor, size in expected_tensors(config).items():
        empty = torch.empty(size, dtype=torch.bfloat16, device="cuda")
        state[tensor] = empty.fill_(1) if "norm" in tensor else empty.normal_(0, 0.02, generator=generator)
    return build(config, state, torch.bfloat16)


def measure(model: PreTrainedModel, ratio: float, compiled: bool, ceilings: Ceilings) -> list[dict[str, Any]]:
    """All rows of one model."""
    rows = [decode_row(model, "ppf", 1, 128, 256, ceilings, ratio)]
    # Eager steps take as long as they take, however many; compiled ones are compiled for one length.
    rows.append(decode_row(model, "eager", 1, 128, 32, ceilings, ratio, 1))
    if compiled:
        rows.append(decode_row(model, "compiled", 1, 128, 256, ceilings, ratio, 1))
    else:
        rows += [decode_row(model, "ppf", batch, 128, 128, ceilings, ratio) for batch in (16, 64)]
        rows += [prefill_row(model, r, batch, 2048, ceilings, ratio) for r in ("ppf", "eager") for batch in (1, 8)]
    for row in rows:
        print(row, flush=True)
    return rows_as_dicts(rows)


def elastic(name: str, ceilings: Ceilings) -> dict[str, Any]:
    """Milliseconds of switching, speed on prefix views, and memory, of one elastic model.

    Its library is real in size and in what it solves, but all layers share one layer's factors: the 26 GB of a whole
    one would take minutes to make, and no figure here depends on its values.
    """
    dense = model_of(name, 1.0)
    weights, fields = DecoderWeights.from_model(dense), dense.config.to_dict()
    grid = Grid(weights.structure, 256)
    config = PPFLlamaConfig(**{k: v for k, v in fields.items() if k not in ("model_type", "architectures")})
    model = build(config, dense.state_dict(), torch.bfloat16, None, ElasticLlamaForCausalLM)
    del dense
    result = {}
    for kind, library in (("without refit", None), ("with refit", shared_library(weights, grid))):
        model.attach(grid, weights, library, lambda ratio: uniform(grid, ratio))
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
        result[kind]["weight_gigabytes"] = sum(p.nbytes for layer in weights.layers for p in vars(layer).values()) / 1e9
        print(kind, result[kind], flush=True)
    return result


def switch(model: ElasticLlamaForCausalLM, ratio: float) -> float:
    """Milliseconds until the model has ``ratio``, the device included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.set_ratio(ratio)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def uniform(grid: Grid, ratio: float) -> Policy:
    """The same share of every layer."""
    s = grid.structure
    step = grid.ffn_multiple
    layer = round((1 - ratio) * s.kv_groups), round((1 - ratio) * s.channels / step) * step
    return Policy([layer[0]] * s.layers, [layer[1]] * s.layers)


def shared_library(weights: DecoderWeights, grid: Grid) -> Library:
    """A library whose layers share one pair of factors."""

    def factors(dense: torch.Tensor, widths: list[int]) -> Refit:
        n = dense.shape[1]
        inverse = torch.eye(n, device="cuda") + 0.01 / n * torch.randn(n, n, device="cuda").tril_()
        return Refit(dense, dense.float(), inverse, tuple(widths), torch.zeros(len(widths)))

    s, layer = grid.structure, weights.layers[0]
    attention = factors(layer.o, [level * s.group_rows for level in range(s.kv_groups + 1)])
    ffn = factors(layer.down, [level * grid.ffn_multiple for level in range(grid.maximum[-1] + 1)])
    return Library([attention] * s.layers + [ffn] * s.layers, cache_bytes=40 << 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", action="append", choices=sorted(MODELS))
    parser.add_argument("--compiled", action="store_true")
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
            start, model = time.perf_counter(), model_of(name, keep)
            rows += measure(model, 1 - keep, arguments.compiled, ceilings)
            del model
            gc.collect()  # graphs and models hold each other
            torch.cuda.empty_cache()
            print(f"{name} {keep}: {time.perf_counter() - start:.0f} s", flush=True)
            report["models"][name] = {"rows": rows}
            write(report, arguments.output)
        if not arguments.compiled:
            report["models"][name]["elastic"] = elastic(name, ceilings)
            write(report, arguments.output)


def write(report: dict[str, Any], path: Path) -> None:
    """After every model, so that a killed run leaves what it has measured."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()

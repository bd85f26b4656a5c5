"""The runtime at Llama shapes with random weights, against stock transformers in the same run. Needs a GPU.

    python benchmarks/bench_decode.py --output benchmarks/results/decode_h200.json [--compiled] [--model llama-2-7b]

Dense, and with half of the kv-groups and channels of every layer. Medians of whole ``generate()`` calls; what the
columns mean is in ppf/runtime/benchmark.py. ``--compiled`` adds stock generation with a static cache and
torch.compile, which compiles for a minute a model.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from transformers import LlamaConfig, PreTrainedModel

from ppf.models import build
from ppf.models.layout import expected_tensors
from ppf.runtime.benchmark import Ceilings, decode_row, measure_ceilings, prefill_row, rows_as_dicts

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


def measure(model: PreTrainedModel, ratio: float, runners: list[str], ceilings: Ceilings) -> list[dict[str, Any]]:
    """All rows of one model, printed as they come."""
    rows = []
    for runner in runners:
        repeats = 5 if runner == "ppf" else 3
        for batch, length in ((1, 2048), (8, 2048)):
            if runner != "compiled":
                rows.append(prefill_row(model, runner, batch, length, ceilings, ratio, repeats))
        for batch, new_tokens in ((1, 256), (16, 128)):
            if runner != "compiled" or batch == 1:
                fewer = new_tokens if runner != "eager" else 48
                rows.append(decode_row(model, runner, batch, 128, fewer, ceilings, ratio, 3 if runner == "ppf" else 2))
        for row in rows[-4:]:
            print(row, flush=True)
    return rows_as_dicts(rows)


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
    runners = ["ppf", "eager", *(["compiled"] if arguments.compiled else [])]
    for name in arguments.model or MODELS:
        rows = []
        for keep in (1.0, 0.5):
            start, model = time.perf_counter(), model_of(name, keep)
            rows += measure(model, 1 - keep, runners, ceilings)
            del model
            torch.cuda.empty_cache()
            print(f"{name} {keep}: {time.perf_counter() - start:.0f} s", flush=True)
        report["models"][name] = rows
        temporary = arguments.output.with_suffix(".part")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(arguments.output)


if __name__ == "__main__":
    main()

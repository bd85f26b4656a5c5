"""True evaluations a second, beside the time that their products take at the measured product rate. Needs a GPU.

    python benchmarks/bench_evaluation.py --output benchmarks/results/evaluation_h200.json \
        --model MODEL --text calibration.txt --eval-text evaluation.txt

MODEL is a small checkpoint: it is calibrated and refitted, then evaluated on random policies, on uniform ones at 50 %
and on an evolution's offspring, at several numbers of tokens, beside the same policies one at a time; its perplexities
are compared with those of fp32. Then shapes of 7B to 8B with random weights, at 50 %. ``limit`` counts only
operations: products of kept weights, causal attention and the head, over the rate of an 8192-cubed bf16 product
measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from shapes import random_decoder
from torch import Tensor

from ppf import checkpoint
from ppf.choose.candidates.sampling import mutate, random_levels, random_ratios, uniform_policy
from ppf.fast.layer_major import LayerMajor
from ppf.fast.one_by_one import OneByOne
from ppf.fast.permute import permuted
from ppf.fast.plan import executed
from ppf.fitting.calibration import calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.factors import factorise_layer, tensors_of
from ppf.fitting.library import Library
from ppf.fitting.ranking import rank_layer
from ppf.fitting.reader import Reader
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy
from ppf.text import take_tokens

DEVICE = torch.device("cuda")
LARGE = {"llama-2-7b": 688, "qwen2.5-7b": 592, "qwen3-8b": 512}
"""Shapes with random weights, and the FFN multiples that give 16 to 32 levels."""


def seconds(call: Callable[[], object], laps: int = 3) -> float:
    """Median wall-clock seconds of a call, until the GPU is idle."""
    call()
    times = []
    for _ in range(laps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[laps // 2]


def product_rate() -> float:
    """FLOP/s of an 8192-cubed bf16 product."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * 8192**3 * 20 / seconds(lambda: [a @ b for _ in range(20)])


def operations(grid: Grid, policies: Sequence[Policy], tokens: int, length: int, vocabulary: int) -> float:
    """Mean operations of one policy: kept products, causal attention (half the square), and the head."""
    kept = grid.kept(grid.encode(policies)).double().mean().item()
    columns = [sublayer.columns for sublayer in grid.structure.attention]
    heads = sum(sum(w * c for w, c in zip(p.attention, columns, strict=True)) for p in policies) / len(policies)
    return tokens * (2 * kept + 2 * heads * length + 2 * grid.structure.hidden * vocabulary)


def small_model(model: Path, text: Path, eval_text: Path) -> tuple[Decoder, Grid, Library, Tensor]:
    """Ranked weights, grid (multiple 64), refits and evaluation sequences of 512, all on the GPU."""
    decoder, reader = checkpoint.load_decoder(model, device="cuda"), Reader.of(model, 512)
    grid = Grid(decoder.structure)
    sequences = take_tokens(reader.sequences(text), 131_072)
    statistics = list(calibrate(decoder, sequences))
    rankings = [rank_layer("wanda-sp", decoder, index, found) for index, found in enumerate(statistics)]
    ranked = permuted(decoder, rankings)
    factors = [
        factorise_layer(ranked.names(index).outputs(ranked.layers[index]), found, rankings[index], grid, index)
        for index, found in enumerate(statistics)
    ]
    library = Library(ranked, grid, [tensors_of(layer) for layer in factors])
    return ranked, grid, library, reader.sequences(eval_text).to(DEVICE)


def families(grid: Grid, count: int) -> dict[str, list[Policy]]:
    """Random policies over all ratios; one uniform policy; a parent's offspring at 50 %."""
    generator = torch.Generator().manual_seed(0)
    half = uniform_policy(grid, 0.5)
    parents = random_levels(grid, torch.full((8,), 0.5), generator)
    children = mutate(parents.repeat(count // 8, 1), grid, generator, swaps=3, ratio=0.5)
    return {
        "random, 5-70 %": grid.decode(random_levels(grid, random_ratios(count, generator), generator)),
        "uniform, 50 %": [half],
        "offspring of 8 parents, 50 %": grid.decode(children),
    }


def small_rows(arguments: argparse.Namespace, rate: float) -> Iterator[dict]:
    decoder, grid, library, text = small_model(arguments.model, arguments.text, arguments.eval_text)
    for tokens in (49_152, 16_384, 2_048):
        sequences = take_tokens(text, tokens)
        evaluator = Evaluator(decoder, grid, sequences, library)
        serial = LayerMajor(decoder, grid, sequences, OneByOne(decoder, grid, library))
        for name, policies in families(grid, 128).items():
            levels = [executed(row) for row in grid.encode(policies).tolist()]
            took = seconds(lambda p=policies, e=evaluator: e.log_perplexities(p)) / len(policies)
            one = seconds(lambda x=levels, e=serial: [e.losses([row]) for row in x[:8]]) / min(8, len(levels))
            work = operations(grid, policies, sequences.numel(), 512, len(decoder.frame.head))
            yield row(arguments.model.name, name, sequences, took, work / rate, one_at_a_time=1 / one)
    yield precision_row(decoder, grid, library, take_tokens(text, 49_152))


def precision_row(decoder: Decoder, grid: Grid, library: Library, sequences: Tensor) -> dict:
    """The largest relative difference in perplexity from fp32, and whether two passes agree bit for bit."""
    policies = [p for family in families(grid, 24).values() for p in family]
    exact = Evaluator(decoder.to(torch.float32), grid, sequences, library.to(torch.float32))
    expected = torch.tensor(exact.log_perplexities(policies))
    ours = Evaluator(decoder, grid, sequences, library)
    first, second = ours.log_perplexities(policies), ours.log_perplexities(policies[::-1])[::-1]
    worst = (torch.tensor(first) - expected).exp().sub(1).abs().max().item()
    result = {"what": "bf16 against fp32", "policies": len(policies), "worst_relative_perplexity": worst}
    return result | {"bit_identical_in_any_company": first == second}


def large_rows(rate: float) -> Iterator[dict]:
    """7B shapes at 16,384 tokens. Without a library: its solved weights have the shapes of the prefixes."""
    for name, multiple in LARGE.items():
        decoder = random_decoder(name)
        grid, vocabulary = Grid(decoder.structure, multiple), len(decoder.frame.head)
        sequences = torch.randint(0, vocabulary, (8, 2048), device=DEVICE)
        evaluator = Evaluator(decoder, grid, sequences)
        generator = torch.Generator().manual_seed(0)
        for what, policies in {
            "uniform, 50 %": [uniform_policy(grid, 0.5)],
            "random, 50 %": grid.decode(random_levels(grid, torch.full((8,), 0.5), generator)),
        }.items():
            took = seconds(lambda p=policies, e=evaluator: e.log_perplexities(p)) / len(policies)
            work = operations(grid, policies, sequences.numel(), 2048, vocabulary)
            yield row(f"{name} shape", what, sequences, took, work / rate)


def row(model: str, policies: str, sequences: Tensor, took: float, limit: float, **others: float) -> dict:
    result = {"model": model, "policies": policies, "tokens": sequences.numel(), "sequence": sequences.shape[1]}
    result |= {"ms": round(1e3 * took, 3), "per_second": round(1 / took, 1), "limit_ms": round(1e3 * limit, 3)}
    return result | {"share_of_limit": round(limit / took, 3)} | {k: round(v, 1) for k, v in others.items()}


def write_rows(path: Path, report: dict, rows: Iterable[dict]) -> None:
    """Print each row and write the report with all rows so far: a run that is stopped leaves what it has measured."""
    report = report | {"rows": []}
    for found in rows:
        print(json.dumps(found), flush=True)
        report["rows"].append(found)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    for name in ("--model", "--text", "--eval-text"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--small-only", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rate = product_rate()
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "product_TFLOP_per_s": round(rate / 1e12, 1),
    }
    with torch.no_grad():
        large = () if arguments.small_only else large_rows(rate)
        write_rows(arguments.output, report, chain(small_rows(arguments, rate), large))


if __name__ == "__main__":
    main()

"""Building a library: seconds, memory and the physical limit; and what rankings and refits are worth. Needs a GPU.

    python benchmarks/bench_library.py --output benchmarks/results/library_h200.json \
        --model MODEL --text calibration.txt --eval-text evaluation.txt

Llama-2-7B's shape with random weights, 16 FFN levels and 32 kv-groups, everything from the tokens on: the dense pass
with its Grams, ranking, factors, and the solutions of all levels; then MODEL, a small checkpoint, with the
perplexity of uniform policies by ranking, and by refit, masking, and masking with FLAP's biases. ``limit`` is the
operations over the rate of an 8192-cubed product of the same kind, measured in the same run: bf16 for pass and Grams,
fp64 for the factors, bf16 for the solutions, whose products are made twice.
"""

from __future__ import annotations

import argparse
import datetime
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from bench_evaluation import DEVICE, seconds, write_rows
from shapes import random_decoder
from torch import Tensor

from ppf import checkpoint
from ppf.choose.candidates.sampling import uniform_policy
from ppf.families import KINDS
from ppf.fast.permute import permute_layer, permuted
from ppf.fitting.calibration import LayerStatistics, calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.factors import factorise_layer, tensors_of
from ppf.fitting.library import Library, library_bytes
from ppf.fitting.masked import masked_losses
from ppf.fitting.ranking import rank_layer
from ppf.fitting.reader import Reader
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.layer import LayerRanking, expand_units
from ppf.model.policy import Policy
from ppf.text import take_tokens

CALIBRATION_TOKENS = 131_072


class Stages:
    """Seconds by stage; the GPU is idle at the borders."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start


def rates() -> dict[torch.dtype, float]:
    """FLOP/s of an 8192-cubed product by dtype."""
    found = {}
    for dtype, laps in ((torch.bfloat16, 20), (torch.float32, 2), (torch.float64, 2)):
        a, b = (torch.randn(8192, 8192, device=DEVICE).to(dtype) for _ in range(2))
        found[dtype] = 2 * 8192**3 * laps / seconds(lambda a=a, b=b, n=laps: [a @ b for _ in range(n)], laps=1)
    return found


def build(
    decoder: Decoder, grid: Grid, sequences: Tensor, ranking: str, stages: Stages
) -> tuple[list[LayerRanking], list[dict[str, Tensor]]]:
    """The rankings, and the factors on the device, of all layers."""
    stream, rankings, factors = calibrate(decoder, sequences), [], []
    for index in range(grid.structure.layers):
        with stages.stage("pass and Grams"):
            statistics = next(stream)
        with stages.stage("ranking"):
            order = rank_layer(ranking, decoder, index, statistics)
            ranked = permute_layer(decoder.names(index), decoder.layers[index], order)
        with stages.stage("factors"):
            found = factorise_layer(decoder.names(index).outputs(ranked), statistics, order, grid, index)
        rankings.append(order)
        factors.append(tensors_of(found))
        del statistics, ranked
    return rankings, factors


def large_row(speed: dict[torch.dtype, float]) -> dict:
    """Llama-2-7B's shape, with all factors and then all solutions on the device."""
    decoder, stages = random_decoder("llama-2-7b"), Stages()
    grid = Grid(decoder.structure, 688)
    sequences = torch.randint(0, len(decoder.frame.head), (CALIBRATION_TOKENS // 2048, 2048), device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    rankings, factors = build(decoder, grid, sequences, "wanda-sp", stages)
    with_factors = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decoder = permuted(decoder, rankings)
    library = Library(decoder, grid, factors, cache_bytes=0)
    solved = []
    with stages.stage("solutions"):
        for sublayer, top in enumerate(grid.maximum):
            solved += [weight for _, weight in library.descending(sublayer, range(1, top))]
    result = {
        "model": "llama-2-7b shape", "calibration_tokens": CALIBRATION_TOKENS, "levels": len(solved),
        "factor_GB": library_bytes(grid) / 1e9,
        "solution_GB": sum(weight.nbytes for weight in solved) / 1e9,
        "peak_GB_with_factors": with_factors / 1e9, "peak_GB_with_solutions": torch.cuda.max_memory_allocated() / 1e9,
    }  # fmt: skip
    result |= timed(stages.seconds, limits(grid, CALIBRATION_TOKENS, 2048, speed))
    with stages.stage("ranking by obs, one layer"):
        stream = calibrate(decoder, sequences[:8])
        rank_layer("obs", decoder, 0, next(stream))
    return result | {"seconds_obs_ranking_one_layer": round(stages.seconds["ranking by obs, one layer"], 3)}


def limits(grid: Grid, tokens: int, length: int, speed: dict[torch.dtype, float]) -> dict[str, float]:
    """Seconds of each stage's operations. A factorisation takes n³/3, and so do the regressions; the errors are those
    of the dense weight times a triangle."""
    s = grid.structure
    sizes = [(sub.width, step * sub.columns) for sub, step in zip(s.sublayers, grid.steps, strict=True)]
    attention = sum(sub.width for sub in s.attention)
    dense = 2 * s.decoder_parameters * tokens + 2 * attention * length * tokens
    grams = sum(2 * n * n * tokens for n, _ in sizes)
    factors = sum(2 * n**3 / 3 + s.hidden * n * n for n, _ in sizes)
    solutions = sum(2 * s.hidden * n * (n - step) for n, step in sizes)
    return {
        "pass and Grams": (dense + grams) / speed[torch.bfloat16],
        "factors": factors / speed[torch.float64],
        "solutions": solutions / speed[torch.bfloat16],
    }


def timed(took: dict[str, float], limit: dict[str, float]) -> dict:
    limit = {stage: limit[stage] for stage in took if stage in limit}
    total, least = sum(took.values()), sum(limit.values())
    return {
        "seconds": round(total, 3), "limit_seconds": round(least, 3), "share_of_limit": round(least / total, 3),
        "stages": {k: round(v, 3) for k, v in took.items()}, "limits": {k: round(v, 3) for k, v in limit.items()},
    }  # fmt: skip


def small_rows(arguments: argparse.Namespace, speed: dict[torch.dtype, float]) -> Iterator[dict]:
    """Perplexities of uniform policies on 49,152 tokens in sequences of 512, FFN multiple 64."""
    decoder, grid, calibration, evaluation = small_inputs(arguments)
    exact = list(calibrate(decoder, calibration))
    for name in ("wanda-sp", "flap-wifv", "obs"):
        stages = Stages()
        rankings, factors = build(decoder, grid, calibration, name, stages)
        ranked = permuted(decoder, rankings)
        refitted = Library(ranked, grid, factors)
        result = {"model": arguments.model.name, "ranking": name}
        result |= timed(stages.seconds, limits(grid, calibration.numel(), 512, speed))
        for ratio in (0.3, 0.5):
            policy = uniform_policy(grid, ratio)
            for kind, library in (("refit", refitted), ("masked", None)):
                value = Evaluator(ranked, grid, evaluation, library).log_perplexity(policy)
                result[f"perplexity_{kind}_{ratio:.0%}"] = round(math.exp(value), 2)
            value = with_biases(ranked, grid, exact, rankings, policy, evaluation)
            result[f"perplexity_masked_with_biases_{ratio:.0%}"] = round(math.exp(value), 2)
        yield result


def small_inputs(arguments: argparse.Namespace) -> tuple[Decoder, Grid, Tensor, Tensor]:
    """Dense weights, grid, and calibration and evaluation sequences of 512, all on the GPU."""
    decoder, reader = checkpoint.load_decoder(arguments.model, device=DEVICE.type), Reader.of(arguments.model, 512)
    calibration, evaluation = (
        take_tokens(reader.sequences(text), tokens).to(DEVICE)
        for text, tokens in ((arguments.text, CALIBRATION_TOKENS), (arguments.eval_text, 49_152))
    )
    return decoder, Grid(decoder.structure), calibration, evaluation


def with_biases(
    decoder: Decoder, grid: Grid, statistics: list[LayerStatistics], rankings: list[LayerRanking],
    policy: Policy, sequences: Tensor,
) -> float:  # fmt: skip
    """Log-perplexity of masking with FLAP's compensation: the mean output W·x̄ of what is removed, as a bias."""
    s, biases = grid.structure, {}
    for index, (moments, order) in enumerate(zip(statistics, rankings, strict=True)):
        for place, kind in enumerate(KINDS):
            columns = s.of(kind)[index].columns
            kept = policy[kind][index] * columns
            mean = moments.of(kind).mean[expand_units(order.of(kind), columns).to(DEVICE)]
            lost = decoder.output(index, kind)[:, kept:].float() @ mean[kept:]
            biases[index + place * s.layers] = lost.to(decoder.dtype)
    levels = grid.encode([policy])[0].tolist()
    return float(masked_losses(decoder, grid, levels, sequences, biases=biases).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    for name in ("--model", "--text", "--eval-text"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    with torch.no_grad():
        speed = rates()
        report |= {f"product_TFLOP_per_s_{str(k)[6:]}": round(v / 1e12, 1) for k, v in speed.items()}
        write_rows(arguments.output, report, chain((large_row(speed),), small_rows(arguments, speed)))


if __name__ == "__main__":
    main()

"""Layers that stream: every stage of a fit at sizes from 135M to 70B, resident or streamed. Needs a GPU.

    python benchmarks/bench_streaming.py rates --output benchmarks/results/streaming_rates_h100.json
    python benchmarks/bench_streaming.py fit --shape llama-2-7b --weights host --gpu-memory-gb 12 --output FILE
    torchrun --nproc-per-node 2 benchmarks/bench_streaming.py fit --shape llama-3.1-70b --weights host \
        --gpu-memory-gb 40 --policies 64 --output FILE

``rates``: random policies over 5 to 70 % of real models' shapes with resident random weights, many at once. ``fit``:
calibration, ranking and factors of every layer, then random policies with refitted output projections. Weights in host
memory may be a few distinct layers over and over (``--distinct``): that saves making them, not their traffic; the same
holds for the factors. ``limit`` counts only operations: products of kept weights, causal attention and the head, over
the rate of an 8192-cubed bf16 product measured in the same run. Memory is what the GPU itself says is in use beyond
what was before this process, its highest value; torch's own peak stands beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bench_evaluation import operations, product_rate, row, seconds, write_rows
from shapes import config_of, random_decoder
from torch import Tensor

from ppf import memory, ranks
from ppf.choose.candidates.sampling import random_levels, random_ratios
from ppf.fast.permute import permute_layer, permuted
from ppf.fitting.calibration import calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.factors import factorise_layer, tensors_of
from ppf.fitting.library import Library, library_bytes
from ppf.fitting.ranking import rank_layer
from ppf.model.build import LAYERS, expected_tensors
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.layer import Layer
from ppf.model.policy import Policy
from ppf.model.stream import Host, Packing, Stream

RATES = {
    "ref-14m": (64, 49_152, 512, 256), "smollm2-135m": (64, 32_768, 1024, 64), "qwen2.5-0.5b": (64, 32_768, 1024, 32),
    "llama-3.2-1b": (256, 32_768, 1024, 32), "llama-2-7b": (688, 16_384, 2048, 16),
}  # fmt: skip
"""FFN multiple, tokens, sequence length and policies."""
MULTIPLES = {"llama-2-7b": 688, "llama-3.1-70b": 1792, "llama-3.2-1b": 512, "smollm2-135m": 64}


class Repeated:
    """``count`` layers, of which only those of ``hosts``, one each, are distinct."""

    def __init__(self, hosts: list[Host], count: int):
        self.hosts, self.count = hosts, count

    def __len__(self) -> int:
        return self.count

    def __call__(self, index: int) -> tuple[Packing, Tensor]:
        return self.hosts[index % len(self.hosts)](0)

    def release(self, index: int, copied: torch.cuda.Event | None) -> None:
        """Nothing to do: the blocks stay."""

    def apart(self) -> Repeated:
        return self


class Watched:
    """The most memory of the GPU in use while the block runs, in bytes, beyond what was before CUDA started here."""

    def __init__(self, before: int):
        self.before, self.peak, self._ended = before, 0, threading.Event()

    def __enter__(self) -> Watched:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            self.peak = max(self.peak, total - free - self.before)


def used_before() -> int:
    """Bytes in use on this process's GPU by others, asked before CUDA is started here."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(ranks.local_rank())).used


def random_policies(grid: Grid, count: int) -> list[Policy]:
    generator = torch.Generator().manual_seed(0)
    return grid.decode(random_levels(grid, random_ratios(count, generator), generator))


def rate_rows(rate: float, names: Sequence[str]) -> Iterator[dict]:
    for name in names:
        multiple, tokens, length, count = RATES[name]
        decoder = random_decoder(name)
        grid, vocabulary = Grid(decoder.structure, multiple), len(decoder.frame.head)
        sequences = torch.randint(0, vocabulary, (tokens // length, length), device="cuda")
        policies, evaluator = random_policies(grid, count), Evaluator(decoder, grid, sequences)
        torch.cuda.reset_peak_memory_stats()
        took = seconds(lambda p=policies, e=evaluator: e.log_perplexities(p)) / count
        work = operations(grid, policies, tokens, length, vocabulary)
        found = row(f"{name} shape", "random, 5-70 %", sequences, took, work / rate)
        yield found | {"at_once": count, "peak_GB": round(torch.cuda.max_memory_reserved() / 1e9, 2)}
        del decoder, evaluator
        torch.cuda.empty_cache()


def random_layers(name: str, count: int) -> Iterator[Layer]:
    """Random weights of ``count`` layers, made on the GPU."""
    prefix, generator = f"{LAYERS}0.", torch.Generator("cuda").manual_seed(0)
    shapes = {n.removeprefix(prefix): s for n, s in expected_tensors(config_of(name)).items() if n.startswith(prefix)}
    for _ in range(count):
        layer = {}
        for tensor, size in shapes.items():
            empty = torch.empty(size, dtype=torch.bfloat16, device="cuda")
            layer[tensor] = empty.fill_(1) if "norm" in tensor else empty.normal_(0, 0.02, generator=generator)
        yield layer


def streamed_decoder(name: str, distinct: int) -> Decoder:
    config, device = config_of(name), torch.device("cuda", torch.cuda.current_device())
    config.dtype = torch.bfloat16
    outer = {
        n: torch.ones(s, dtype=torch.bfloat16, device=device) if "norm" in n
        else torch.randn(s, dtype=torch.bfloat16, device=device) * 0.02
        for n, s in expected_tensors(config).items() if not n.startswith(LAYERS)
    }  # fmt: skip
    hosts = [Host(iter([layer]), pinned=True) for layer in random_layers(name, distinct)]
    return Decoder.of_layers(config, Stream(Repeated(hosts, config.num_hidden_layers), device), outer)


class Fit:
    """The stages of a fit of one shape, timed; the GPU is idle at the borders."""

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.name, self.took = asked, asked.shape, {}
        multiple = asked.ffn_multiple or MULTIPLES[self.name]
        memory.bound(torch.device("cuda"), int(asked.gpu_memory_gb * 1e9) if asked.gpu_memory_gb else None)
        resident = asked.weights == "gpu"
        self.decoder = random_decoder(self.name) if resident else streamed_decoder(self.name, asked.distinct)
        self.grid = Grid(self.decoder.structure, multiple)
        generator, vocabulary = torch.Generator().manual_seed(0), len(self.decoder.frame.head)
        tokens = asked.calibration_tokens + asked.tokens
        text = torch.randint(0, vocabulary, (tokens // asked.length, asked.length), generator=generator)
        self.calibration, self.evaluation = text.split(asked.calibration_tokens // asked.length)
        self.factors, self.rankings = [], []

    def stage(self, name: str, start: float) -> float:
        torch.cuda.synchronize()
        ranks.barrier()
        self.took[name] = self.took.get(name, 0.0) + time.perf_counter() - start
        return time.perf_counter()

    def calibrate(self) -> None:
        """Statistics, ranking and factors. Of factors that leave the GPU only the first few are kept; the others are
        copied over them."""
        stream, start, errors, hosts = calibrate(self.decoder, self.calibration), time.perf_counter(), [], []
        for index in range(self.grid.structure.layers):
            statistics = next(stream)
            start = self.stage("calibrating", start)
            ranking = rank_layer("wanda-sp", self.decoder, index, statistics)
            ranked = permute_layer(self.decoder.names(index), self.decoder.layers[index], ranking)
            outputs = self.decoder.names(index).outputs(ranked)
            made = tensors_of(factorise_layer(outputs, statistics, ranking, self.grid, index))
            del statistics, ranked, outputs
            self.rankings.append(ranking)
            errors.append({name: t.cpu() for name, t in made.items() if not name.endswith("regression")})
            if self.decoder.resident:
                self.factors.append(made)
            elif index < self.asked.distinct:
                hosts.append(Host(iter([made]), pinned=True))
            else:
                packing, block = hosts[index % len(hosts)](0)
                packing.pack(made, block)
            start = self.stage("ranking and factorising", start)
        self.errors = errors
        if not self.decoder.resident:
            self.factors = Stream(Repeated(hosts, self.grid.structure.layers), self.decoder.device)

    def evaluate(self) -> dict:
        if not self.decoder.resident:
            self.decoder.layers.close()
        ranked = permuted(self.decoder, self.rankings)
        if ranked.resident:
            self.decoder = ranked
        library = Library(ranked, self.grid, self.factors, errors=self.errors)
        evaluator, policies = Evaluator(ranked, self.grid, self.evaluation, library), self.policies()
        mine = ranks.share(self.grid.kept(self.grid.encode(policies)).tolist())
        evaluator.log_perplexities([policies[mine[0]]])  # kernels are compiled, what is kept is solved
        torch.cuda.synchronize()
        ranks.barrier()
        start = time.perf_counter()
        values = evaluator.log_perplexities([policies[index] for index in mine])
        self.stage("evaluating", start)
        assert all(0 < value < 30 for value in values), values
        work = operations(self.grid, policies, self.evaluation.numel(), self.asked.length, len(ranked.frame.head))
        return {"policies": len(policies), "tokens": self.evaluation.numel(), "work": work, "values": values[:2]}

    def policies(self) -> list[Policy]:
        return random_policies(self.grid, self.asked.policies)


def fit_row(asked: argparse.Namespace, rate: float, before: int) -> dict:
    with Watched(before) as watched:
        fit = Fit(asked)
        fit.calibrate()
        found = fit.evaluate()
    took, limit = fit.took["evaluating"], found.pop("work") * asked.policies / rate / ranks.world()
    return {
        "shape": asked.shape, "weights": asked.weights, "bound_GB": asked.gpu_memory_gb, "gpus": ranks.world(),
        "calibration_tokens": asked.calibration_tokens, "ffn_multiple": fit.grid.ffn_multiple, **found,
        "seconds": {name: round(value, 2) for name, value in fit.took.items()},
        "per_second": round(asked.policies / took, 3), "share_of_limit": round(limit / took, 3),
        "peak_GB": round(watched.peak / 1e9, 2), "peak_torch_GB": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "library_GB": round(library_bytes(fit.grid) / 1e9, 2),
    }  # fmt: skip


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rates", "fit"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", default=",".join(RATES))
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--weights", choices=["gpu", "host"], default="gpu")
    parser.add_argument("--gpu-memory-gb", type=float)
    for name, value in (("distinct", 4), ("policies", 64), ("tokens", 16_384), ("length", 2_048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--calibration-tokens", type=int, default=131_072)
    parser.add_argument("--ffn-multiple", type=int)
    return parser.parse_args()


def main() -> None:
    asked, before = parsed(), used_before()
    ranks.start()
    torch.manual_seed(0)
    report = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    with torch.no_grad():
        rate = product_rate()
        report["product_TFLOP_per_s"] = round(rate / 1e12, 1)
        torch.cuda.empty_cache()
        if asked.what == "rates":
            write_rows(asked.output, report, rate_rows(rate, asked.shapes.split(",")))
            return
        found = fit_row(asked, rate, before)
        if ranks.first():
            known = json.loads(asked.output.read_text())["rows"] if asked.output.exists() else []
            write_rows(asked.output, report, [*known, found | {"product_TFLOP_per_s": report["product_TFLOP_per_s"]}])
    ranks.stop()


if __name__ == "__main__":
    main()

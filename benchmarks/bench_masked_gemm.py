"""Masked products against what a user would run instead, and against the physical limit. Needs a GPU.

    python benchmarks/bench_masked_gemm.py --output benchmarks/results/masked_gemm_h200.json [--model llama-2-7b]

Every row is the median over replays of one CUDA graph whose calls rotate over enough weight copies to defeat the L2
cache. Peers: ``dense`` (all channels), ``masked`` (dense, then activations times a mask), ``slice`` (kept weights
copied in every call), ``shrunk`` (cuBLAS on weights shrunk beforehand). ``limit`` is the larger of kept bytes over the
device-copy bandwidth and operations over the rate of an 8192-cubed product, both measured in the same run.

Two columns for 1 to 16 tokens: ``whole_rows`` is the share of the limit that lists of input columns of a weight held as
nn.Linear holds it can reach at all (their 32-byte sectors are whole rows); ``eager`` times calls launched one after the
other, without a graph, as `generate` does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ppf.fast.ops.grouped import grouped_masked_swiglu
from ppf.fast.ops.masked_attention import masked_attention_projections
from ppf.fast.ops.masked_linear import masked_linear
from ppf.fast.ops.masked_swiglu import masked_swiglu
from ppf.fast.ops.prepared import prepare_swiglu
from ppf.fast.ops.selection import Selection

MODELS = {"llama-2-7b": (4096, 11008, 32, 1), "llama-3-8b": (4096, 14336, 8, 4)}
HEAD_DIM = 128
DEVICE = "cuda"
TOKENS = (1, 16, 512, 2048, 4096, 16384)
CACHE = 200e6  # bytes of weights a graph must walk through before it meets the same ones again


@dataclass
class Limits:
    """Measured ceilings: bytes/s of a device copy (read + write), FLOP/s of a large bf16 product."""

    bandwidth: float
    flops: float

    def seconds(self, moved: float, operations: float) -> float:
        """The least time for ``moved`` bytes and ``operations``."""
        return max(moved / self.bandwidth, operations / self.flops)


def record(call: Callable[[int], object], copies: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of about 1.5 ms of ``call(i)``, i rotating over ``copies``, and the number of calls in it."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for i in range(copies):
        call(i)
    start.record()
    for i in range(copies):
        call(i)
    stop.record()
    torch.cuda.synchronize()
    rounds = max(1, int(1.5 / max(start.elapsed_time(stop), 1e-3)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(rounds * copies):
            call(i % copies)
    graph.replay()
    return graph, rounds * copies


def race(calls: dict[str, Callable[[int], object]], copies: int, laps: int = 7) -> dict[str, float]:
    """Median seconds of each call. The contenders take turns, so that a clock that sinks under load hits all alike."""
    graphs = {name: record(call, copies) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(laps):
        for name, (graph, count) in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop) * 1e-3 / count)
    return {name: statistics.median(laps) for name, laps in times.items()}


def eager_seconds(calls: dict[str, Callable[[int], object]], copies: int, laps: int = 7) -> dict[str, float]:
    """Median seconds of each call as Python launches it, 40 in a row, the contenders taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(laps):
        for name, call in calls.items():
            call(0)
            start.record()
            for i in range(40):
                call(i % copies)
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop) * 1e-3 / 40)
    return {name: statistics.median(laps) for name, laps in times.items()}


def measure_limits() -> Limits:
    """Both ceilings, outside a graph (a copy recorded in a graph takes the slower copy engine)."""
    a, b = (torch.randint(0, 255, (2**30,), dtype=torch.uint8, device=DEVICE) for _ in range(2))
    x, y = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    times = []
    for call in (lambda: b.copy_(a), lambda: x @ y):
        call()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(20):
            call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3 / 20)
    return Limits(2 * a.numel() / times[0], 2 * 8192**3 / times[1])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE) / shape[-1] ** 0.5


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def selections(channels: int, keep: float) -> dict[str, Selection]:
    width = int(channels * keep) // 64 * 64
    blocks = torch.randperm(channels // 64)[: width // 64]
    indices = torch.randperm(channels)[:width].sort().values
    return {
        "prefix": Selection.prefix(width, channels),
        "blocks": Selection.blocks(blocks, channels),
        "indices": Selection.indices(indices, channels),
    }


class Mlp:
    """Copies of one MLP's weights, dense, transposed and shrunk under one selection."""

    def __init__(self, hidden: int, channels: int, keep: float):
        self.hidden, self.channels = hidden, channels
        self.copies = max(2, int(CACHE / (6 * hidden * channels * keep)) + 1)
        self.gate, self.up = ([normal(channels, hidden) for _ in range(self.copies)] for _ in range(2))
        self.down = [normal(hidden, channels) for _ in range(self.copies)]
        self.transposed = [w.t().contiguous() for w in self.down]

    def shrink(self, s: Selection) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [
            (s.take(g, 0).clone(), s.take(u, 0).clone(), s.take(d, 1).clone())
            for g, u, d in zip(self.gate, self.up, self.down, strict=True)
        ]

    def sliced(self, x: Tensor, i: int, s: Selection) -> Tensor:
        rows = s.rows(x.device)
        kept = torch.arange(s.width, device=x.device) if rows is None else rows
        return mlp(x, self.gate[i][kept], self.up[i][kept], self.down[i][:, kept])


def mlp_rows(model: str, keep: float, tokens: int, weights: Mlp, limits: Limits) -> list[dict]:
    """All kinds of selection at one token count, beside the peers."""
    x = normal(tokens, weights.hidden)
    kinds = selections(weights.channels, keep)
    width = kinds["prefix"].width
    mask = torch.zeros(weights.channels, dtype=torch.bfloat16, device=DEVICE)
    mask[kinds["indices"].rows(x.device)] = 1
    gate, up, down = weights.gate, weights.up, weights.down
    shrunk = weights.shrink(kinds["indices"])
    calls: dict[str, Callable] = {"shrunk": lambda i: mlp(x, *shrunk[i])}
    if tokens <= 4096:
        calls["dense"] = lambda i: mlp(x, gate[i], up[i], down[i])
        calls["masked"] = lambda i: F.linear(F.silu(F.linear(x, gate[i])) * F.linear(x, up[i]) * mask, down[i])
        calls["slice"] = lambda i: weights.sliced(x, i, kinds["indices"])
    for kind, s in kinds.items():
        calls[kind] = lambda i, s=s: masked_swiglu(x, gate[i], up[i], down[i], s)
        if kind == "indices" or tokens <= 16:
            calls[kind + ", down transposed"] = lambda i, s=s: masked_swiglu(
                x, gate[i], up[i], weights.transposed[i], s, down_transposed=True
            )
    prepared = [prepare_swiglu(*w, kinds["indices"]) for w in zip(gate, up, down, strict=True)]
    calls["indices, prepared"] = lambda i: prepared[i](x)
    moved, operations = 6 * width * weights.hidden, 6.0 * tokens * width * weights.hidden
    limit = limits.seconds(moved + 4 * tokens * weights.hidden, operations)
    results = rows_of("masked_swiglu", model, keep, tokens, race(calls, weights.copies), limit, moved)
    if tokens <= 16:
        whole = limits.seconds(moved + 2 * weights.hidden * (weights.channels - width), operations)
        add_small_columns(results, eager_seconds(calls, weights.copies), limit / whole)
    return results


def add_small_columns(results: list[dict], eager: dict[str, float], whole_rows: float) -> None:
    """What is said of few tokens only: eager times beside the peers', and the reachable share where rows are whole."""
    for result in results:
        took = eager[result["selection"]]
        result["eager_us"] = round(took * 1e6, 2)
        for peer in ("shrunk", "masked"):
            result[f"{peer}_eager_us"] = round(eager[peer] * 1e6, 2)
            result[f"eager_times_faster_than_{peer}"] = round(eager[peer] / took, 3)
        if result["selection"] == "indices":
            result["whole_rows"] = round(whole_rows, 3)


def linear_rows(model: str, keep: float, tokens: int, weights: Mlp, limits: Limits) -> list[dict]:
    """masked_linear alone: kept outputs of gate, kept inputs of the transposed down."""
    hidden, kinds = weights.hidden, selections(weights.channels, keep)
    width = kinds["prefix"].width
    x, inside = normal(tokens, hidden), normal(tokens, width)
    kept = [kinds["indices"].take(w, 0) for w in weights.gate]
    turned = [kinds["indices"].take(w, 0).t().contiguous() for w in weights.transposed]
    outputs: dict[str, Callable] = {"shrunk": lambda i: F.linear(x, kept[i])}
    inputs: dict[str, Callable] = {"shrunk": lambda i: F.linear(inside, turned[i])}
    for kind, s in kinds.items():
        outputs[f"{kind}, outputs"] = lambda i, s=s: masked_linear(x, weights.gate[i], s)
        inputs[f"{kind}, inputs, transposed"] = lambda i, s=s: masked_linear(
            inside, weights.transposed[i], None, s, transposed=True
        )
    moved, operations = 2 * width * hidden, 2.0 * tokens * width * hidden
    limit = limits.seconds(moved + 2 * tokens * (hidden + width), operations)
    results = [race(calls, weights.copies) for calls in (outputs, inputs)]
    return [r for times in results for r in rows_of("masked_linear", model, keep, tokens, times, limit, moved)]


def attention_rows(model: str, keep: float, tokens: int, limits: Limits) -> list[dict]:
    """q, k and v of randomly kept kv-groups."""
    hidden, _, groups, share = MODELS[model]
    kept = Selection.indices(torch.randperm(groups)[: int(groups * keep)], groups)
    sizes = (groups * share * HEAD_DIM, groups * HEAD_DIM, groups * HEAD_DIM)
    of_rows = (kept.groups(share * HEAD_DIM), kept.groups(HEAD_DIM), kept.groups(HEAD_DIM))
    elements = sum(s.width for s in of_rows) * hidden
    copies = int(CACHE / (2 * elements)) + 1
    weights = [[normal(n, hidden) for n in sizes] for _ in range(copies)]
    shrunk = [[s.take(w, 0).clone() for s, w in zip(of_rows, layer, strict=True)] for layer in weights]
    x = normal(tokens, hidden)
    calls = {
        "shrunk": lambda i: [F.linear(x, w) for w in shrunk[i]],
        "kv-groups": lambda i: masked_attention_projections(x, *weights[i], kept, HEAD_DIM),
    }
    limit = limits.seconds(2 * elements, 2.0 * tokens * elements)
    return rows_of("masked_qkv", model, keep, tokens, race(calls, copies), limit, 2 * elements)


def grouped_rows(model: str, limits: Limits, policies: int = 16, tokens: int = 2048) -> list[dict]:
    """16 policies at mixed widths, 30 % to everything, against the sum of their shrunk products."""
    hidden, channels, _, _ = MODELS[model]
    widths = [int(channels * f) // 64 * 64 for f in torch.linspace(0.3, 1, policies).tolist()]
    gate, up, down = normal(channels, hidden), normal(channels, hidden), normal(hidden, channels)
    refitted = [down.clone() for _ in widths]
    x = normal(policies, tokens, hidden)
    shrunk = [(gate[:w].clone(), up[:w].clone(), down[:, :w].clone()) for w in widths]
    calls = {
        "shrunk": lambda _: [mlp(part, *w) for part, w in zip(x, shrunk, strict=True)],
        f"{policies} policies, one down": lambda _: grouped_masked_swiglu(x, gate, up, down, widths),
        f"{policies} policies, refitted downs": lambda _: grouped_masked_swiglu(x, gate, up, refitted, widths),
    }
    moved, operations = 6 * sum(widths) * hidden, 6.0 * tokens * sum(widths) * hidden
    share = sum(widths) / channels / policies
    limit = limits.seconds(moved, operations)
    return rows_of("grouped_masked_swiglu", model, share, tokens, race(calls, 1), limit, moved)


PEERS = ("dense", "masked", "slice", "shrunk")


def rows_of(
    op: str, model: str, keep: float, tokens: int, times: dict[str, float], limit: float, moved: float
) -> list[dict]:
    """One result per contender that is ours, with the peers of its race."""
    peers = {name: times[name] for name in PEERS if name in times}
    return [
        row(op, model, keep, tokens, name, took, limit, peers, moved)
        for name, took in times.items()
        if name not in PEERS
    ]


def row(
    op: str, model: str, keep: float, tokens: int, selection: str, took: float, limit: float, peers: dict, moved: float
) -> dict:
    result = {"op": op, "model": model, "keep": round(keep, 3), "tokens": tokens, "selection": selection}
    result |= {"us": round(took * 1e6, 2), "limit_us": round(limit * 1e6, 2), "share_of_limit": round(limit / took, 3)}
    result |= {"kept_TB_per_s": round(moved / took / 1e12, 3)}
    result |= {f"{name}_us": round(t * 1e6, 2) for name, t in peers.items()}
    result |= {f"times_faster_than_{name}": round(t / took, 3) for name, t in peers.items()}
    print(
        f"{op:21} {model} keep {keep:.2f} t={tokens:<5} {selection:28} {took * 1e6:8.1f} us limit {limit / took:5.1%}  "
        + "  ".join(f"{name} x{t / took:.2f}" for name, t in peers.items()),
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", action="append", choices=sorted(MODELS))
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    limits = measure_limits()
    print(f"copy {limits.bandwidth / 1e12:.2f} TB/s, product {limits.flops / 1e12:.0f} TFLOP/s")
    rows: list[dict] = []
    with torch.no_grad():
        for model in arguments.model or MODELS:
            for keep in (0.5, 0.75):
                weights = Mlp(MODELS[model][0], MODELS[model][1], keep)
                for tokens in arguments.tokens:
                    rows += mlp_rows(model, keep, tokens, weights, limits)
                    if tokens <= 4096:
                        rows += linear_rows(model, keep, tokens, weights, limits)
                        rows += attention_rows(model, keep, tokens, limits)
                del weights
            rows += grouped_rows(model, limits)
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "copy_TB_per_s": round(limits.bandwidth / 1e12, 3),
        "product_TFLOP_per_s": round(limits.flops / 1e12, 1),
        "rows": rows,
    }
    temporary = arguments.output.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(arguments.output)


if __name__ == "__main__":
    main()

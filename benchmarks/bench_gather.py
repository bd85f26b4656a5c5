"""The channel gather against torch.index_select, fancy indexing and the physical limit, at Llama 2 7B / 3 8B shapes.

    python benchmarks/bench_gather.py --device cuda --output benchmarks/results/gather_h200.json

The limit is bytes over the bandwidth of a plain copy measured in the same run. Bytes: kept rows read and written; for
scattered columns every source row read once and the kept columns written; for heads (aligned blocks) the kept columns
read and written. GPU: CUDA graphs over rotating buffers (several times the L2 cache), CUDA events, medians; a whole
model is timed as the user calls it, `gpu_ms` leaves out the host's part. CPU: results written to memory that exists (as
memcpy is measured), `fresh_ms` to new memory; gather, peer and copy in turns, minima (a shared machine only ever adds
time) and medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

# torch's threads spin for milliseconds after each of its operators, on the cores that the next contender needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402  (after the policy of its threads)
from torch import Tensor  # noqa: E402

from ppf import _C  # noqa: E402
from ppf.fast.ops.gather import _fields, gather_columns, gather_many, gather_rows  # noqa: E402
from ppf.fast.ops.index import Index  # noqa: E402

MODELS = {
    "Llama-2-7B": {"layers": 32, "hidden": 4096, "channels": 11008, "heads": 32, "kv_heads": 32, "head_dim": 128},
    "Llama-3-8B": {"layers": 32, "hidden": 4096, "channels": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128},
}
ROTATION = 6


def graph_ms(call: Callable[[int], object], rotation: int = ROTATION) -> float:
    """Median milliseconds of ``call(i)`` for i in 0..rotation-1, replayed as one CUDA graph."""
    for i in range(rotation):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(rotation)]
    times = [events_ms(graph.replay) / rotation for _ in range(25)]
    del kept
    return statistics.median(times)


def events_ms(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def best_ms(call: Callable[[], object], repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def copy_gbps(device: str) -> float:
    """Bandwidth of a plain copy, read + write, GB/s: the ceiling of every figure below."""
    size = 2**30 if device == "cuda" else 2**27
    x = torch.randint(0, 2**30, (size // 4,), dtype=torch.int32, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    ms = statistics.median(events_ms(lambda: y.copy_(x)) for _ in range(25)) if device == "cuda" else 0
    return 2 * size / (ms or best_ms(lambda: y.copy_(x), 15)) / 1e6


def limit_bytes(shape: tuple[int, int], kept: int, dim: int, blocks: bool, size: int) -> int:
    rows, columns = shape
    if dim == 0:
        return 2 * kept * columns * size
    return (rows * kept * 2 if blocks else rows * columns + rows * kept) * size


def cases(device: str):
    """(name, shape, dim, list, blocks, dtype)"""
    torch.manual_seed(0)
    for model, m in MODELS.items():
        for keep in (0.5, 0.75):
            n = int(m["channels"] * keep)
            ranking = torch.randperm(m["channels"])[:n]
            heads = torch.randperm(m["heads"])[: int(m["heads"] * keep)]
            head_columns = (heads[:, None] * m["head_dim"] + torch.arange(m["head_dim"])).flatten()
            up, down = (m["channels"], m["hidden"]), (m["hidden"], m["channels"])
            square = (m["hidden"], m["heads"] * m["head_dim"])
            for order, index in (("ranking order", ranking), ("increasing", ranking.sort().values)):
                yield f"{model} up rows, {order}", keep, up, 0, index, False, torch.bfloat16
                yield f"{model} down columns, {order}", keep, down, 1, index, False, torch.bfloat16
            yield f"{model} o columns, heads", keep, square, 1, head_columns, True, torch.bfloat16
            if model == "Llama-2-7B":
                yield f"{model} down columns fp32", keep, down, 1, ranking.sort().values, False, torch.float32


def measure_cuda(shape, dim, index, dtype) -> dict[str, float]:
    xs = [torch.randn(shape, device="cuda").to(dtype) for _ in range(ROTATION)]
    checked, device_index = Index(index, shape[dim]), index.cuda()
    op = (gather_rows, gather_columns)[dim]
    assert torch.equal(op(xs[0], checked), xs[0].index_select(dim, device_index))
    fancy = (lambda i: xs[i][device_index]) if dim == 0 else (lambda i: xs[i][:, device_index])
    outs = [op(x, checked) for x in xs]
    sources = [torch.randn_like(out) for out in outs]
    return {
        "ms": graph_ms(lambda i: op(xs[i], checked)),
        "index_select_ms": graph_ms(lambda i: xs[i].index_select(dim, device_index)),
        "fancy_ms": graph_ms(fancy),
        "copy_of_result_ms": graph_ms(lambda i: outs[i].copy_(sources[i])),
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_cpu(shape, dim, index, dtype) -> dict[str, float]:
    """The gather, index_select and a plain copy in turns: a shared machine changes from second to second."""
    x, out = torch.randn(shape).to(dtype), None
    op, threads = (gather_rows, gather_columns)[dim], torch.get_num_threads()
    out = op(x, index)
    assert torch.equal(out, x.index_select(dim, index))
    fields = _fields(x, out, index.data_ptr(), index.element_size(), index.numel(), dim, 1)
    source = torch.randint(0, 2**30, (2**25,), dtype=torch.int32)
    target = torch.empty_like(source)
    calls = {
        "copy": lambda: target.copy_(source),
        "ms": lambda: _C.gather_cpu(fields, "index", threads),
        "index_select": lambda: torch.index_select(x, dim, index, out=out),
    }
    laps = {name: [] for name in calls}
    for _ in range(11):
        for name, call in calls.items():
            laps[name].append(seconds(call))
    least, middle = ({name: f(t) for name, t in laps.items()} for f in (min, statistics.median))
    size = 2 * source.nbytes
    return {
        "ms": least["ms"] * 1e3,
        "median_ms": middle["ms"] * 1e3,
        "index_select_ms": least["index_select"] * 1e3,
        "median_index_select_ms": middle["index_select"] * 1e3,
        "copy_GB/s": size / least["copy"] / 1e9,
        "median_copy_GB/s": size / middle["copy"] / 1e9,
        "fresh_ms": best_ms(lambda: op(x, index), 5),
    }


def model_jobs(m: dict[str, int], keep: float) -> tuple[list[tuple[Tensor, Index, int]], int]:
    """All matrices of all layers with their kept heads and channels, and the bytes of the limit."""
    groups = m["kv_heads"]
    per_group = m["heads"] // groups * m["head_dim"]
    jobs, total = [], 0
    for _ in range(m["layers"]):
        kept = torch.randperm(groups)[: int(groups * keep)]
        rows_q = Index((kept[:, None] * per_group + torch.arange(per_group)).flatten(), groups * per_group)
        rows_kv = Index((kept[:, None] * m["head_dim"] + torch.arange(m["head_dim"])).flatten(), groups * m["head_dim"])
        ffn = Index(torch.randperm(m["channels"])[: int(m["channels"] * keep)], m["channels"])
        for index, dim, blocks in [(rows_q, 0, 0), (rows_kv, 0, 0), (rows_kv, 0, 0), (rows_q, 1, 1)] + [
            (ffn, 0, 0), (ffn, 0, 0), (ffn, 1, 0)
        ]:  # fmt: skip
            shape = (index.limit, m["hidden"]) if dim == 0 else (m["hidden"], index.limit)
            jobs.append((torch.randn(shape, dtype=torch.bfloat16, device="cuda"), index, dim))
            total += limit_bytes(shape, len(index), dim, bool(blocks), 2)
    return jobs, total


def measure_model(model: str, keep: float, bandwidth: float) -> dict[str, object]:
    jobs, total = model_jobs(MODELS[model], keep)
    device_lists = {id(index): index.on(torch.device("cuda", 0)) for _, index, _ in jobs}
    outs = gather_many(jobs)
    for out, (x, index, dim) in zip(outs, jobs, strict=True):
        assert torch.equal(out, x.index_select(dim, device_lists[id(index)]))
    del outs
    ms = statistics.median(events_ms(lambda: gather_many(jobs)) for _ in range(9))
    peer = statistics.median(
        events_ms(lambda: [x.index_select(dim, device_lists[id(index)]) for x, index, dim in jobs]) for _ in range(5)
    )
    row = {"name": f"{model}, all {MODELS[model]['layers']} layers, one call", "keep": keep, "ms": ms}
    gpu_ms = graph_ms(lambda _: gather_many(jobs), rotation=1)
    return row | {"gpu_ms": gpu_ms, "index_select_ms": peer, **shares(ms, total, bandwidth, peer)}


def shares(ms: float, size: int, bandwidth: float, peer: float) -> dict[str, float]:
    gbps = size / ms / 1e6
    limit = {"limit_ms": size / bandwidth / 1e6, "GB/s": gbps, "share_of_limit": gbps / bandwidth}
    return limit | {"times_index_select": peer / ms}


def environment(device: str) -> dict[str, object]:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {_C.build_info()['simd']}"
    return {
        "device": name,
        "threads": None if device == "cuda" else torch.get_num_threads(),
        "load_average": None if device == "cuda" else os.getloadavg()[0],
        "torch": torch.__version__,
        "build": _C.build_info(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    device, output = (arguments := parser.parse_args()).device, arguments.output
    bandwidth = copy_gbps(device)
    print(f"plain copy {bandwidth:.0f} GB/s")
    rows = []
    for name, keep, shape, dim, index, blocks, dtype in cases(device):
        times = (measure_cuda if device == "cuda" else measure_cpu)(shape, dim, index, dtype)
        size = limit_bytes(shape, index.numel(), dim, blocks, dtype.itemsize)
        if device == "cpu":
            bandwidth = times["copy_GB/s"]
            median_limit = size / times["median_copy_GB/s"] / 1e6
            times["median_share_of_limit"] = median_limit / times["median_ms"]
        share = shares(times["ms"], size, bandwidth, times["index_select_ms"])
        if device == "cuda" and (dim == 0 or blocks):  # a copy that moves the same bytes pays the same launch
            times["share_of_same_copy"] = times["copy_of_result_ms"] / times["ms"]
        rows.append({"name": name, "keep": keep, "shape": shape, "dtype": str(dtype)} | times | share)
        report(rows[-1])
    if device == "cuda":
        for model in MODELS:
            rows.append(measure_model(model, 0.5, bandwidth))
            report(rows[-1])
            torch.cuda.empty_cache()
    result = {"environment": environment(device), "copy_GB/s": bandwidth, "rows": rows}
    output.write_text(json.dumps(result, indent=1) + "\n")


def report(row: dict) -> None:
    figures = (
        f"{row['ms']:8.4f} ms {row['share_of_limit']:7.1%} of the limit {row['times_index_select']:6.2f} x index_select"
    )
    print(f"{row['name']:42s} {row['keep']:.2f} {figures}", flush=True)


if __name__ == "__main__":
    main()

"""The dispatch takes the faster way at Llama-2-7B's shapes: every contender on a GPU, in CUDA graphs, taking turns."""

import statistics
import warnings

import pytest
import torch
import torch.nn.functional as F
from masked_cases import normal

from ppf.ops import dispatch, few_tokens, many_tokens
from ppf.ops.masked_swiglu import _few_tokens
from ppf.ops.selection import Selection

pytestmark = pytest.mark.gpu
HIDDEN, CHANNELS, WIDTH = 4096, 11008, 5504
COPIES = 3


@pytest.fixture(scope="module")
def weights():
    if not many_tokens.apply(torch.zeros(1, 8, dtype=torch.bfloat16, device="cuda"), 8):
        pytest.skip("built without CUDA, or not Hopper")
    gate, up, turned = ([normal(CHANNELS, HIDDEN) for _ in range(COPIES)] for _ in range(3))
    return gate, up, [t.t().contiguous() for t in turned], turned


def graph_of(call):
    for i in range(COPIES):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(6 * COPIES):
            call(i % COPIES)
    graph.replay()
    return graph


def race(calls) -> dict[str, float]:
    """Median microseconds of each call."""
    graphs = {name: graph_of(call) for name, call in calls.items()}
    times = {name: [] for name in calls}
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(5):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) * 1e3 / (6 * COPIES))
    return {name: statistics.median(laps) for name, laps in times.items()}


def report(title: str, times: dict[str, float]) -> None:
    warnings.warn(title + ": " + ", ".join(f"{name} {us:.1f} us" for name, us in times.items()), stacklevel=2)


@pytest.mark.parametrize("tokens", [1, 16])
def test_few_tokens(weights, tokens):
    from ppf.kernels import gemv

    gate, up, down, turned = weights
    kept = Selection.indices(torch.randperm(CHANNELS)[:WIDTH].sort().values, CHANNELS)
    rows, mask, x = kept.rows(gate[0].device), kept.mask(gate[0].device), normal(tokens, HIDDEN)
    shrunk = [[kept.take(w[i], dim).clone() for w, dim in ((gate, 0), (up, 0), (down, 1))] for i in range(COPIES)]

    def native(i, down, index, kind, turned):
        return _few_tokens(x, gate[i], up[i], down[i], kind, WIDTH, index, None, turned, mask)

    def triton(i, index):
        return gemv.rows(x, (gate[i], up[i]), index, WIDTH)

    times = race({
        "cuBLAS": lambda i: F.linear(F.silu(F.linear(x, shrunk[i][0])) * F.linear(x, shrunk[i][1]), shrunk[i][2]),
        "prefix": lambda i: native(i, down, None, 0, False),
        "prefix Triton": lambda i: gemv.rows(triton(i, None), (down[i],), None, HIDDEN),
        "turned": lambda i: native(i, turned, rows, 3, True),
        "turned Triton": lambda i: gemv.columns(triton(i, rows), turned[i], rows),
        "listed": lambda i: native(i, down, rows, 3, False),
        "hidden": lambda i: few_tokens.rows(x, (gate[i], up[i]), rows, WIDTH),
        "hidden Triton": lambda i: triton(i, rows),
    })  # fmt: skip
    report(f"{tokens} tokens", times)
    for form in ("prefix", "turned", "hidden"):
        assert times[form] <= 1.05 * times[form + " Triton"], times


@pytest.mark.parametrize("tokens", [512, 2048])
def test_many_tokens(weights, tokens):
    from ppf.kernels import blocks as block_kernels
    from ppf.kernels.masked_swiglu import gate_up

    gate, up, down, turned = weights
    kept = Selection.indices(torch.randperm(CHANNELS)[:WIDTH].sort().values, CHANNELS)
    blocks = Selection.blocks(torch.randperm(CHANNELS // 64)[: WIDTH // 64], CHANNELS)
    device, x, act = gate[0].device, normal(tokens, HIDDEN), normal(tokens, WIDTH)
    rows, entries = kept.rows(device), blocks.entries(device)
    shrunk = [[kept.take(w[i], dim).clone() for w, dim in ((gate, 0), (up, 0), (down, 1))] for i in range(COPIES)]
    hidden = race({
        "cuBLAS": lambda i: F.silu(F.linear(x, shrunk[i][0])) * F.linear(x, shrunk[i][1]),
        "rows": lambda i: many_tokens.gate_up(x, gate[i], up[i], rows, WIDTH),
        "rows Triton": lambda i: gate_up(x, gate[i], up[i], rows, WIDTH),
        "blocks": lambda i: many_tokens.gate_up(x, gate[i], up[i], blocks.rows(device), WIDTH),
        "blocks Triton": lambda i: block_kernels.gate_up_blocks(x, gate[i], up[i], entries),
    })  # fmt: skip
    outputs = race({
        "cuBLAS": lambda i: F.linear(act, shrunk[i][2]),
        "units": lambda i: many_tokens.units(act, turned[i], rows, HIDDEN),
        "units by copy": lambda i: F.linear(act, dispatch.compact(turned[i], 0, WIDTH, rows).t()),
        "blocks": lambda i: many_tokens.outputs(act, down[i], None, HIDDEN, entries),
        "blocks Triton": lambda i: block_kernels.input_blocks(act, down[i], entries),
    })  # fmt: skip
    report(f"{tokens} tokens, gate and up", hidden)
    report(f"{tokens} tokens, down", outputs)
    assert hidden["rows"] <= 1.05 * hidden["rows Triton"], hidden
    assert outputs["units"] <= 1.05 * outputs["units by copy"], outputs

"""How fast a model reads prompts and generates, beside the physical limit and beside stock transformers.

Decoding is bound by memory: the limit is the bytes that a step must read (weights of the layers, norms and head, and
the cache) over the bandwidth of a large device copy (bytes read plus written). Prefill is bound by arithmetic: the
limit is its products' operations over the rate of one large product. Both ceilings are measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import GenerationMixin

from ...errors import InputError
from .generation import generate
from .plan import Plan, plan_of

RUNNERS = "ppf", "eager", "compiled"
"""PPF's runtime, stock ``generate``, and stock ``generate`` with a static cache and torch.compile."""

# Calls before the first that counts. PPF's second of a length records a graph, torch.compile's second its own.
_WARM_UP = {"ppf": 2, "eager": 1, "compiled": 2}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
_PRODUCT = {"cuda": 8192, "cpu": 1024}
_TOO_BUSY = "took no longer than the first alone: the time of a step is lost in that of other work"


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device: bytes/s of a copy (read plus written), operations/s of a large product."""

    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True)
class Row:
    """One measurement; medians. ``milliseconds``: per step (decode) or per batch of prompts (prefill)."""

    phase: str  # "decode" or "prefill"
    runner: str
    ratio: float
    batch: int
    prompt: int
    new_tokens: int
    milliseconds: float
    tokens_per_second: float
    limit_milliseconds: float
    share_of_limit: float
    gigabytes_per_second: float
    peak_gigabytes: float
    whole_call_seconds: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The device's copy bandwidth and product rate, now; the product is a linear layer's (where a CPU has no
    instructions for bf16 the plain one takes ten times as long)."""
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median(partial(target.copy_, source), device, 9)
    del source, target
    n = _PRODUCT[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = _median(lambda: linear(a, b), device, 5)
    return Ceilings(2 * _COPY_BYTES[device.type] / copy, 2 * n**3 / product)


def decode_row(
    model: Any,
    runner: str,
    batch: int,
    prompt: int,
    new_tokens: int,
    ceilings: Ceilings,
    ratio: float,
    repeats: int = 3,
) -> Row:
    """Greedy generation of ``new_tokens`` >= 2; a step's time is what a long call takes more than one of one token.

    Raises ``InputError`` if that is nothing: other work on the machine then took longer than all the steps.
    """
    plan, ids = plan_of(model), _prompts(model, batch, prompt)
    call = _caller(model, runner, ids)
    for _ in range(_WARM_UP[runner]):
        call(2 if runner == "eager" else new_tokens)
    _reset_peak(model.device)
    whole = _median(lambda: call(new_tokens), model.device, repeats)
    call(1)
    first = _median(lambda: call(1), model.device, repeats)
    if whole <= first:
        raise InputError("new-tokens", new_tokens, _TOO_BUSY, "Use more of them, or measure on a quiet machine")
    step = (whole - first) / (new_tokens - 1)
    read = plan.read_bytes() + _cache_bytes(plan, batch, prompt + new_tokens // 2)
    limit = read / ceilings.bytes_per_second
    return Row(
        "decode", runner, ratio, batch, prompt, new_tokens, 1e3 * step, batch / step, 1e3 * limit, limit / step,
        read / step / 1e9, _peak(model.device), whole,
    )  # fmt: skip


def prefill_row(
    model: Any, runner: str, batch: int, prompt: int, ceilings: Ceilings, ratio: float, repeats: int = 5
) -> Row:
    """The first token of ``batch`` prompts; stock transformers computes the last logits only, as we do."""
    plan, ids = plan_of(model), _prompts(model, batch, prompt)
    call = _caller(model, runner, ids)
    for _ in range(_WARM_UP[runner]):
        call(1)
    _reset_peak(model.device)
    seconds = _median(lambda: call(1), model.device, repeats)
    limit = prefill_operations(plan, batch, prompt) / ceilings.operations_per_second
    return Row(
        "prefill", runner, ratio, batch, prompt, 1, 1e3 * seconds, batch * prompt / seconds, 1e3 * limit,
        limit / seconds, plan.read_bytes() / seconds / 1e9, _peak(model.device), seconds,
    )  # fmt: skip


def prefill_operations(plan: Plan, batch: int, length: int) -> float:
    """Multiplications and additions of a prefill's products and of its causal attention; the head for one token."""
    attention = sum(
        4 * len(layer.attention.q) * _pairs(length, layer.window) for layer in plan.layers if layer.attention
    )
    parts = [part for layer in plan.layers for part in (layer.attention, layer.ffn) if part is not None]
    weights = sum(w.numel() for part in parts for w in part.tensors() if w.dim() == 2)
    return batch * (2 * weights * length + attention + 2 * plan.head.numel())


def _pairs(length: int, window: int | None) -> float:
    """Queries times the keys that each attends to."""
    unseen = max(0, length - (window or length))
    return (length * length - unseen * unseen) / 2


def _cache_bytes(plan: Plan, batch: int, length: int) -> int:
    """Keys and values that a step reads at ``length``."""
    positions = [min(length, layer.window or length) for layer in plan.layers]
    rows = sum(groups * seen for groups, seen in zip(plan.groups, positions, strict=True))
    return 2 * batch * rows * plan.head_dim * plan.embedding.element_size()


def _prompts(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def _caller(model: Any, runner: str, ids: Tensor) -> Callable[[int], Tensor]:
    """Greedy generation of exactly n tokens by one of ``RUNNERS``."""
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if runner == "compiled":
        arguments["cache_implementation"] = "static"
    run = generate if runner == "ppf" else GenerationMixin.generate
    return lambda n: run(model, ids, max_new_tokens=n, min_new_tokens=None, **arguments)


def _median(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, the device idle before and after."""
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float:
    """Peak of the allocator in GB since the last reset; 0 on a CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def rows_as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(row) for row in rows]

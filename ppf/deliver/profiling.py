"""Profiles: how long a sub-layer of every width takes on a device, in the form in which pruned models are deployed.

Nothing is timed alone: weights that stay in a cache, or kernels without their neighbours, would look too fast. Instead
whole models are timed in which all layers have the same widths, and differences are shared out over the layers. What is
left when everything is taken away (embedding, head, the host) is the constant. On a GPU with PPF's runtime this is its
prompt pass and its decode step; elsewhere they are transformers' own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._version import versions
from ..choose.budget.costs import Costs
from ..errors import InputError
from ..fast.ops.dispatch import triton_available
from ..fast.runtime.engine import Engine
from ..fast.runtime.plan import plan_of, unsupported
from ..fast.runtime.prefill import prefill
from ..model.grid import Grid
from ..model.policy import Policy
from ..progress import Progress, silent

PHASES = "prefill", "decode"
_WARM_UP = 3
_SECONDS = 0.25  # of repetitions of one timing
_REPEATS = 7, 40  # at least and at most
_LEVELS = 24  # measured for each kind of sub-layer; those between are interpolated


@dataclass(frozen=True)
class Workload:
    """What is timed: the prompt pass of ``batch`` prompts of ``tokens`` tokens, or one decode step of ``batch``
    sequences that hold ``tokens`` tokens each."""

    phase: str
    batch: int
    tokens: int


@dataclass(frozen=True)
class Profile:
    """Milliseconds of a workload: ``constant`` plus, of every layer, ``attention[kv-groups]`` and ``ffn[level]``."""

    workload: Workload
    constant: float
    attention: tuple[float, ...]
    ffn: tuple[float, ...]

    def costs(self, grid: Grid) -> Costs:
        """The cost table of latency budgets: what was measured, made monotone."""
        table = torch.zeros(grid.sublayers, grid.levels, dtype=torch.float64)
        layers = grid.structure.layers
        for rows, values in ((table[:layers], self.attention), (table[layers:], self.ffn)):
            monotone = torch.tensor(values, dtype=torch.float64).cummax(0).values.clamp_min(0)
            rows[:, : len(values)], rows[:, len(values) :] = monotone, monotone[-1]
        return Costs(table, self.constant, f"milliseconds a {'prompt pass' if self._is_prefill else 'decode step'}")

    @property
    def _is_prefill(self) -> bool:
        return self.workload.phase == "prefill"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Profile:
        """Inverse of :meth:`to_dict`; raises ``KeyError`` or ``TypeError`` for anything else."""
        values = (tuple(float(v) for v in data[name]) for name in ("attention", "ffn"))
        return cls(Workload(**data["workload"]), float(data["constant"]), *values)


Build = Callable[[Policy], PreTrainedModel]
"""A model of the given widths, on the device; its weights' values do not matter."""


def measure_profile(grid: Grid, build: Build, workload: Workload, progress: Progress = silent) -> Profile:
    """Time models of equal layers, with about 24 widths of each kind of sub-layer, and share the differences out."""
    layers, high = grid.structure.layers, (grid.maximum[0], grid.maximum[-1])
    points = [_spread(limit) for limit in high]
    total, done = 3 + sum(map(len, points)), 0

    def timed(groups: Sequence[int], level: int) -> float:
        nonlocal done
        model = build(Policy(groups, [level * grid.ffn_multiple] * layers))
        value = milliseconds(model, workload)
        done += 1
        progress("profile", done, total)
        return value

    one, first = [1] * layers, [1] + [0] * (layers - 1)
    least = timed(first, 0)
    base = timed(one, 0) if layers > 1 else least
    # One kv-group a layer is what every other model has: its cost is what the layers but the first add.
    group = (base - least) / max(1, layers - 1)
    attention = {0: 0.0} | {n: group + (timed([n] * layers, 0) - base) / layers for n in points[0]}
    ffn = {0: 0.0} | {n: (timed(one, n) - base) / layers for n in points[1]}
    return Profile(workload, max(least - group, 0.0), _filled(attention, high[0]), _filled(ffn, high[1]))


def milliseconds(model: PreTrainedModel, workload: Workload) -> float:
    """Median time of the workload on ``model``, on its device, after a warm-up."""
    work = _work(model, workload)
    for _ in range(_WARM_UP):
        work()
    timer = _cuda_timer if model.device.type == "cuda" else _host_timer
    values, end = [], time.perf_counter() + _SECONDS
    least, most = _REPEATS
    while len(values) < least or (len(values) < most and time.perf_counter() < end):
        values.append(timer(work))
    return statistics.median(values)


def check_workload(workload: Workload, context: int) -> None:
    """Raise ``InputError`` unless a model with ``context`` positions can run ``workload``."""
    for name, value in (("batch", workload.batch), (workload.phase, workload.tokens)):
        if value < 1:
            raise InputError(name, value, "leaves nothing to time", "Use a whole number, at least 1")
    if workload.tokens + 1 > context:
        problem = f"is longer than the model's context of {context} tokens"
        raise InputError(workload.phase, workload.tokens, problem, f"Use at most {context - 1}")


def profile_facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where and with what a profile was measured."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "runner": "ppf runtime" if is_cuda and triton_available() else "transformers",
        "versions": versions(),
    }


def _spread(limit: int) -> list[int]:
    """At most 24 of the levels 1…limit, evenly spaced, the last among them."""
    count = min(limit, _LEVELS)
    return sorted({max(1, round((index + 1) * limit / count)) for index in range(count)})


def _filled(known: dict[int, float], high: int) -> tuple[float, ...]:
    return tuple(np.interp(np.arange(high + 1), list(known), list(known.values())).tolist())


@torch.no_grad()
def _work(model: PreTrainedModel, workload: Workload) -> Callable[[], Any]:
    """One prompt pass or decode step of ``model``, ready to be called again and again."""
    generator = torch.Generator().manual_seed(0)
    shape = workload.batch, workload.tokens
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    if model.device.type == "cuda" and triton_available() and unsupported(model) is None:
        return _runtime_work(model, workload, ids)
    return _plain_work(model, workload, ids)


def _runtime_work(model: PreTrainedModel, workload: Workload, ids: Tensor) -> Callable[[], Any]:
    plan = plan_of(model)
    session = Engine(plan).session(plan, workload.batch, workload.tokens + 1)
    session.reset(torch.zeros(workload.batch, dtype=torch.int32), [], 0)
    if workload.phase == "prefill":
        return torch.no_grad()(lambda: prefill(session, ids, False))
    with torch.no_grad():
        prefill(session, ids, False)

    def step() -> None:
        session.position.fill_(workload.tokens)  # each step counts it up; all are to be the same
        session.advance()

    return torch.no_grad()(step)


def _plain_work(model: PreTrainedModel, workload: Workload, ids: Tensor) -> Callable[[], Any]:
    if workload.phase == "prefill":
        return torch.no_grad()(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    # The cache grows by a token a step, a few dozen in all: cropping it is not possible for all layers and versions.
    # By position: the name of the argument depends on the version too.
    return torch.no_grad()(lambda: model(ids[:, :1], None, None, cache, use_cache=True))


def _cuda_timer(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _host_timer(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)

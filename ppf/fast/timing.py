"""How long a model takes in the form in which it is deployed: PPF's runtime on a GPU, transformers elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from .ops.dispatch import triton_available

_WARM_UP = 3
_SECONDS = 0.25  # of repetitions of one timing
_REPEATS = 7, 40  # at least and at most


@dataclass(frozen=True)
class Workload:
    """What is timed: the prompt pass ("prefill") of ``batch`` prompts of ``tokens`` tokens, or one "decode" step of
    ``batch`` sequences that hold ``tokens`` tokens each."""

    phase: str
    batch: int
    tokens: int


def check_workload(workload: Workload, context: int) -> None:
    """Raise ``InputError`` unless a model with ``context`` positions can run ``workload``."""
    for name, value in (("batch", workload.batch), (workload.phase, workload.tokens)):
        if value < 1:
            raise InputError(name, value, "leaves nothing to time", "Use a whole number, at least 1")
    if workload.tokens + 1 > context:
        problem = f"is longer than the model's context of {context} tokens"
        raise InputError(workload.phase, workload.tokens, problem, f"Use at most {context - 1}")


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


def runner_of(model: PreTrainedModel) -> dict[str, str]:
    """Where ``model`` is timed, and what runs it."""
    cuda = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "runner": "ppf runtime" if _in_runtime(model) else "transformers",
    }


def _in_runtime(model: PreTrainedModel) -> bool:
    if model.device.type != "cuda" or not triton_available():
        return False
    from .runtime.plan import unsupported

    return unsupported(model) is None


@torch.no_grad()
def _work(model: PreTrainedModel, workload: Workload) -> Callable[[], Any]:
    """One prompt pass or decode step of ``model``, ready to be called again and again."""
    generator = torch.Generator().manual_seed(0)
    shape = workload.batch, workload.tokens
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    return _runtime_work(model, workload, ids) if _in_runtime(model) else _plain_work(model, workload, ids)


def _runtime_work(model: PreTrainedModel, workload: Workload, ids: Tensor) -> Callable[[], Any]:
    from .runtime.engine import Engine
    from .runtime.plan import plan_of
    from .runtime.prefill import prefill

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

"""Requests: from one of the ways to ask for a size to a budget of a run, and to the agent's answer to it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import checkpoint
from ..choose.budget import Budget, limit_budget, ratio_budget
from ..choose.budget.costs import token_flops, weight_bytes
from ..errors import InputError
from ..fitting.run import Answer, Run
from ..model.layout import expected_tensors
from ..model.policy import Policy
from .profiling import Profile, milliseconds, profile_facts

PROFILE = "profile.json"
# How far a measured latency may be from the predicted one before the user is warned.
TOLERANCE = 0.05
_PHASES = {"latency-ms": "prefill", "tokens-per-second": "decode"}
# Agents know ratios; for a budget in another unit this many are asked, and the predictor picks.
_ASKED = 64


@dataclass(frozen=True)
class Request:
    """What a user can ask for; exactly one of the fields but ``context`` must be given.

    ``ratio``: share of decoder parameters to remove. ``memory_gb``: 10⁹ bytes of all weights in the checkpoint's dtype.
    ``flops``: operations a token that attends to ``context`` others. ``latency_ms``: the prompt pass of the run's
    profile. ``tokens_per_second``: of all sequences together in its decode step.
    """

    ratio: float | None = None
    memory_gb: float | None = None
    flops: float | None = None
    latency_ms: float | None = None
    tokens_per_second: float | None = None
    context: int = 2048

    @property
    def given(self) -> dict[str, float]:
        """Name, as the command line writes it, and value of what is given."""
        names = "ratio", "memory_gb", "flops", "latency_ms", "tokens_per_second"
        return {n.replace("_", "-"): v for n in names if (v := getattr(self, n)) is not None}

    def budget(self, run: Run) -> Budget:
        """The budget on ``run``. Raises ``InputError`` unless exactly one thing is asked for and can be had."""
        if len(self.given) != 1:
            names = "--ratio, --memory-gb, --flops, --latency-ms or --tokens-per-second"
            value, problem = (", ".join(self.given), "are given together") if self.given else ("(none)", "is missing")
            raise InputError("ratio" if not self.given else "budget", value, problem, f"Give exactly one of {names}")
        ((kind, value),) = self.given.items()
        return {
            "ratio": lambda: ratio_budget(run.grid, value),
            "memory-gb": lambda: _memory(run, value),
            "flops": lambda: _flops(run, value, self.context),
            "latency-ms": lambda: _latency(run, value),
            "tokens-per-second": lambda: _throughput(run, value),
        }[kind]()


def answer(run: Run, budget: Budget) -> Answer:
    """The agent's policy for ``budget``, with the predictor's opinion of it.

    A ratio is the agent's own input. For another unit it is asked for many ratios, each answer is projected onto the
    budget, and the predictor picks the best. Raises ``InputError`` while the fit is unfinished.
    """
    if budget.kind == "ratio":
        return run.policy(budget.requested)
    run.require_complete()
    agent, predictor = run.agent, run.predictor  # loading is not the agent's time
    start = time.perf_counter()
    with torch.no_grad():
        ratios = torch.linspace(0.02, min(0.9, run.grid.maximum_ratio), _ASKED, device=agent.device)
        levels = budget.levels(agent.utilities(ratios)).unique(dim=0)
    prediction = predictor(levels)
    best = int(prediction.mean.argmin())
    milliseconds = 1000 * (time.perf_counter() - start)
    policy = run.grid.decode(levels[best : best + 1])[0]
    ratio, mean, std = run.grid.ratio(policy), float(prediction.mean[best]), float(prediction.std[best])
    return Answer(policy, ratio, ratio, mean, std, milliseconds)


def save_profile(path: Path, facts: dict[str, Any], profiles: list[Profile]) -> None:
    """Write profiles of one device, one a phase, with the facts about where they were measured."""
    from ..files import write_json

    write_json(path, facts | {"profiles": {p.workload.phase: p.to_dict() for p in profiles}})


def load_profile(run: Run, phase: str, kind: str) -> Profile:
    """The run's profile of "prefill" or "decode". Raises ``InputError`` about ``kind`` if there is none."""
    remedy = f"Measure one first: ppf profile {run.path}"
    try:
        data = json.loads((run.path / PROFILE).read_text(encoding="utf-8"))
        profile = Profile.from_dict(data["profiles"][phase])
    except FileNotFoundError:
        raise InputError(kind, run.path, "has no latency profile", remedy) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"its {PROFILE} has no readable {phase} profile ({type(error).__name__})"
        raise InputError(kind, run.path, problem, remedy) from None
    grid = run.grid
    if (len(profile.attention), len(profile.ffn)) != (grid.maximum[0] + 1, grid.maximum[-1] + 1):
        raise InputError(kind, run.path, "its profile is of another grid", remedy)
    return profile


def weight_costs(run: Run) -> Any:
    """Bytes of all weights of the run's model by policy, in the checkpoint's dtype; reads its config only."""
    config = checkpoint.check_checkpoint(run.model_path)
    total = sum(math.prod(shape) for shape in expected_tensors(config).values())
    element = torch.empty(0, dtype=config.dtype or torch.float32).element_size()
    return weight_bytes(run.grid, element, total - run.structure.decoder_parameters)


def _memory(run: Run, gigabytes: float) -> Budget:
    return limit_budget(run.grid, "memory-gb", gigabytes, weight_costs(run), gigabytes * 1e9, 1e9)


def _flops(run: Run, flops: float, context: int) -> Budget:
    if context < 0:
        raise InputError("context", context, "is no number of tokens", "Use 0 or more")
    vocabulary = checkpoint.check_checkpoint(run.model_path).vocab_size
    return limit_budget(run.grid, "flops", flops, token_flops(run.grid, context, vocabulary), flops)


def _latency(run: Run, milliseconds: float) -> Budget:
    costs = load_profile(run, "prefill", "latency-ms").costs(run.grid)
    return limit_budget(run.grid, "latency-ms", milliseconds, costs, milliseconds)


def _throughput(run: Run, tokens_per_second: float) -> Budget:
    profile = load_profile(run, "decode", "tokens-per-second")
    costs, batch = profile.costs(run.grid), profile.workload.batch
    limit = 1e3 * batch / tokens_per_second if tokens_per_second > 0 else math.nan
    least, most = (1e3 * batch / value for value in reversed(costs.range(run.grid)))
    if not least < tokens_per_second <= most:
        problem = f"is not between {least:.6g} (the dense model) and {most:.6g} (the smallest policy)"
        raise InputError("tokens-per-second", tokens_per_second, problem, "Ask for something between")
    return limit_budget(run.grid, "tokens-per-second", tokens_per_second, costs, limit)


def verified(run: Run, budget: Budget, policy: Policy, model: PreTrainedModel) -> dict[str, Any]:
    """What was requested, what the budget's table predicts for ``policy``, and what ``model``, its materialised form,
    has: bytes counted or milliseconds timed where that can be done here, else None. In the unit of the request.
    ``within_tolerance`` says that it is within 5 % of the prediction, and not more than 5 % beyond the request."""
    predicted, facts = _in_unit(budget, budget.delivered(policy)), {}
    measured = None
    if budget.kind == "memory-gb":
        measured = sum(p.nbytes for p in model.parameters()) / 1e9
    elif budget.kind in _PHASES:
        phase = _PHASES[budget.kind]
        profile, where = load_profile(run, phase, budget.kind), profile_facts(run.device, model.dtype)
        facts = {"workload": asdict(profile.workload), "device": where["device"], "runner": where["runner"]}
        measured = _in_unit(budget, milliseconds(model, profile.workload), profile)
        predicted = _in_unit(budget, budget.delivered(policy), profile)
    off = None if measured is None else measured / predicted - 1
    return {
        "kind": budget.kind,
        "requested": budget.requested,
        "predicted": predicted,
        "measured": measured,
        "off": off,
        "within_tolerance": None if off is None else abs(off) <= TOLERANCE and _is_met(budget, measured),
        "unit": budget.costs.unit,
    } | facts


def _is_met(budget: Budget, measured: float) -> bool:
    """Whether what was measured keeps what was asked for, give or take the tolerance."""
    if budget.kind == "tokens-per-second":
        return measured >= budget.requested / (1 + TOLERANCE)
    return measured <= budget.requested * (1 + TOLERANCE)


def _in_unit(budget: Budget, cost: float, profile: Profile | None = None) -> float:
    """A cost by the budget's table in the unit that the user asked in."""
    if budget.kind == "memory-gb":
        return cost / 1e9
    if budget.kind == "tokens-per-second" and profile is not None:
        return 1e3 * profile.workload.batch / cost
    return cost

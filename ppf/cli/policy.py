"""``ppf policy``: the agent's answer to a size, without touching any weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .bars import policy_bars
from .console import lines, show
from .options import Context, Flops, Json, LatencyMs, MemoryGb, Ratio, RunFolder, TokensPerSecond

if TYPE_CHECKING:
    from ..fitting.run import Answer


def policy(
    run: RunFolder,
    ratio: Ratio = None,
    memory_gb: MemoryGb = None,
    flops: Flops = None,
    latency_ms: LatencyMs = None,
    tokens_per_second: TokensPerSecond = None,
    context: Context = 2048,
    as_json: Json = False,
) -> None:
    """The run's policy for a size, with its predicted perplexity, in milliseconds."""
    from ..deliver.request import Request
    from ..fitting.run import Run

    opened = Run(run)
    budget = Request(ratio, memory_gb, flops, latency_ms, tokens_per_second, context).budget(opened)
    found = opened.answer(budget)
    data = {
        "requested_ratio": ratio,
        "delivered_ratio": found.delivered_ratio,
        "policy": found.policy.to_dict(),
        "policy_from": found.source,
        "predicted": _prediction(found),
        "milliseconds": found.milliseconds,
    }
    facts = {"ratio": f"{found.delivered_ratio:.4f} delivered" + (f", {ratio} requested" if ratio is not None else "")}
    predicted_cost = budget.predicted(found.policy)
    data["budget"] = budget.to_dict() | {"predicted": predicted_cost}
    if ratio is None:
        facts["budget"] = f"--{budget.name} {budget.requested:g} requested, {predicted_cost:,.6g} {budget.unit}"
    told = told_prediction(data["predicted"])
    facts |= {
        "policy from": told_source(found.source, not opened.has_predictor),
        "perplexity": told + (", predicted on the run's evaluation split" if data["predicted"] else ""),
        "time": f"{found.milliseconds:.1f} ms",
    }
    show(as_json, data, lines(facts), policy_bars(found.policy, opened.structure))


def _prediction(found: Answer) -> dict[str, float | None] | None:
    mean = found.predicted_log_perplexity
    if mean is None:
        return None
    return {"log_perplexity": mean, "perplexity": math.exp(mean), "log_perplexity_std": found.predicted_std}


def told_prediction(prediction: dict[str, Any] | None) -> str:
    """A predicted perplexity with the range of one standard uncertainty on either side; or that there is none."""
    if prediction is None:
        return "not predicted: the run has no evaluations"
    mean, std = prediction["log_perplexity"], prediction["log_perplexity_std"]
    if std is None:
        return f"{math.exp(mean):.2f} (how far off is not known: too few evaluations)"
    return f"{math.exp(mean):.2f} ({math.exp(mean - std):.2f} to {math.exp(mean + std):.2f})"


def told_source(source: str, alone: bool) -> str:
    """Whose a policy is; ``alone`` if the run knows nothing but calibration."""
    return "calibration alone: no policy was evaluated" if alone and source == "calibration" else source

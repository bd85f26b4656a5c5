"""``ppf policy``: the agent's answer to a size, without touching any weights."""

from __future__ import annotations

import math

from .bars import policy_bars
from .console import lines, show
from .options import Context, Flops, Json, LatencyMs, MemoryGb, Ratio, RunFolder, TokensPerSecond


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
    """The agent's policy for a size, with its predicted perplexity, in milliseconds."""
    from ..deliver.request import Request, answer
    from ..fitting.run import Run

    opened = Run(run)
    budget = Request(ratio, memory_gb, flops, latency_ms, tokens_per_second, context).budget(opened)
    found = answer(opened, budget)
    mean, std = found.predicted_log_perplexity, found.predicted_std
    data = {
        "requested_ratio": ratio,
        "delivered_ratio": found.delivered_ratio,
        "policy": found.policy.to_dict(),
        "predicted": {"log_perplexity": mean, "perplexity": math.exp(mean), "log_perplexity_std": std},
        "milliseconds": found.milliseconds,
    }
    facts = {"ratio": f"{found.delivered_ratio:.4f} delivered" + (f", {ratio} requested" if ratio is not None else "")}
    predicted_cost = budget.predicted(found.policy)
    data["budget"] = budget.to_dict() | {"predicted": predicted_cost}
    if ratio is None:
        facts["budget"] = f"--{budget.name} {budget.requested:g} requested, {predicted_cost:,.6g} {budget.unit}"
    facts |= {
        "perplexity": predicted(mean, std) + ", predicted on the run's evaluation split",
        "agent's time": f"{found.milliseconds:.1f} ms",
    }
    show(as_json, data, lines(facts), policy_bars(found.policy, opened.structure))


def predicted(mean: float, std: float) -> str:
    """A predicted perplexity with the range of one standard uncertainty on either side."""
    return f"{math.exp(mean):.2f} ({math.exp(mean - std):.2f} to {math.exp(mean + std):.2f})"

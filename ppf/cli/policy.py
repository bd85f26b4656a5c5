"""``ppf policy``: the agent's answer to a ratio, without touching any weights."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from .bars import policy_bars
from .console import lines, show
from .options import Json, RunFolder


def policy(
    run: RunFolder,
    ratio: Annotated[float, typer.Option(help="Share of the decoder's parameters to remove, such as 0.3.")],
    as_json: Json = False,
) -> None:
    """The agent's policy for a ratio, with its predicted perplexity, in milliseconds."""
    from ..run import Run

    opened = Run(run)
    answer = opened.policy(ratio)
    mean, std = answer.predicted_log_perplexity, answer.predicted_std
    data = {
        "requested_ratio": ratio,
        "delivered_ratio": answer.delivered_ratio,
        "policy": {"attention": list(answer.policy.attention), "ffn": list(answer.policy.ffn)},
        "predicted": {"log_perplexity": mean, "perplexity": math.exp(mean), "log_perplexity_std": std},
        "milliseconds": answer.milliseconds,
    }
    facts = {
        "ratio": f"{answer.delivered_ratio:.4f} delivered, {ratio} requested",
        "perplexity": predicted(mean, std) + ", predicted on the run's evaluation split",
        "agent's time": f"{answer.milliseconds:.1f} ms",
    }
    show(as_json, data, lines(facts), policy_bars(answer.policy, opened.structure))


def predicted(mean: float, std: float) -> str:
    """A predicted perplexity with the range of one standard uncertainty on either side."""
    return f"{math.exp(mean):.2f} ({math.exp(mean - std):.2f} to {math.exp(mean + std):.2f})"

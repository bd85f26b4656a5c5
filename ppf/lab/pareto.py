"""What quality costs: the agent's policies over all sizes, and what has been measured, against size and latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..choose.budget import PROFILE, weight_costs
from ..choose.budget.costs import Costs
from ..choose.budget.profile import load_profile
from ..choose.candidates.sampling import RATIO_RANGE
from ..fitting.experience import Evaluation
from ..fitting.run import Run
from .pages import Page, figure

_POINTS = 27


def pareto(run: Run) -> dict[str, Any]:
    """The run's policies at ratios from 5 to 70 % with their predicted perplexity, and the best measured ones.

    ``axes`` names every cost with its unit; each point has its value there. Latencies are there if the run has a
    profile. Raises ``InputError`` while the fit is unfinished.
    """
    run.require_complete()
    costs = _axes(run)
    low, high = RATIO_RANGE
    ratios = torch.linspace(low, min(high, run.grid.maximum_ratio), _POINTS)
    levels = run.grid.encode(run.policies(ratios.tolist()))
    with torch.no_grad():
        prediction = run.predictor(levels)
    predicted = [
        point
        | {
            "predicted_perplexity": math.exp(mean),
            "predicted_range": [math.exp(mean - std), math.exp(mean + std)] if run.knows_uncertainty else None,
        }
        for point, mean, std in zip(
            _points(run, levels, costs), prediction.mean.tolist(), prediction.std.tolist(), strict=True
        )
    ]
    rows = frontier(run.experience.rows())
    measured = [
        point | {"perplexity": math.exp(row.log_perplexity), "source": row.source}
        for point, row in zip(_points(run, run.grid.encode([r.policy for r in rows]), costs), rows, strict=True)
    ]
    return {
        "run": str(run.path),
        "model": run.manifest["model"],
        "axes": {name: cost.unit for name, cost in costs.items()},
        "predicted": predicted,
        "measured": measured,
        "measured_policies": len(run.experience),
    }


def frontier(rows: Sequence[Evaluation]) -> list[Evaluation]:
    """The rows that no other beats at once in ratio and in perplexity, from the least pruned to the most."""
    best: list[Evaluation] = []
    for row in sorted(rows, key=lambda row: (-row.ratio, row.log_perplexity)):
        if not best or row.log_perplexity < best[-1].log_perplexity:
            best.append(row)
    return best[::-1]


def pareto_page(data: dict[str, Any]) -> Page:
    """The page of :func:`pareto`: one plot an axis, one table."""
    page = Page("Quality against size", data["model"])
    page.text(
        f"PPF's policies with the perplexity predicted for them on the run's evaluation split (the band is one "
        f"standard uncertainty, if the run knows it), and the best of {data['measured_policies']:,} measured policies."
    )
    for axis, unit in data["axes"].items():
        with figure(width=7, height=3.6) as (fig, axes):
            _draw(axes, data, axis)
            axes.set(xlabel=f"{axis.replace('_', ' ')} ({unit})", ylabel="perplexity", yscale="log")
            axes.legend()
            page.figure(fig, f"Perplexity against {axis.replace('_', ' ')}.")
    headers = ["removed", *(axis.replace("_", " ") for axis in data["axes"]), "predicted perplexity"]
    rows = [
        [f"{p['ratio']:.1%}", *(f"{p[axis]:,.4g}" for axis in data["axes"]), f"{p['predicted_perplexity']:.2f}"]
        for p in data["predicted"]
    ]
    page.table(headers, rows, caption="PPF's policies.")
    return page


def _axes(run: Run) -> dict[str, Costs]:
    """The costs that can be said of this run: gigabytes of weights, and milliseconds where there is a profile."""
    weights = weight_costs(run)
    found = {"weights": Costs(weights.table / 1e9, weights.constant / 1e9, "GB")}
    if (run.path / PROFILE).exists():
        for axis, phase in (("prompt_pass", "prefill"), ("decode_step", "decode")):
            found[axis] = load_profile(run, phase, "profile").costs(run.grid)
            found[axis] = Costs(found[axis].table, found[axis].constant, "ms")
    return found


def _points(run: Run, levels: Tensor, costs: dict[str, Costs]) -> list[dict[str, Any]]:
    values = {name: cost.of(levels).tolist() for name, cost in costs.items()}
    return [
        {"ratio": run.grid.ratio(policy)}
        | {name: value[index] for name, value in values.items()}
        | {"policy": policy.to_dict()}
        for index, policy in enumerate(run.grid.decode(levels))
    ]


def _draw(axes: Any, data: dict[str, Any], axis: str) -> None:
    agent = sorted(data["predicted"], key=lambda point: point[axis])
    x = [point[axis] for point in agent]
    line = axes.plot(x, [point["predicted_perplexity"] for point in agent], label="PPF, predicted")[0]
    if all(point["predicted_range"] for point in agent):
        bands = zip(*(point["predicted_range"] for point in agent), strict=True)
        axes.fill_between(x, *bands, alpha=0.25, color=line.get_color(), lw=0)
    measured = data["measured"]
    axes.plot([m[axis] for m in measured], [m["perplexity"] for m in measured], "o", label="measured, best")

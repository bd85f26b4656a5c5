"""The report card as tables and plots: for the terminal and as a page."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..pages import Page, figure

_MEANING = (
    "Spearman and Kendall: rank correlation of predicted with true log-perplexity. MSE and MAE in nats. Regret: true "
    "perplexity of the best among the ten that look best, minus the best of all. Coverage: share of policies whose "
    "truth lies within the 90 % interval. Spread: standard deviation of the true log-perplexities."
)
_GROUPS = {
    "random": "Random policies",
    "visited": "Policies that agent and search visit",
}


def score_table(scores: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and a row for each ratio."""
    headers = ["removed", "policies", "Spearman", "Kendall", "MSE", "MAE", "regret", "coverage", "spread"]
    rows = [
        [
            f"{s['ratio']:.0%}", str(s["policies"]), _rank(s["spearman"]), _rank(s["kendall"]), f"{s['mse']:.5f}",
            f"{s['mae']:.4f}", f"{s['regret']:.3f}", f"{s['coverage']:.0%}", f"{s['spread']:.3f}",
        ]
        for s in scores
    ]  # fmt: skip
    return headers, rows


def rival_table(data: dict[str, Any], group: str) -> tuple[list[str], list[list[str]]]:
    """Headers and a row for the run's predictor and each rival: Spearman and MSE at every ratio."""
    headers = ["predictor", *(f"{name} {ratio:.0%}" for name in ("Spearman", "MSE") for ratio in data["ratios"])]
    everyone = {f"{data['kind']} (this run)": data["scores"]} | data["rivals"]
    rows = [
        [name, *(_rank(s["spearman"]) for s in scores[group]), *(f"{s['mse']:.5f}" for s in scores[group])]
        for name, scores in everyone.items()
    ]
    return headers, rows


def report_page(data: dict[str, Any]) -> Page:
    """The page of a report card."""
    page = Page("Report card of a predictor", f"{data['model']}, {data['evaluations']:,} evaluations")
    page.text(
        "How well the run's predictor tells policies of the same size apart, on policies it was not trained on. "
        "Across sizes even the parameter count ranks well; what counts is the ranking within one."
    )
    for group, title in _GROUPS.items():
        page.heading(title)
        page.table(*score_table(data["scores"][group]), caption=_MEANING if group == "random" else "")
    _predicted_against_true(page, data)
    _residuals(page, data)
    _rivals(page, data)
    _curve(page, data)
    _speed(page, data)
    _heat_map(page, data)
    _how(page, data)
    return page


def _predicted_against_true(page: Page, data: dict[str, Any]) -> None:
    with figure(width=7, height=3.6, columns=2) as (fig, both):
        for axes, (group, title) in zip(both, _GROUPS.items(), strict=True):
            points = _arrays(data, group)
            for index, ratio in enumerate(data["ratios"]):
                rows = points["ratio"] == index
                axes.plot(points["truth"][rows], points["mean"][rows], ".", label=f"{ratio:.0%}", alpha=0.6)
            ends = [points["truth"].min(), points["truth"].max()]
            axes.plot(ends, ends, lw=0.8, color="0.5")
            axes.set(title=title, xlabel="true log-perplexity (nats)", ylabel="predicted")
            axes.legend(title="removed")
        page.figure(fig, "Predicted against true log-perplexity of held-out policies; on the line they agree.")


def _residuals(page: Page, data: dict[str, Any]) -> None:
    with figure(width=7, height=3.2, columns=2) as (fig, both):
        for axes, (group, title) in zip(both, _GROUPS.items(), strict=True):
            points = _arrays(data, group)
            parts = [(points["mean"] - points["truth"])[points["ratio"] == i] for i in range(len(data["ratios"]))]
            axes.boxplot(parts, tick_labels=[f"{ratio:.0%}" for ratio in data["ratios"]], sym=".")
            axes.set(title=title, xlabel="share of parameters removed", ylabel="predicted − true (nats)")
        page.figure(fig, "Residuals by ratio: box from the first to the third quartile, whiskers 1.5 times as far.")


def _rivals(page: Page, data: dict[str, Any]) -> None:
    page.heading("Beside simpler predictors")
    page.text(
        "All learn from the same measurements. parameters: the number of parameters alone. additive: the sum of what "
        "each sub-layer's level costs alone, measured. ridge: linear in one-hot levels. xgboost: boosted trees"
        + ("." if data["xgboost"] else ", which is not installed here and was left out.")
    )
    for group, title in _GROUPS.items():
        page.table(*rival_table(data, group), caption=title, highlight=0)


def _curve(page: Page, data: dict[str, Any]) -> None:
    page.heading("Learning curve")
    sizes = [point["evaluations"] for point in data["curve"]]
    with figure(width=7, height=3.4, columns=2) as (fig, (left, right)):
        for index, ratio in enumerate(data["ratios"]):
            scores = [point["random"][index] for point in data["curve"]]
            left.plot(sizes, [1 - (s["spearman"] or 0.0) for s in scores], "o-", label=f"{ratio:.0%}")
            right.plot(sizes, [s["mse"] for s in scores], "o-", label=f"{ratio:.0%}")
        left.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="1 − Spearman")
        right.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="MSE (nats²)")
        left.legend(title="removed")
        page.figure(fig, "Random held-out policies, after training on a random share of the run's measurements.")
    seconds = ", ".join(f"{point['evaluations']:,}: {point['seconds']:.1f} s" for point in data["curve"])
    page.text(f"Training time by evaluations: {seconds}.")


def _speed(page: Page, data: dict[str, Any]) -> None:
    page.heading("Speed")
    speed = data["latency"]
    page.facts(
        {
            "one policy": f"{speed['milliseconds']:.2f} ms, uncertainty included",
            "in a batch": f"{speed['per_second']:,.0f} policies a second ({speed['batch']:,} at once)",
            "true evaluation": f"{speed['evaluation_milliseconds']:,.1f} ms ({data['protocol']['tokens']:,} tokens)",
            "prediction is": f"{speed['times_faster']:,.0f} times faster for one, "
            f"{speed['times_faster_in_batch']:,.0f} times in a batch",
        }
    )


def _heat_map(page: Page, data: dict[str, Any]) -> None:
    page.heading("What each layer can lose")
    table = np.array(data["sensitivity"], dtype=float)
    layers = data["layers"]
    with figure(width=7, height=4, columns=2) as (fig, both):
        for axes, part, title in zip(both, (table[:layers], table[layers:]), ("Attention", "FFN"), strict=True):
            used = part[:, ~np.isnan(part).all(0)]
            # Logarithms: some layers cost a hundred times what others do.
            image = axes.imshow(np.log10(np.maximum(used, 1e-3)), aspect="auto", origin="lower")
            axes.set(title=title, xlabel="level kept (0: none)", ylabel="layer")
            axes.grid(False)
            bar = fig.colorbar(image, ax=axes)
            bar.set_label("log₁₀ of nats added")
        page.figure(fig, "Log-perplexity that one sub-layer alone adds at each level, all others dense; measured.")


def _how(page: Page, data: dict[str, Any]) -> None:
    page.heading("How it was measured")
    protocol = data["protocol"]
    page.facts(
        {
            "text": f"{protocol['text']} ({protocol['part']})",
            "tokens": f"{protocol['tokens']:,} in sequences of {protocol['sequence_length']}",
            "dense perplexity": f"{math.exp(data['dense_log_perplexity']):.3f}",
            "run": data["run"],
            "device": data["device"],
            "versions": ", ".join(f"{name} {version}" for name, version in data["versions"].items()),
        }
    )


def _arrays(data: dict[str, Any], group: str) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in data["points"][group].items()}


def _rank(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"

"""A comparison as tables and plots: for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..pages import Page, figure

_CAPTION = (
    "Perplexity by share of decoder parameters removed. Evaluations: true evaluations of the whole search text "
    "that the method spent at one ratio, the mean over the ratios (a part of the text counts its share); seconds: "
    "of the allocation with these evaluations, the mean over the ratios."
)
_TASKS = (
    "What lm_eval says of the models, with one standard error; the items and what else a figure depends on stand in "
    "comparison.json."
)


def percent(ratio: float) -> str:
    """With as many digits as tell ratios apart."""
    return f"{100 * ratio:.12g}%"


def rows_by_method(data: dict[str, Any]) -> dict[str, dict[float, dict[str, Any]]]:
    """Cells by method's label and requested ratio, methods in the order they were asked for."""
    rows: dict[str, dict[float, dict[str, Any]]] = {}
    for cell in data["cells"]:
        rows.setdefault(cell["label"], {})[cell["requested_ratio"]] = cell
    return rows


def table_of(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: perplexity at every ratio, evaluations a ratio (mean), seconds a ratio (mean); methods that
    were left out come last."""
    ratios = data["ratios"]
    headers = ["method", *(percent(ratio) for ratio in ratios), "evaluations", "seconds"]
    rows = []
    for label, cells in rows_by_method(data).items():
        figures = [f"{cells[ratio]['perplexity']:.2f}" if ratio in cells else "–" for ratio in ratios]
        rows.append([label, *figures, f"{_mean(cells, 'evaluations'):,.0f}", f"{_mean(cells, 'seconds'):.2f}"])
    return headers, rows + [[f"{label} (left out)", *["–"] * (len(headers) - 1)] for label in data["left_out"]]


def tasks_table_of(data: dict[str, Any], errors: bool = False) -> tuple[list[str], list[list[str]]] | None:
    """Headers and rows: every figure of every task, of the dense model and of every cell, with one standard error if
    ``errors``; None if no tasks were asked."""
    if "dense_tasks" not in data:
        return None
    names = [(task, figure) for task, judged in data["dense_tasks"].items() for figure in judged["figures"]]
    headers = ["method", "removed", *(f"{task} {figure}" for task, figure in names)]
    models = [("dense", "0%", data["dense_tasks"])]
    models += [(cell["label"], percent(cell["requested_ratio"]), cell["tasks"]) for cell in data["cells"]]
    return headers, [
        [label, ratio, *(_figure(tasks[task]["figures"][figure], errors) for task, figure in names)]
        for label, ratio, tasks in models
    ]


def comparison_page(data: dict[str, Any]) -> Page:
    """The page of a comparison."""
    protocol, searched = data["protocol"], data["search_protocol"]
    page = Page("PPF and its peers", f"{data['model']}, {data['device']}")
    page.text(
        "Every method allocates on the same ranking, the same refitted library and the same evaluator; perplexities "
        "are of the masked model on a text that no policy was chosen on. Rows “as is” use no refit and their own "
        "ranking, as their users run them. Methods that drift from the budget in their original form are corrected: "
        "all deliver the ratio."
    )
    headers, rows = table_of(data)
    page.table(headers, rows, caption=_CAPTION)
    if (table := tasks_table_of(data, errors=True)) is not None:
        page.table(*table, caption=_TASKS)
    _plots(page, data)
    page.facts(
        {
            "reported on": _text(protocol),
            "searched on": _text(searched),
            "ranking": data["ranking"],
            "PPF's run": f"{data['run_evaluations']:,} evaluations over all ratios",
            "seed": data["seed"],
        }
        | {f"{label} below its peers": _reduction(found) for label, found in data["reductions"].items()}
        | {f"{label} is left out": reason for label, reason in data["left_out"].items()}
    )
    return page


def _plots(page: Page, data: dict[str, Any]) -> None:
    rows, ratios = rows_by_method(data), data["ratios"]
    with figure(width=7, height=4.6) as (fig, axes):
        for label, cells in rows.items():
            own = any(cell["ours"] for cell in cells.values())
            points = [(ratio, cells[ratio]["perplexity"]) for ratio in ratios if ratio in cells]
            axes.plot(*zip(*points, strict=True), "o-", label=label, lw=2.4 if own else 1, zorder=3 if own else 2)
        axes.set(yscale="log", xlabel="share of decoder parameters removed", ylabel="perplexity")
        axes.legend(ncols=2, fontsize=7)
        page.figure(fig, "Perplexity on the report text against the share removed.")
    hardest = max(ratios)
    with figure(width=7, height=4) as (fig, axes):
        for label, cells in rows.items():
            if hardest in cells:
                spent = 1 + cells[hardest]["evaluations"]
                axes.plot(spent, cells[hardest]["perplexity"], "o")
                axes.annotate(
                    label, (spent, cells[hardest]["perplexity"]), fontsize=7, textcoords="offset points", xytext=(4, 3)
                )
        axes.set(xscale="log", yscale="log", xlabel="1 + true evaluations at this ratio", ylabel="perplexity")
        page.figure(fig, f"Perplexity at {percent(hardest)} against the evaluations spent there.")


def _figure(found: dict[str, Any], error: bool) -> str:
    """With three digits of a share, and one of a perplexity, which may be thousands."""
    value, stderr = found["value"], found["stderr"] if error else None
    digits = 3 if abs(value) < 100 else 1
    return f"{value:,.{digits}f}" + ("" if stderr is None else f" ± {stderr:,.{digits}f}")


def _reduction(found: dict[str, Any]) -> str:
    least, most = (
        f"{entry['reduction']:.1%} ({entry['peer']}, {percent(entry['ratio'])})"
        for entry in (found["least"], found["most"])
    )
    return f"from {least} to {most}"


def _text(protocol: dict[str, Any]) -> str:
    size = f"{protocol['tokens']:,} tokens in sequences of {protocol['sequence_length']}"
    return f"{protocol['text']} ({protocol['part']}), {size}, sha256 {protocol['sha256'][:12]}"


def _mean(cells: dict[float, dict[str, Any]], field: str) -> float:
    values: Sequence[float] = [cell[field] for cell in cells.values()]
    return sum(values) / len(values)

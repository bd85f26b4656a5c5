"""From lm_eval's own results to what ``--json`` and ``ppf.json`` say of tasks."""

from __future__ import annotations

import math
from typing import Any

from ...errors import PPFError
from .finding import leaves


def outcome(name: str, group: list[Any], data: dict[str, Any]) -> dict[str, Any]:
    """Of the task or group ``name`` and all in it: figures, and what they can only be compared with if it is the same.

    ``group`` are lm_eval's objects and ``data`` its results, samples included. Raises ``PPFError`` if the model gave
    NaN or infinities.
    """
    for samples in data["samples"].values():
        _require_finite(name, samples)
    tasks = {task.task_name: task for task in leaves(group)}
    return {
        key: _figures(name, values) | _facts(key, values, data, tasks.get(key))
        for key, values in data["results"].items()
    }


def data_of(task: Any) -> dict[str, Any]:
    """Where the items of one of lm_eval's tasks come from: a file with its SHA-256, or a dataset."""
    own = (task.config.metadata or {}).get("data")
    return own or {"dataset": task.config.dataset_path, "name": task.config.dataset_name}


def _figures(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """lm_eval's "acc,none" and "acc_stderr,none", together under "acc"; a filter's name stays with the figure."""
    figures = {}
    for key, value in values.items():
        figure, _, filtered = key.partition(",")
        if not filtered or figure.endswith("_stderr"):
            continue
        if not math.isfinite(value):
            raise PPFError(f"task {name}: {figure} comes to {value}. Try --dtype float32")
        error = values.get(f"{figure}_stderr,{filtered}")
        known = isinstance(error, (int, float)) and math.isfinite(error)
        label = figure if filtered == "none" else f"{figure} ({filtered})"
        figures[label] = {"value": float(value), "stderr": float(error) if known else None}
    return {"figures": figures}


def _facts(key: str, values: dict[str, Any], data: dict[str, Any], task: Any) -> dict[str, Any]:
    """What a figure can only be compared with if it is the same. ``task`` is None for a group."""
    if task is None:
        return {"items": values.get("sample_len"), "group_of": data["group_subtasks"].get(key, [])}
    counts = data["n-samples"][key]
    return {
        "items": counts["effective"],
        "items_there_are": counts["original"],
        "few_shot": data["n-shot"][key],
        "version": data["versions"].get(key),
        "data": data_of(task),
    }


def _require_finite(name: str, samples: list[dict[str, Any]]) -> None:
    """A choice between NaNs is no choice, and looks like one."""
    for sample in samples:
        for answer in (answer for answers in sample["resps"] for answer in answers):
            likelihood = answer[0] if isinstance(answer, tuple) else answer
            if isinstance(likelihood, float) and math.isnan(likelihood):
                raise PPFError(f"task {name}: the model gives NaN in this dtype. Try --dtype float32")

"""Tasks in files: a folder's ``NAME.jsonl``, one item a line, as configurations for lm_eval. Nothing is downloaded.

The fields of the first item say which form a file has:

* ``query``, ``choices``, ``gold``: the choice that is likeliest after the query (acc), by characters too (acc_norm);
* ``contexts``, ``continuation``, ``gold``: the context after which the continuation is likeliest (acc);
* ``context``, ``continuation``: whether the continuation is what greedy decoding gives (acc), and its perplexity;
* ``query``, ``answer``: text generated greedily after the query; its last number, or its first line for answers that
  are not numbers, must equal the answer (exact_match).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ...checkpoint.hashes import sha256_of
from ...errors import InputError

Row = dict[str, Any]

_SEE = "docs/tasks.md shows the forms of items"
# As lm_eval's own gsm8k finds the last number of a text; compared without what people write into numbers.
_NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
_DECORATION = [",", r"\$", r"\.$"]
_MAX_TOKENS = 256


def task_files(folder: Path) -> dict[str, Path]:
    """The item files of ``folder`` by the names of their tasks. Raises ``InputError`` if there is no such folder."""
    if not folder.is_dir():
        raise InputError("task-folder", folder, "is not a folder", "Name one with NAME.jsonl files of items in it")
    return {file.stem: file for file in sorted(folder.glob("*.jsonl"))}


def file_config(name: str, file: Path) -> dict[str, Any]:
    """lm_eval's configuration of the task ``name``, its items included.

    Raises ``InputError`` with file and line for what cannot be read, is not JSON, or is not an item of its form.
    """
    rows = _rows(file)
    for fields, make in _FORMS.items():
        if set(fields) <= set(rows[0]):
            kept = [_checked(row, fields, file, line) for line, row in enumerate(rows, 1)]
            common = {"task": name, "test_split": "test", "num_fewshot": 0, "target_delimiter": ""}
            data = {"file": str(file), "sha256": sha256_of(file)}
            config = common | make(kept) | {"metadata": {"version": 1, "data": data}}
            return config | {"custom_dataset": partial(_dataset, kept)}
    forms = " or ".join(", ".join(fields) for fields in _FORMS)
    raise InputError("tasks", f"{file}:1", f"has none of the known forms: {forms}", _SEE)


def _dataset(rows: list[Row], **_: Any) -> dict[str, Any]:
    """What lm_eval asks for when it wants the data; it passes its metadata along."""
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}


def _rows(file: Path) -> list[Row]:
    rows = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for line, text in enumerate(lines, 1):
                rows.append(json.loads(text))
                if not isinstance(rows[-1], dict):
                    raise InputError("tasks", f"{file}:{line}", "is not a JSON object", _SEE)
    except OSError as error:
        raise InputError("tasks", file, f"cannot be read ({error.strerror})", "Name a folder you may read") from None
    except (ValueError, RecursionError) as error:
        at = f"{file}:{len(rows) + 1}"
        raise InputError("tasks", at, f"is not JSON in UTF-8 ({error})", "Write one JSON object a line") from None
    if not rows:
        raise InputError("tasks", file, "holds no items", _SEE)
    return rows


def _is_text(value: Any, row: Row) -> bool:
    return isinstance(value, str) and value != ""


def _are_texts(value: Any, row: Row) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(_is_text(text, row) for text in value)


def _is_index(value: Any, row: Row) -> bool:
    several = row.get("choices", row.get("contexts"))
    return type(value) is int and 0 <= value < len(several)


_CHECKS: dict[str, tuple[Callable[[Any, Row], bool], str]] = {
    "query": (_is_text, "a text"),
    "context": (_is_text, "a text"),
    "continuation": (_is_text, "a text"),
    "answer": (_is_text, "a text"),
    "choices": (_are_texts, "a list of two texts or more"),
    "contexts": (_are_texts, "a list of two texts or more"),
    "gold": (_is_index, "the number of one of them, from 0"),
}


def _checked(row: Row, fields: tuple[str, ...], file: Path, line: int) -> Row:
    """``row`` with these fields only. They stand in an order in which each may rely on those before it."""
    for name in fields:
        right, wanted = _CHECKS[name]
        if not right(row.get(name), row):
            raise InputError("tasks", f"{file}:{line}", f"has no field {name!r} that is {wanted}", _SEE)
    return {name: row[name] for name in fields}


def _choices(rows: list[Row]) -> dict[str, Any]:
    """A space before every choice separates it from the query: as in lm_eval, it does not count for acc_norm."""
    spaced = all(choice.startswith(" ") and choice != " " for row in rows for choice in row["choices"])
    if spaced:
        for row in rows:
            row["choices"] = [choice[1:] for choice in row["choices"]]
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": " " if spaced else "",
        "metric_list": [_metric("acc"), _metric("acc_norm")],
    }


def _contexts(rows: list[Row]) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",  # an index: lm_eval takes the contexts from the choices then
        "doc_to_choice": "contexts",
        "doc_to_target": "continuation",
        "metric_list": [_metric("acc")],
    }


def _continuation(rows: list[Row]) -> dict[str, Any]:
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    return {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "continuation",
        "metric_list": [_metric("acc"), perplexity],
    }


def _generation(rows: list[Row]) -> dict[str, Any]:
    numbers = all(re.fullmatch(r"-?\$?[0-9][0-9.,]*", row["answer"]) for row in rows)
    found = {"regex_pattern": _NUMBER, "group_select": -1} if numbers else {"regex_pattern": r"[^\n]+"}
    exact = _metric("exact_match") | ({"regexes_to_ignore": _DECORATION} if numbers else {})
    return {
        "output_type": "generate_until",
        "doc_to_text": "query",
        "doc_to_target": "answer",
        "generation_kwargs": {
            "until": ["Question:"] if numbers else ["\n\n"], "do_sample": False, "max_gen_toks": _MAX_TOKENS
        },
        "filter_list": [{"name": "none", "filter": [{"function": "regex"} | found, {"function": "take_first"}]}],
        "metric_list": [exact],
    }  # fmt: skip


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


# Fields, and what makes the configuration from all the items; the first form that fits is taken.
_FORMS: dict[tuple[str, ...], Callable[[list[Row]], dict[str, Any]]] = {
    ("query", "choices", "gold"): _choices,
    ("contexts", "continuation", "gold"): _contexts,
    ("context", "continuation"): _continuation,
    ("query", "answer"): _generation,
}
